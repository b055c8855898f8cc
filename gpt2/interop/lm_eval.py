"""Our models for EleutherAI's lm-evaluation-harness, so that all of its tasks run on them.

    pip install "gpt2-kernels[eval]"
    python -m gpt2.interop.lm_eval run \\
        --model gpt2_kernels --model_args pretrained=gpt2 --tasks hellaswag

is the harness's own command with this model added. From Python, import this module, or pass a
KernelsLM to simple_evaluate. Scoring follows the harness's adapter for transformers: the same
windows, `<|endoftext|>` for an empty context, and contexts cut on the left.
"""

import itertools
import math
import sys
from collections.abc import Sequence

import torch

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows
except ImportError as e:
    missing = f'lm-evaluation-harness is needed ({e}): pip install "gpt2-kernels[eval]"'
    if __name__ != "__main__":
        raise ImportError(missing) from e
    print(f"gpt2: error: {missing}", file=sys.stderr)
    sys.exit(2)
from tqdm import tqdm

from .. import bars, loading
from ..data.tokenizer import EOT, Tokenizer
from ..device import pick_device, pick_dtype
from ..errors import InputError, NonFiniteError
from ..evaluate.scoring import Scores, Window, score_all
from ..generate import decoding, sampling
from ..generate.decoding import Sampling
from ..generate.quantize import quantize_int8
from ..model import Model


