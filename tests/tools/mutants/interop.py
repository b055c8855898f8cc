"""Bugs to plant in the code that reads and writes weights."""

from . import Mutant

INTEROP = "gpt2/checkpoints/huggingface.py"
WEIGHTS = "gpt2/checkpoints/weights.py"
NANOGPT = "gpt2/checkpoints/nanogpt.py"
LLMC = "gpt2/checkpoints/llmc.py"
CONVERT = "gpt2/checkpoints/convert.py"
GRAPHS = "gpt2/graphs.py"
FINETUNE = "gpt2/train/pretrained.py"
FILES, PICKLES = "gpt2/files/parsing.py", "gpt2/files/pickles.py"

INTEROP_MUTANTS = [
    # Hugging Face's folders
    Mutant(
        "one projection not turned", INTEROP,
        r"\.(?:c_attn|c_proj|c_fc)\.weight$", r"\.(?:c_attn|c_fc)\.weight$",
        "checkpoints/test_huggingface.py::test_transformers_load_what_is_saved[one-file-small]",
    ),
    Mutant(
        "the old model stays and is the one that loads", INTEROP,
        "            path.unlink(missing_ok=True)\n", "            pass\n",
        "checkpoints/test_huggingface.py::test_a_model_saved_over_another_is_the_one_that_loads[1KB-50GB]",
    ),
    Mutant(
        "a folder before a published name", "gpt2/checkpoints/hub.py",
        "str(name) in PUBLISHED or", "(str(name) in PUBLISHED and not Path(name).is_dir()) or",
        "checkpoints/test_hub.py::test_a_published_name_is_downloaded_though_a_folder_has_it[gpt2]",
    ),
    # weights
    Mutant(
        "unexpected names let through", WEIGHTS,
        "if missing or unexpected:", "if missing:",
        "checkpoints/test_huggingface_refused.py::test_weights_that_do_not_fit_are_refused_by_name[unexpected-one-file]",
        quick=True,
    ),
    # nanoGPT
    Mutant(
        "pickles run as they are", NANOGPT,
        "    return _check_pickle(data, len(entries))\n", "    return set()\n",
        "checkpoints/test_nanogpt_file.py::test_a_pickle_that_asks_for_more_than_tensors_is_not_run[call0-2]",
    ),
    Mutant(
        "the prefix of compiled models", NANOGPT,
        "weights.plain(key)", "key",
        "checkpoints/test_nanogpt_file.py::test_nanogpt_compiled_with_masks_an_optimizer_and_a_loss",
    ),
    # llm.c
    Mutant(
        "a size that is not checked", LLMC,
        "if size != expected:", "if size > expected:",
        "checkpoints/test_convert.py::test_a_truncated_llmc_file_is_refused[5000]",
    ),
    # formats, runs, training
    Mutant(
        "rounded on the way", CONVERT,
        "    if dtype is not None:\n",
        "    dtype = dtype or 'float32'\n    if dtype is not None:\n",
        "checkpoints/test_convert.py::test_there_and_back_is_exact[hf-run-bfloat16]",
    ),
    Mutant(
        "random weights after all", "gpt2/train/trainer.py",
        "                parameter.copy_(state[name])\n", "                pass\n",
        "train/test_pretrained.py::test_it_begins_with_the_model_and_its_sizes",
    ),
    Mutant(
        "a sum of gradients that forgets its first part", GRAPHS,
        "self._first if first else self._run", "self._first",
        "model/test_graphs.py::test_accumulation[2-True]", quick=True,
    ),
    Mutant(
        "weights that autocast converted before the capture", GRAPHS,
        "cache_enabled=False,", "cache_enabled=True,",
        "model/test_graphs.py::test_weights_are_read_at_the_replay",
    ),
    Mutant(
        "an update of tensors that a load has replaced", "gpt2/train/trainer.py",
        "        self.work.forget_graphs()\n", "",
        "train/test_train_graphs.py::test_resume[same]",
    ),
    Mutant(
        "the learning rate of random weights", FINETUNE,
        '**{**sizes, "lr": _LR, **chosen', "**{**sizes, **chosen",
        "train/test_pretrained.py::test_it_begins_with_the_model_and_its_sizes",
    ),
    Mutant(
        "ids of another vocabulary", "gpt2/data/batches.py",
        "beside.tokens != spec.tokens", "False",
        "train/test_pretrained.py::test_shards_of_another_tokenizer_are_refused",
    ),
    # hostile files
    Mutant(
        "JSON of any depth", FILES,
        "except RecursionError:\n        raise ValueError",
        "except ZeroDivisionError:\n        raise ValueError",
        "files/test_hostile.py::test_hostile_files[config-some]",
    ),
    Mutant(
        "parts of a pickle counted once", PICKLES,
        "self.parts += sum(value.parts for value in values)", "self.parts += len(values)",
        "files/test_pickles.py::test_a_bomb_is_refused_before_it_is_built[60-doubled-tuples]",
    ),
]  # fmt: skip
