"""The performance goals, and which of them are met.

A target is a ratio to the fastest peer of the same run, a share of a limit measured in the same
run, or an absolute value: a time, a rate, tokens per second, memory. The GPU goals are for one H200
in bfloat16. The CPU goals are for AVX-512, except decoding, which is for any CPU.
"""

from dataclasses import dataclass, field

from bench.result import is_ours

BEST = ()  # whichever peer is the fastest
NAMES = {BEST: "best peer", ("whole",): "bfloat16 weights"}  # other peers keep their names


@dataclass(frozen=True)
class Goal:
    """One operation, pass, dtype and shape on one kind of device, and its targets."""

    op: str
    step: str
    dtype: str
    shape: dict
    device: str  # "h200", "avx512", or "cpu" for any
    threads: int | None = None  # CPU only
    contender: str = ""  # which of ours is judged; empty: the fastest
    ratios: dict = field(default_factory=dict)  # peers (BEST: all) -> least speedup
    share: float | None = None  # least percent of the limit
    rate: float | None = None  # least TFLOP/s
    ms: float | None = None  # largest time
    details: dict = field(default_factory=dict)  # name -> least value in a result's `details`
    memory: float | None = None  # largest peak in bytes, beyond the inputs
    unmeasured: str = ""  # a target that no script measures


def gpu(op, step, shape, **targets) -> Goal:
    return Goal(op, step, "bfloat16", shape, "h200", **targets)


def attention(B, T, H=12) -> dict:
    return {"B": B, "T": T, "H": H, "D": 64}


def cpu(op, step, dtype, shape, ratio, threads=1) -> Goal:
    return Goal(op, step, dtype, shape, "avx512", threads, ratios={BEST: ratio})


ROWS = {"N": 65536, "C": 768}
HIDDEN = {"N": 65536, "C": 3072}
LOGITS = {"N": 8192, "V": 50257, "C": 768}
# T -> (B, TFLOP/s, speedup over the best peer)
FORWARD = {512: (32, 300, 1.3), 1024: (16, 400, 1.35), 2048: (8, 470, 1.25), 4096: (4, 520, 1.2),
           8192: (2, 550, 1.1)}  # fmt: skip
BACKWARD = {1024: (16, 320, 1.1), 2048: (8, 400, 1.05), 4096: (4, 450, 1.02),
            8192: (2, 490, 1.02)}  # fmt: skip

GPU = [
    *(gpu("causal_attention", "forward", attention(B, T), rate=rate, ratios={BEST: ratio})
      for T, (B, rate, ratio) in FORWARD.items()),
    *(gpu("causal_attention", "backward", attention(B, T), rate=rate, ratios={BEST: ratio})
      for T, (B, rate, ratio) in BACKWARD.items()),
    gpu("layer_norm", "forward", ROWS, ms=0.049, ratios={BEST: 1.1}, share=95),
    gpu("layer_norm", "backward", ROWS, ms=0.080, ratios={BEST: 1.6}, share=88),
    gpu("add_layer_norm", "backward", ROWS, ms=0.106, ratios={BEST: 1.6}, share=88),
    gpu("gelu", "forward", HIDDEN, ratios={BEST: 1}, share=97),
    gpu("gelu", "backward", HIDDEN, ratios={BEST: 1}, share=97),
    gpu("bias_gelu", "backward", HIDDEN, share=90),
    gpu("cross_entropy", "forward+backward", LOGITS, ratios={BEST: 2},
        unmeasured="in place: ≥ 90 % of the copy"),
    gpu("linear_cross_entropy", "forward+backward", LOGITS, ms=3.3, ratios={BEST: 1.35},
        memory=LOGITS["N"] * LOGITS["V"] * 2 / 8),
    gpu("train_step", "step", {"B": 64, "T": 1024}, ratios={BEST: 1.3},
        details={"tokens_per_s": 600e3, "largest_batch": 600}),
    gpu("train_step", "step", {"B": 4, "T": 1024}, contender="fast", ratios={("plain",): 1}),
    gpu("train_step", "step", {"B": 4, "T": 1024}, ms=9, ratios={BEST: 1.25}),
    gpu("train_step_xl", "step", {"T": 1024}, ratios={BEST: 1.2}, unmeasured="≥ 55,000 tokens/s"),
    gpu("generate", "decode", {"B": 1, "P": 16}, ratios={BEST: 3},
        details={"tokens_per_s": 5000}),
]  # fmt: skip

# (B, T, H) -> speedups of forward and backward in float32
ON_CPU = {(4, 64, 12): (2.4, 2.5), (4, 256, 12): (2.4, 2.2), (1, 1024, 12): (1.9, 1.8),
          (1, 4096, 4): (1.5, 1.4)}  # fmt: skip