@register_model("gpt2_kernels")
class KernelsLM(TemplateLM):
    """A model for the harness: pretrained is a model that `gpt2 eval` accepts, or a Model together
    with its Tokenizer.

    dtype is auto, float32 or bfloat16; quantize is int8 or None. Raises InputError, naming the
    argument, if one is invalid.
    """

    max_gen_toks = 256  # if a task does not set it

    def __init__(
        self,
        pretrained: str | Model,
        tokenizer: str | Tokenizer | None = None,
        *,
        tokenizer_dir: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        quantize: str | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,  # ignored: for batch_size auto, which is not supported
    ):
        super().__init__()
        if quantize not in (None, "int8"):
            raise InputError(f"quantize must be int8 or absent, got {quantize!r}")
        if isinstance(pretrained, Model):
            if not isinstance(tokenizer, Tokenizer):
                raise InputError(f"tokenizer must be the model's Tokenizer, got {tokenizer!r}")
            self.model, self.text = pretrained, tokenizer
        else:
            where = pick_device(_present(device))
            self.model, self.text = loading.load(
                pretrained,
                device=where,
                dtype=pick_dtype(dtype, where),
                tokenizer=tokenizer,
                tokenizer_dir=tokenizer_dir,
            )
        if quantize:
            quantize_int8(self.model)
        self.batch_size = _number("batch_size", batch_size or 8, None)
        block_size = self.model.config.block_size
        self.max_length = _number("max_length", max_length or block_size, block_size)
        self._device = self.model.transformer["wte"].weight.device

    @property
    def eot_token_id(self) -> int | None:
        return self.text.eot

    @property
    def prefix_token_id(self) -> int:
        if self.text.eot is None:
            raise InputError(f"tokenizer must have {EOT}, which stands for an empty context")
        return self.text.eot

    @property
    def tokenizer_name(self) -> str:
        return f"gpt2_kernels-{self.text.name}-{self.text.vocab_size}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """The ids of string. `<|endoftext|>` becomes its token, as in transformers' tokenizers."""
        return self.text.encode(string, special=True).tolist()

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self.text.decode(tokens)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p of each text, given `<|endoftext|>`, computed over the harness's windows."""
        windows, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            for inputs, scored in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append(Window([*inputs, scored[-1]], len(scored)))
                owners.append(i)
        results = [0.0] * len(requests)
        with _bar(windows, disable_tqdm) as bar:
            scores = score_all(self.model, windows, self.batch_size, bar.update)
        for i, found in zip(owners, scores, strict=True):
            results[i] += _log_p(found)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """log p of the continuation in each (texts, context, continuation), and whether each of its
        tokens is the likeliest."""
        windows = []
        for _, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise InputError(
                    f"a continuation must be 1 to max_length {self.max_length} tokens, "
                    f"got {len(continuation)}"
                )
            ids = [*context, *continuation][-self.max_length - 1 :]
            windows.append(Window(ids, len(continuation)))
        with _bar(windows, disable_tqdm) as bar:
            scores = score_all(self.model, windows, self.batch_size, bar.update)
        results = [(_log_p(s), bool(s.greedy.all())) for s in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to a string in `until`, `<|endoftext|>` or max_gen_toks tokens.
        A context is cut on the left so that max_gen_toks tokens fit after it."""
        prompts = [self.tok_encode(r.args[0]) or [self.prefix_token_id] for r in requests]
        options = [repr(sorted(r.args[1].items())) for r in requests]
        results: list[str] = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (options[i], -len(prompts[i])))
        with _bar(requests, disable_tqdm) as bar:
            for _, group in itertools.groupby(order, key=options.__getitem__):
                group = list(group)
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    texts = self._generate([prompts[i] for i in batch], requests[batch[0]].args[1])
                    for i, text in zip(batch, texts, strict=True):
                        results[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return results

    def _generate(self, prompts: list[list[int]], options: dict) -> list[str]:
        """The continuations of prompts that share the same options."""
        options = normalize_gen_kwargs(options, self.max_gen_toks)
        until = handle_stop_sequences(options.pop("until"), eos=None)
        n, how = options.pop("max_gen_toks"), _sampling(options)
        if n >= self.max_length:
            raise InputError(f"max_gen_toks must be below max_length {self.max_length}, got {n}")
        prompts = [prompt[-(self.max_length - n) :] for prompt in prompts]
        ids: list[list[int]] = [[] for _ in prompts]

        def ended() -> list[bool]:
            texts = map(self.tok_decode, ids)
            return [any(stop in text for stop in until if stop) for text in texts]

        stop = () if self.text.eot is None else (self.text.eot,)
        steps = decoding.tokens(self.model, prompts, n, how, stop=stop, ended=ended)
        for number, step in enumerate(steps, 1):
            step = step.tolist()
            sampling.check_step(step, number)
            for row, token in zip(ids, step, strict=True):
                if token >= 0 and token != self.text.eot:
                    row.append(token)
        return [postprocess_generated_text(self.tok_decode(row), until, None) for row in ids]


def _present(device: str | None) -> str:
    """The device to use. The harness's default is cuda:0, also on a machine without a GPU; that
    becomes auto."""
    if device == "cuda:0" and not torch.cuda.is_available():
        return "auto"
    return device or "auto"


def _log_p(scores: Scores) -> float:
    """log p of all scored tokens together. Raises NonFiniteError if it is not finite."""
    log_p = -scores.losses.sum().item()
    if not math.isfinite(log_p):
        raise NonFiniteError(f"the log-probability of a continuation is {log_p}")
    return log_p


def _sampling(options: dict) -> Sampling:
    """The Sampling for the harness's do_sample, temperature, top_k and top_p. Raises InputError for
    any other option."""
    sample = options.pop("do_sample")
    found = {name: options.pop(name, None) for name in ("temperature", "top_k", "top_p")}
    if options:
        raise InputError(f"generation has no option {next(iter(options))!r}")
    if not sample:
        return Sampling(0.0)
    return Sampling(found.pop("temperature") or 0.0, **found)


def _number(name: str, value: int | str, most: int | None) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1 or (most is not None and number > most):
        expected = "at least 1" if most is None else f"1 to {most}"
        raise InputError(f"{name} must be {expected}, got {value!r}")
    return number


def _bar(things: Sequence, hidden: bool) -> tqdm:
    return bars.bar(total=len(things), desc="gpt2_kernels", disable=hidden, delay=1)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (InputError, NonFiniteError) as e:  # printed in the same form as by gpt2's commands
        print(f"gpt2: error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, InputError) else 1)
