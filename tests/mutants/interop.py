"""Bugs to plant in what reads and writes weights."""

from . import Mutant

INTEROP = "gpt2/interop.py"
WEIGHTS = "gpt2/weights.py"
NANOGPT = "gpt2/nanogpt.py"
LLMC = "gpt2/llmc.py"
CONVERT = "gpt2/convert.py"
FINETUNE = "gpt2/finetune.py"
FILES, PICKLES = "gpt2/files.py", "gpt2/pickles.py"

INTEROP_MUTANTS = [
    # Hugging Face's folders
    Mutant(
        "one projection not turned", INTEROP,
        r"\.(?:c_attn|c_proj|c_fc)\.weight$", r"\.(?:c_attn|c_fc)\.weight$",
        "test_interop.py::test_transformers_load_what_is_saved[one-file-small]",
    ),
    Mutant(
        "turned by its strides alone", INTEROP,
        "tensor.T.contiguous() if", "tensor.reshape(tensor.shape[::-1]).contiguous() if",
        "test_interop.py::test_loads_what_transformers_save[one-file-small]",
    ),
    Mutant(
        "every shard the first", INTEROP,
        "for key, name in where.items()}, size\n",
        "for key in where for name in list(shards)[:1]}, size\n",
        "test_interop.py::test_loads_what_transformers_save[shards-small]",
    ),
    Mutant(
        "masks taken for weights", INTEROP,
        "        if _MASK.search(key):\n            continue\n", "",
        "test_interop.py::test_other_forms_of_the_same_weights[published]",
    ),
    Mutant(
        "the prefix demanded", INTEROP,
        'else f"transformer.{name}"', "else name",
        "test_interop.py::test_other_forms_of_the_same_weights[published]",
    ),
    Mutant(
        "an activation of another model", INTEROP,
        '("gelu_new", "gelu_pytorch_tanh")', '("gelu_new", "gelu_pytorch_tanh", "gelu")',
        "test_interop.py::test_a_configuration_it_does_not_compute_is_refused_by_name_and_value"
        "[activation_function]",
    ),
    Mutant(
        "True taken for 1", INTEROP,
        "type(value) is type(s) and value == s", "value == s",
        "test_hostile.py::test_a_number_is_no_truth_value",
    ),
    Mutant(
        "a wide block taken for GPT-2's", INTEROP,
        'found.get("n_inner") not in', 'found.get("n_inner") == 0 and 0 not in',
        "test_interop.py::test_a_configuration_it_does_not_compute_is_refused_by_name_and_value"
        "[n_inner]",
    ),
    Mutant(
        "one dropout of three", INTEROP,
        "any(other != dropout for other in others)", "False",
        "test_interop.py::test_dropout_is_an_argument_and_the_configs_if_asked_for",
    ),
    Mutant(
        "a file outside the folder", INTEROP,
        r"[\w.-]+\.safetensors", r"[\w./-]+\.safetensors",
        "test_interop.py::test_an_index_that_does_not_fit_is_refused[outside]",
    ),
    Mutant(
        "shards not compared with their index", INTEROP,
        "listed[name] ^ set(shard.keys())", "listed[name] - set(shard.keys())",
        "test_interop.py::test_an_index_that_does_not_fit_is_refused[unlisted]",
    ),
    Mutant(
        "the old model stays and is the one that loads", INTEROP,
        "            path.unlink(missing_ok=True)\n", "            pass\n",
        "test_interop.py::test_a_model_saved_over_another_is_the_one_that_loads[1KB-50GB]",
    ),
    Mutant(
        "shards beyond their size", INTEROP,
        "        room -= tensor.nbytes\n", "        room -= 1\n",
        "test_interop.py::test_shards_hold_at_most_what_is_asked_for_and_the_index_says_where",
    ),
    Mutant(
        "a folder before a published name", "gpt2/hub.py",
        "str(name) in PUBLISHED or", "(str(name) in PUBLISHED and not Path(name).is_dir()) or",
        "test_hub.py::test_a_published_name_is_downloaded_though_a_folder_has_it[gpt2]",
    ),
    # weights
    Mutant(
        "unexpected names let through", WEIGHTS,
        "if missing or unexpected:", "if missing:",
        "test_interop.py::test_weights_that_do_not_fit_are_refused_by_name[unexpected-one-file]",
        quick=True,
    ),
    Mutant(
        "integers taken for floats", WEIGHTS,
        "if dtype not in DTYPES or stored != shape:", "if stored != shape:",
        "test_interop.py::test_weights_that_do_not_fit_are_refused_by_name[dtype-one-file]",
    ),
    Mutant(
        "a head of its own dropped", WEIGHTS,
        "if not same or not torch.equal(", "if not same and not torch.equal(",
        "test_interop.py::test_weights_that_do_not_fit_are_refused_by_name[untied-one-file]",
    ),
    Mutant(
        "weights left in the file", WEIGHTS,
        "to(dtype, copy=True)", "to(dtype)",
        "test_interop.py::test_a_loaded_model_is_tied_in_eval_mode_and_owns_its_memory",
    ),
    Mutant(
        "loaded and untied", WEIGHTS,
        "    model.lm_head.weight = model.transformer.wte.weight\n", "",
        "test_interop.py::test_a_loaded_model_is_tied_in_eval_mode_and_owns_its_memory",
    ),
    Mutant(
        "the last positions kept", WEIGHTS,
        "name: state[name][:size]", "name: state[name][-size:]",
        "test_finetune.py::test_it_begins_with_the_model_and_its_sizes",
    ),
    # nanoGPT
    Mutant(
        "pickles run as they are", NANOGPT,
        "    return _check_pickle(data, len(entries))\n", "    return set()\n",
        "test_nanogpt_file.py::test_a_pickle_that_asks_for_more_than_tensors_is_not_run[call0-2]",
    ),
    Mutant(
        "views taken for weights", NANOGPT,
        "or not all(tensor.is_contiguous() for tensor in found.values())", "",
        "test_nanogpt_file.py::test_a_ckpt_that_does_not_fit_is_refused_by_name[view]",
    ),
    Mutant(
        "the prefix of compiled models", NANOGPT,
        "weights.plain(key)", "key",
        "test_nanogpt_file.py::test_nanogpt_compiled_with_masks_an_optimizer_and_a_loss",
    ),
    Mutant(
        "missing biases of one", NANOGPT,
        "torch.zeros(shape, dtype=dtype)", "torch.ones(shape, dtype=dtype)",
        "test_nanogpt_file.py::test_nanogpt_without_biases_has_biases_of_zero",
    ),
    Mutant(
        "biases decayed", NANOGPT,
        "if t.dim() >= 2]", "if t.dim() >= 1]",
        "test_nanogpt_file.py::test_nanogpt_resumes_from_what_is_written",
    ),
    # llm.c
    Mutant(
        "layer by layer, not kind by kind", LLMC,
        "        elif name.startswith(first):\n", "        else:\n            yield name, shape\n"
        "            continue\n        if False:\n",
        "test_convert.py::test_llmc_s_file_byte_by_byte[3]",
    ),
    Mutant(
        "no padding", LLMC,
        "rows = -(-config.vocab_size // PADDING) * PADDING", "rows = config.vocab_size",
        "test_convert.py::test_llmc_s_file_byte_by_byte[5]",
    ),
    Mutant(
        "padding taken for tokens", LLMC,
        "    state[WTE] = state[WTE][: config.vocab_size]\n", "",
        "test_convert.py::test_llmc_s_padding_is_left_out_whatever_it_holds",
    ),
    Mutant(
        "a size that is not checked", LLMC,
        "if size != expected:", "if size > expected:",
        "test_convert.py::test_a_truncated_llmc_file_is_refused[5000]",
    ),
    # formats, runs, training
    Mutant(
        "rounded on the way", CONVERT,
        "    if dtype is not None:\n",
        "    dtype = dtype or 'float32'\n    if dtype is not None:\n",
        "test_convert.py::test_there_and_back_is_exact[hf-run-bfloat16]",
    ),
    Mutant(
        "a tokenizer of another size", CONVERT,
        "if size != config.vocab_size:", "if size > config.vocab_size:",
        "test_convert.py::test_a_padded_vocabulary_stays_unless_it_is_cropped",
    ),
    Mutant(
        "random weights after all", "gpt2/trainer.py",
        "                parameter.copy_(state[name])\n", "                pass\n",
        "test_finetune.py::test_it_begins_with_the_model_and_its_sizes",
    ),
    Mutant(
        "the learning rate of random weights", FINETUNE,
        '**{**sizes, "lr": _LR, **chosen', "**{**sizes, **chosen",
        "test_finetune.py::test_it_begins_with_the_model_and_its_sizes",
    ),
    Mutant(
        "ids of another vocabulary", "gpt2/data.py",
        "beside.tokens != spec.tokens", "False",
        "test_finetune.py::test_shards_of_another_tokenizer_are_refused",
    ),
    # hostile files
    Mutant(
        "JSON of any depth", FILES,
        "except RecursionError:\n        raise ValueError",
        "except ZeroDivisionError:\n        raise ValueError",
        "test_hostile.py::test_hostile_files[config-some]",
    ),
    Mutant(
        "keys of any kind in a pickle", PICKLES,
        "any(key is not _KEY for key in values[::2])", "False",
        "test_pickles.py::test_a_bomb_is_refused_before_it_is_built[key-of-a-tuple]",
    ),
    Mutant(
        "parts of a pickle counted once", PICKLES,
        "self.parts += sum(value.parts for value in values)", "self.parts += len(values)",
        "test_pickles.py::test_a_bomb_is_refused_before_it_is_built[60-doubled-tuples]",
    ),
    Mutant(
        "layers of any number", WEIGHTS,
        "if n_layer > max(tensors // _LEAST_PER_LAYER, _FEW_LAYERS):", "if n_layer > 10**5:",
        "test_files.py::test_absurd_layers_are_refused_at_once[hf-100000]",
    ),
    Mutant(
        "a pipe as a file", FILES,
        "    if not stat.S_ISREG(mode):",
        "    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):",
        "test_files.py::test_only_regular_files_are_opened[pipe-meta]",
    ),
    Mutant(
        "memory for what a header says", LLMC,
        "    size, expected =", "    np.ones(rows * C)\n    size, expected =",
        "test_hostile.py::test_hostile_files[llmc-some]",
    ),
    Mutant(
        "keys as long as they are", WEIGHTS,
        'join(map(brief, names[:3]))', 'join(names[:3])',
        "test_hostile.py::test_hostile_files[safetensors-some]",
    ),
]  # fmt: skip