CPU = [
    *(cpu("causal_attention", step, "float32", attention(*shape), ratios[i])
      for shape, ratios in ON_CPU.items() for i, step in enumerate(("forward", "backward"))),
    *(cpu("causal_attention", step, "bfloat16", attention(*shape), 2.5)
      for shape in ON_CPU for step in ("forward", "backward")),
    cpu("gelu", "forward", "float32", {"N": 2048, "C": 3072}, 4),
    cpu("gelu", "backward", "float32", {"N": 2048, "C": 3072}, 4),
    cpu("layer_norm", "forward", "float32", {"N": 2048, "C": 768}, 1.3),
    cpu("layer_norm", "backward", "float32", {"N": 2048, "C": 768}, 1.5),
    cpu("cross_entropy", "forward+backward", "float32", {"N": 256, "V": 50257, "C": 768}, 3),
    cpu("train_step", "step", "float32", {"B": 1, "T": 1024}, 1.25, threads=2),
    cpu("train_step", "step", "bfloat16", {"B": 1, "T": 1024}, 1.5, threads=2),
    Goal("generate", "decode", "bfloat16", {"B": 1, "P": 16}, "cpu", 2, share=60,
         ratios={("transformers",): 2}),
    Goal("generate_int8", "decode", "bfloat16", {"B": 1, "P": 16}, "cpu", 2,
         ratios={("whole",): 1.5}),
]  # fmt: skip
GOALS = [*GPU, *CPU]


@dataclass(frozen=True)
class Verdict:
    """A goal and its newest measurement: our result and the best peer's, None if not measured.
    missed: targets that were not reached; unknown: targets that were not measured."""

    goal: Goal
    ours: dict | None = None
    best: dict | None = None
    missed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def met(self) -> str:
        if self.ours is None:
            return "not measured"
        if self.missed:
            return f"no: {', '.join(self.missed)}"
        return f"open: {', '.join(self.unknown)}" if self.unknown else "yes"


def targets(goal: Goal) -> list[str]:
    """All targets of the goal as text, in the order in which judged() tests them."""
    words = [
        f"≥ {ratio:g}× {NAMES.get(peers, ' or '.join(peers))}"
        for peers, ratio in goal.ratios.items()
    ]
    if goal.share:
        words.append(f"≥ {goal.share:g} % of limit")
    if goal.rate:
        words.append(f"≥ {goal.rate:g} TFLOP/s")
    if goal.ms:
        words.append(f"≤ {goal.ms:g} ms" if goal.ms >= 1 else f"≤ {goal.ms * 1e3:g} µs")
    words += [f"≥ {least:,.0f} {name.replace('_per_', '/').replace('_', ' ')}"
              for name, least in goal.details.items()]  # fmt: skip
    if goal.memory:
        words.append(f"≤ {goal.memory / 2**20:.0f} MiB")
    return [*words, *([goal.unmeasured] if goal.unmeasured else [])]


def judged(goal: Goal, documents: list[dict]) -> Verdict:
    """Compares the goal with the newest document that has its case."""
    found = [d for d in documents if matches(goal, d["environment"]) and cases(goal, d)["backend"]]
    if not found:
        return Verdict(goal)
    mine = cases(goal, max(found, key=lambda d: d["environment"]["date"]))
    ours = min(mine["backend"], key=ms_of)
    best = min(mine["peer"], key=ms_of, default=None)
    reached = []  # True, False, or None: not measured
    for names, ratio in goal.ratios.items():
        against = [r for r in mine["peer"] if not names or r["contender"] in names]
        rival = min(map(ms_of, against), default=None)
        reached.append(None if rival is None else rival / ours["median_ms"] >= ratio)
    if goal.share:
        reached.append(ours["percent_of_limit"] >= goal.share)
    if goal.rate:
        reached.append(ours["rate"] >= goal.rate)
    if goal.ms:
        reached.append(ours["median_ms"] <= goal.ms)
    for name, least in goal.details.items():
        value = ours.get("details", {}).get(name)
        reached.append(None if value is None else value >= least)
    if goal.memory:
        peak = ours["peak_memory_bytes"]
        reached.append(None if peak is None else peak <= goal.memory)
    if goal.unmeasured:
        reached.append(None)
    words = list(zip(targets(goal), reached, strict=True))
    missed, unknown = (tuple(w for w, r in words if r is state) for state in (False, None))
    return Verdict(goal, ours, best, missed, unknown)


def matches(goal: Goal, about: dict) -> bool:
    """Whether the goal is for this machine."""
    if goal.threads is not None:
        able = goal.device == "cpu" or "AVX512" in about.get("cpu_capability", "")
        return able and about["threads"] == goal.threads
    return goal.device in about["device_name"].lower()


def cases(goal: Goal, document: dict) -> dict[str, list[dict]]:
    """kind -> timed results of the goal's case; of ours only those that the goal judges."""
    rows = [
        r for r in document["results"]
        if r["status"] == "ok" and (r["op"], r["step"], r["dtype"], r["shape"])
        == (goal.op, goal.step, goal.dtype, goal.shape)
    ]  # fmt: skip
    ours = [r for r in rows if is_ours(r) and goal.contender in ("", r["contender"])]
    return {"backend": ours, "peer": [r for r in rows if r["kind"] == "peer"]}


def ms_of(row: dict) -> float:
    return row["median_ms"]
