"""Generation with GPT-2, prefill and decoding, against other implementations.

    python benchmarks/generate.py --device cpu --dtype bfloat16 --shapes 1x16
    python benchmarks/generate.py --models gpt2,gpt2-xl     # 124 million and 1.6 billion parameters

Shapes are BxP: sequences, and prompt tokens per sequence. All models have the same random weights
and choose greedily. Two passes are timed: prefill, from the prompt to its first token; and decode,
one more token for every sequence. Decode is computed from whole calls: with --tokens N, it is
(time of N tokens - time of 1) / (N - 1). The limit of a decode step is the time to read the weights
and the cache once, at the highest rate at which the same run reads a large tensor.

generate_int8 compares our int8 weights with our unquantized weights and with CTranslate2's int8.
plain has no cache; compiled is transformers with a static cache and torch.compile; onnxruntime is
the graph that Hugging Face's optimum exports. Peak memory is what a call takes beyond the weights.

The plain model in float32 checks the tokens that each contender chose: the logit of a chosen token
may be below the largest by no more than rounding explains.
"""

import argparse
import contextlib
import functools
import sys

import torch
from bench import harness
from bench.clock import FLOP, READ, Clock, Work, peak_memory
from bench.contenders import check_and_time, rehearse, released
from bench.generators import BACKENDS, COMPILED, INT8, PEERS, WHOLE, Makers, why_not
from bench.harness import Contender, Wrong
from bench.result_file import Case, Record

from gpt2 import Config, Model
from gpt2.generate import decoding

DIMS = "BxP"
SHAPES = {"cpu": "1x16,1x512,8x16", "cuda": "1x16,1x512,8x16,8x512,64x16,64x512"}
CHECKED = 2  # sequences
PREFILL, DECODE = "prefill", "decode"


def shortfall(truth: Model, prompts, tokens) -> tuple[float, float]:
    """Returns the most by which a chosen token's logit was below the largest logit, and the largest
    magnitude of a logit. The plain model judges the first CHECKED sequences."""
    prompts, tokens = prompts[:CHECKED], tokens[:CHECKED].to(prompts.device)
    whole = torch.cat([prompts, tokens], dim=1)
    with torch.no_grad():
        h = truth.hidden(whole[:, :-1])[:, prompts.shape[1] - 1 :]
        logits = truth.logits_of(h).float()  # (B, n, V)
    chosen = logits.gather(2, tokens[..., None])[..., 0]
    return (logits.amax(-1) - chosen).max().item(), logits.abs().max().item()


def measure(
    op: str,
    name: str,
    contenders: list[str],
    shape,
    dtype,
    clock: Clock,
    limit: dict,
    record: Record,
    chosen: list[str],
    tokens: int,
) -> Case | None:
    """Checks every contender's tokens at one shape, then times both passes."""
    if name not in chosen:
        return None
    case = Case(op, vars(shape), str(dtype).removeprefix("torch."), (PREFILL, DECODE))
    torch.compiler.reset()
    torch.manual_seed(0)
    device, config = clock.device, Config.named(name)
    plain = Model(config).to(dtype)  # rounds the weights of all contenders alike
    make = Makers(plain, device, dtype)
    wanted = record.wanted(case, [
        Contender(c, make.by_name(c), kind="backend" if c in BACKENDS else "peer",
                  why_not=why_not(c, shape, device, dtype), compiles=c in COMPILED)
        for c in contenders
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (shape.B, shape.P), generator=generator).to(device)
    runs, truth = {}, []
    if record.rehearsal:
        rehearse(wanted, lambda contender: contender.call()(prompts, tokens), device)
        return None

    def check(contender):
        if not truth:
            truth.append(Model(config).to(device).eval())
            truth[0].load_state_dict(plain.state_dict())
        run = contender.call()
        found = run(prompts, tokens)
        if found.shape != (shape.B, tokens):
            raise Wrong(f"gave {tuple(found.shape)} tokens, not {(shape.B, tokens)}")
        short, largest = shortfall(truth[0], prompts, found)
        rounding = torch.bfloat16 if "int8" in contender.name else dtype
        if not short <= 16 * torch.finfo(rounding).eps * largest:
            raise Wrong(f"a token was {short:.2e} below the likeliest")
        runs[contender] = run
        return short

    def timed(step, group):
        def calls(n):
            return {
                (c, n): (lambda c=c: runs[c](prompts, n), contextlib.nullcontext) for c in group
            }

        times = clock(calls(1) | (calls(tokens) if step == DECODE else {}))
        found = {}
        for c in group:
            first = times[c, 1]
            if step == PREFILL:
                found[c] = first | {
                    "details": {"tokens_per_s": per_second(shape.B * shape.P, first)}
                }
            else:
                ms = {
                    key: (value - first["median_ms"]) / (tokens - 1)
                    for key, value in times[c, tokens].items()
                }
                found[c] = ms | {"details": {"tokens_per_s": per_second(shape.B, ms)}}
            n = tokens if step == DECODE else 1
            found[c]["peak_memory_bytes"] = peak_memory(
                lambda c=c, n=n: runs[c](prompts, n), device
            )
            if step == DECODE and device.type == "cuda":
                runs.pop(c)
        return found

    def work(step, contender):
        if step == PREFILL:
            return Work(plain.flops_per_token(shape.P) / 3 * shape.B * shape.P, FLOP)
        lengths = [shape.P + tokens // 2] * shape.B
        return Work(bytes_of_a_step(config, contender.name, dtype, lengths), READ)

    check_and_time(record, case, wanted, clock, limit, work, check, timed)
    truth.clear()
    released(device)
    return case


def per_second(tokens: int, times: dict) -> float:
    return tokens / times["median_ms"] * 1e3


def bytes_of_a_step(config: Config, name: str, dtype: torch.dtype, lengths: list[int]) -> int:
    """Bytes that a step must read. An int8 matrix (N, K) has N K bytes and N scales in float32."""
    with torch.device("meta"):
        model = Model(config).to(dtype)
    least = decoding.step_bytes(model, lengths)
    if "int8" in name:
        matrices = {p for n, p in model.named_parameters() if p.dim() == 2 and "wpe" not in n}
        least -= sum(p.nbytes - p.numel() - 4 * len(p) for p in matrices)
    return least


def more(parser) -> None:
    parser.add_argument("--tokens", type=at_least_2, default=33, metavar="N", help="default: 33")
    parser.add_argument(
        "--models", type=lambda text: text.split(","), dest="chosen", metavar="NAME,...",
        default=["gpt2"] if not torch.cuda.is_available() else ["gpt2", "gpt2-xl"],
        help="gpt2, gpt2-xl [default: both on a GPU, gpt2 on a CPU]",
    )  # fmt: skip


def at_least_2(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 1")
    return int(text)


CASES = [
    functools.partial(measure, f"generate{of}{kind}", name, contenders)
    for of, name in (("", "gpt2"), ("_xl", "gpt2-xl"))
    for kind, contenders in (("", WHOLE), ("_int8", INT8))
]

if __name__ == "__main__":
    sys.exit(harness.run("generate", CASES, BACKENDS, PEERS, doc=__doc__, dims=DIMS, shapes=SHAPES,
                         more=more, own=("chosen", "tokens")))  # fmt: skip
