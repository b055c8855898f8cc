"""Generation with GPT-2: a prompt is read, then tokens come one by one; ours against its peers.

    python benchmarks/generate.py --device cpu --dtype bfloat16 --shapes 1x16
    python benchmarks/generate.py --models gpt2,gpt2-xl       # 124 million and 1.6 billion weights

Shapes are BxP: sequences, and tokens of the prompt of each. All models have the same random weights
and choose greedily. Two passes are timed: prefill, from the prompt to its first token; and decode,
a step that gives every sequence one more, from whole calls: with --tokens N, (time of N tokens -
time of 1) / (N - 1). A step is given as a share of what reading the weights and the cache once
would take, at the best rate at which the same run reads a large tensor.

generate_int8 is the same model with int8 weights, beside its own whole ones and CTranslate2's int8.
plain has no cache; compiled is transformers with a static cache and torch.compile; onnxruntime is
the graph that Hugging Face's optimum exports. Peak memory is what a call takes beyond the weights.

What a contender chose is checked with the plain model in float32, over its own tokens: a choice may
be short of the likeliest by no more than rounding explains.
"""

import argparse
import contextlib
import functools
import sys

import harness
import torch
from clock import FLOP, READ, Clock, Work, peak_memory
from contest import contest, rehearse, released
from generators import BACKENDS, COMPILED, INT8, PEERS, WHOLE, Makers, why_not
from harness import Contender, Wrong
from record import Case, Record

from gpt2 import Config, Model, generation

DIMS = "BxP"
SHAPES = {"cpu": "1x16,1x512,8x16", "cuda": "1x16,1x512,8x16,8x512,64x16,64x512"}
CHECKED = 2  # sequences
PREFILL, DECODE = "prefill", "decode"


def shortfall(truth: Model, prompts, tokens) -> tuple[float, float]:
    """The most by which a chosen logit was below the largest, and the largest there was: of the
    first sequences, by the plain model over the tokens that were chosen."""
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
    """Every contender at one shape: its choices checked, then both passes timed."""
    if name not in chosen:
        return None
    case = Case(op, vars(shape), str(dtype).removeprefix("torch."), (PREFILL, DECODE))
    torch.compiler.reset()
    torch.manual_seed(0)
    device, config = clock.device, Config.named(name)
    plain = Model(config).to(dtype)  # the weights of all are rounded alike
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

    contest(record, case, wanted, clock, limit, work, check, timed)
    truth.clear()
    released(device)
    return case


def per_second(tokens: int, times: dict) -> float:
    return tokens / times["median_ms"] * 1e3


def bytes_of_a_step(config: Config, name: str, dtype: torch.dtype, lengths: list[int]) -> int:
    """What a step must read; of an int8 matrix (N, K), N K bytes and N scales in float32."""
    with torch.device("meta"):
        model = Model(config).to(dtype)
    least = generation.step_bytes(model, lengths)
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
