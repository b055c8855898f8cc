"""Text generators: GPT-2 with our kernels and its peers, all with the same weights."""

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import models
from gpt2 import Model
from gpt2.generate.quantize import quantize_int8

WHOLE = ["fast", "plain", "transformers", "transformers-static", "compiled", "ctranslate2",
         "onnxruntime"]  # fmt: skip
INT8 = ["fast-int8", "whole", "ctranslate2-int8"]  # whole is fast without int8
BACKENDS = ["fast", "fast-int8"]
COMPILED = ["transformers-static", "compiled"]  # transformers compiles if its cache is static
PEERS = [name for name in (*WHOLE, *INT8) if name not in BACKENDS]


class Makers:
    """Makes functions generate(prompts (B, P), n) -> (B, n). A model that several of them use is
    made once, at its first use."""

    def __init__(self, weights: Model, device: torch.device, dtype: torch.dtype):
        self.weights, self.device, self.dtype = weights, device, dtype

    def by_name(self, name: str) -> Callable:
        return getattr(self, name.replace("-", "_"))

    @functools.cached_property
    def ours(self) -> Model:
        return self._copy().eval()

    @functools.cached_property
    def theirs(self):
        model = models.transformers(self.weights).to(self.device, self.dtype).eval()
        model.config.use_cache = True
        model.generation_config.eos_token_id = None
        return model

    def _copy(self) -> Model:
        return copy.deepcopy(self.weights).to(self.device, self.dtype)

    def fast(self):
        return functools.partial(_ours, self.ours, True)

    whole = fast

    def plain(self):
        return functools.partial(_ours, self.ours, False)

    def fast_int8(self):
        return functools.partial(_ours, quantize_int8(self._copy()).eval(), True)

    def transformers(self):
        return functools.partial(_theirs, self.theirs)

    def transformers_static(self):
        return functools.partial(_theirs, self.theirs, cache_implementation="static")

    def compiled(self):
        """A static cache and torch.compile, combined as transformers' documentation does."""
        model = models.transformers(self.weights).to(self.device, self.dtype).eval()
        model.generation_config.eos_token_id = None
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        model.forward = torch.compile(model.forward, mode=mode, fullgraph=True)
        return functools.partial(_theirs, model, cache_implementation="static")

    def ctranslate2(self, compute_type: str | None = None):
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        name = str(self.dtype).removeprefix("torch.")
        names = [f"token{i}" for i in range(self.weights.config.vocab_size)]

        class Converter(TransformersConverter):
            def load_tokenizer(self, *args, **kwargs):
                vocabulary = {name: i for i, name in enumerate(names)}
                return SimpleNamespace(get_vocab=lambda: vocabulary, bos_token=names[0],
                                       eos_token=names[-1], unk_token=names[0])  # fmt: skip

        with tempfile.TemporaryDirectory() as folder:
            self.weights.save_pretrained(Path(folder) / "hf")
            Converter(str(Path(folder) / "hf")).convert(str(Path(folder) / "ct2"))
            generator = ctranslate2.Generator(
                str(Path(folder) / "ct2"), device=self.device.type,
                compute_type=compute_type or name, inter_threads=1,
                intra_threads=torch.get_num_threads(),
            )  # fmt: skip
        if compute_type is None and generator.compute_type != name:
            raise RuntimeError(f"computes in {generator.compute_type}, not in {name}")

        def generate(prompts, n):
            tokens = [[names[i] for i in row] for row in prompts.tolist()]
            results = generator.generate_batch(tokens, max_length=n, min_length=n,
                                               include_prompt_in_result=False)  # fmt: skip
            return torch.tensor([r.sequences_ids[0] for r in results])

        return generate

    def ctranslate2_int8(self):
        return self.ctranslate2("int8")

    def onnxruntime(self):
        """ONNX Runtime with a cache, exported and run by Hugging Face's optimum."""
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            self.weights.save_pretrained(Path(folder) / "hf")
            model = ORTModelForCausalLM.from_pretrained(
                Path(folder) / "hf", export=True, use_cache=True, session_options=options
            )
        model.generation_config.eos_token_id = None
        return functools.partial(_theirs, model)


def _ours(model, fast, prompts, n):
    model.fast = fast
    return model.generate(prompts, n, temperature=0.0)[:, prompts.shape[1] :]


def _theirs(model, prompts, n, **options):
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, do_sample=False,
        pad_token_id=0, **options,
    )[:, prompts.shape[1] :]  # fmt: skip


def why_not(name: str, shape, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == "plain" and device.type == "cpu" and shape.P > 64:
        return "without a cache each token takes as long as the prompt"
    if name.startswith("ctranslate2") and not importlib.util.find_spec("ctranslate2"):
        return "ctranslate2 is not installed"
    if name == "onnxruntime":
        if device.type != "cpu" or dtype != torch.float32:
            return "its graph is exported in float32, for a CPU"
        missing = [m for m in ("onnxruntime", "optimum") if not importlib.util.find_spec(m)]
        if missing:
            return f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed"
    return None
