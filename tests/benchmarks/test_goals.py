"""Goals and profiles: met, missed and not measured are distinguished, never guessed."""

import pytest
import table
import torch
import train_step
from bench import (
    options,
    result_file,
    step_profile,
)
from bench.report import (
    goals,
    plots,
)
from bench.run import plan

NORM = {"N": 65536, "C": 768}
GOAL = goals.gpu("layer_norm", "backward", NORM, ms=0.078, share=90,
                 ratios={("eager",): 3, ("compiled", "formula-compiled"): 1.3})  # fmt: skip
OR = "compiled or formula-compiled"


def row(contender, ms, kind="peer", **changes):
    return {
        "op": "layer_norm", "step": "backward", "dtype": "bfloat16", "shape": NORM,
        "contender": contender, "kind": kind, "status": "ok", "reason": None, "median_ms": ms,
        "rate": 4000.0, "unit": "GB/s", "percent_of_limit": 93.0, "peak_memory_bytes": None,
        **changes,
    }  # fmt: skip


def document(*rows, date="2026-01-02", device="NVIDIA H200", threads=None, capability="AVX512"):
    about = {"device_name": device, "threads": threads, "cpu_capability": capability, "date": date}
    return {"script": "layer_norm", "environment": about | {"torch": "2"}, "results": list(rows)}


def met(*rows, goal=GOAL, **about):
    return goals.judged(goal, [document(*rows, **about)]).met()


def test_a_goal_is_met_where_every_target_is():
    ours = row("triton", 0.070, "backend")
    slow = row("cuda", 0.200, "backend", percent_of_limit=30.0)  # our fastest counts
    peers = row("eager", 0.300), row("compiled", 0.100), row("formula-compiled", 0.095)
    assert met(slow, ours, *peers) == "yes"
    assert met(slow, *peers).startswith(f"no: ≥ 3× eager, ≥ 1.3× {OR}, ≥ 90 % of limit")
    # the best of the compiled ones; 0.100 / 0.070 would pass
    assert met(ours, *peers[:2], row("formula-compiled", 0.090)) == f"no: ≥ 1.3× {OR}"
    assert met(row("triton", 0.079, "backend"), *peers) == f"no: ≥ 1.3× {OR}, ≤ 78 µs"
    assert met(ours | {"percent_of_limit": 89.0}, *peers) == "no: ≥ 90 % of limit"
    fallback = row("reference", 0.010, "backend")  # plain PyTorch, and cuDNN on a GPU: not ours
    assert met(slow, fallback, *peers) == met(slow, *peers)


def test_what_was_not_measured_is_open():
    ours = row("triton", 0.070, "backend")
    assert met(ours, row("eager", 0.300)) == f"open: ≥ 1.3× {OR}"
    assert met(row("eager", 0.300)) == "not measured"
    assert met(ours, row("eager", 0.3), device="NVIDIA H100 80GB HBM3") == "not measured"
    assert met(ours | {"status": "wrong"}, row("eager", 0.3)) == "not measured"
    assert met(ours | {"dtype": "float32"}, row("eager", 0.3)) == "not measured"
    assert met(ours | {"shape": {"N": 1, "C": 768}}, row("eager", 0.3)) == "not measured"


def test_details_and_memory():
    goal = goals.gpu("layer_norm", "backward", NORM, details={"tokens_per_s": 600e3}, memory=100)
    ours = row("fast", 1.0, "backend", peak_memory_bytes=100, details={"tokens_per_s": 6e5})
    assert met(ours, goal=goal) == "yes"
    assert met(ours | {"peak_memory_bytes": 101}, goal=goal).startswith("no: ≤ 0 MiB")
    assert met(ours | {"details": {}}, goal=goal) == "open: ≥ 600,000 tokens/s"


def test_a_goal_may_judge_one_of_ours():
    """If a CUDA graph makes the fast step, the eager step still has its own goal."""
    goal = goals.gpu("layer_norm", "backward", NORM, contender="fast", ratios={("plain",): 1})
    rows = row("fast", 2.0, "backend"), row("fast-graph", 1.0, "backend"), row("plain", 1.5)
    assert met(*rows, goal=goal) == "no: ≥ 1× plain"
    assert met(*rows[1:], goal=goal) == "not measured"
    assert met(row("fast", 1.4, "backend"), *rows[1:], goal=goal) == "yes"
    whole = goals.gpu("layer_norm", "backward", NORM, ms=1.2, ratios={goals.BEST: 1.5})
    assert met(*rows, goal=whole) == "yes"
    assert goals.targets(whole) == ["≥ 1.5× best peer", "≤ 1.2 ms"]


def test_goals_for_cpus_have_their_threads():
    goal = goals.cpu("layer_norm", "backward", "bfloat16", NORM, 1.5)
    rows = row("cpu", 1.0, "backend"), row("eager", 1.6)
    assert met(*rows, goal=goal, device="AMD EPYC", threads=1) == "yes"
    assert met(*rows, goal=goal, device="AMD EPYC", threads=2) == "not measured"
    assert met(*rows, goal=goal, threads=1, capability="AVX2") == "not measured"


def test_the_newest_measurement_counts():
    old = document(row("triton", 0.070, "backend"), row("eager", 1.0), date="2026-01-01")
    new = document(row("triton", 0.090, "backend"), row("eager", 1.0), date="2026-01-03")
    for documents in ([old, new], [new, old]):
        assert goals.judged(GOAL, documents).ours["median_ms"] == 0.090


def test_table_has_a_line_per_goal():
    ours, peer = row("triton", 0.070, "backend"), row("eager", 0.300)
    lines = table.goal_table([document(ours, peer)]).splitlines()
    assert len(lines) == 2 + len(goals.GOALS)
    mine = next(line for line in lines if line.startswith("| layer_norm | backward | bfloat16"))
    assert "| 0.0700 ms, 4000 GB/s | eager | 4.29× | 93 % | yes |" in mine
    others = [line for line in lines[2:] if line != mine]
    assert all("| not measured |" in line for line in others)
    assert sum(line.startswith("| train_step, fast | step |") for line in lines) == 1


def test_a_whole_run_measures_the_goals():
    """The goals' shapes are among those of run_all.py; goals without a script are marked so."""
    for goal in goals.GOALS:
        name = goal.op.replace("causal_", "").replace("add_", "").replace("linear_cross", "cross")
        name = name.removeprefix("bias_").removesuffix("_int8")
        benches = plan.ON_GPU if goal.device == "h200" else plan.ON_CPU
        mine = [b for b in benches if (b.script, b.dtype) == (name, goal.dtype)]
        if not mine:
            assert goal.unmeasured, goal
            continue
        script = __import__(name)
        chosen = mine[0].shapes or script.SHAPES["cuda"]
        shapes = [vars(options.parse_shape(text, script.DIMS)) for text in chosen.split(",")]
        assert goal.shape in shapes, goal


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_attn_bwd_dkdv_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("_layer_norm_bwd_kernel", "norms"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate", "norms"),
        ("triton_red_fused_add_native_layer_norm_3", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "GELU"),
        ("triton_poi_fused_add_mul_pow_tanh_9", "GELU"),
        ("_cross_entropy_fwd_kernel", "loss"),
        ("void (anonymous namespace)::cunn_SoftMaxForward<LogSoftMax>", "loss"),
        ("void multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("void at::native::elementwise_kernel<128, 2, copy>", "other"),
    ],
)
def test_parts_of_a_step(name, part):
    assert step_profile.part_of(name) == part


def test_gaps_are_when_no_kernel_runs():
    """Two streams overlap; an annotation on the GPU is not a kernel."""

    def event(name, start, duration, category="kernel"):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    parts = step_profile.of_trace([
        event("Optimizer.step#AdamW.step", 0, 1000, "gpu_user_annotation"),
        event("aten::mm", 0, 1000, "cpu_op"),
        event("nvjet_a", 100, 50),
        event("_attn_fwd_kernel", 120, 20),  # during the first
        event("Memcpy DtoD", 170, 10, "gpu_memcpy"),
        {"ph": "i", "cat": "kernel", "name": "instant", "ts": 500},
        event("_gelu_fwd_kernel", 200, 5),
    ])  # fmt: skip
    assert parts["gaps"] == 20 + 20 and parts["other"] == 10 and parts["optimizer"] == 0
    assert (parts["matrix products"], parts["attention"], parts["GELU"]) == (50, 20, 5)


def test_a_step_on_a_cpu_is_profiled():
    layer = torch.nn.Linear(64, 64)
    step = train_step.stepper(Squared(layer), torch.randn(8, 64), None, torch.float32)
    ms = step_profile.profiled(step, torch.device("cpu"))
    assert ms["matrix products"] > 0 and ms["optimizer"] > 0 and ms["gaps"] >= 0
    assert ms["attention"] == 0 and set(ms) == {*step_profile.PARTS, "other", "gaps"}
    text = step_profile.table({"fast": ms})
    assert "matrix products" in text and "fast" in text and "%" in text


class Squared(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, targets):
        return self.layer(x).square().mean()


@pytest.mark.parametrize("bound", [0, 7, 8, 15, 16, 100, 600, 1023])
def test_largest_batch_is_found(bound):
    tried = []

    def fits(B):
        tried.append(B)
        return bound >= B

    assert train_step.bisected(fits, 8) == bound // 8 * 8
    assert len(tried) < 20 and len(set(tried)) == len(tried)


def test_plots(tmp_path):
    """A curve over one extent, bars for the step; no plot without times."""
    shapes = [{"B": B, "T": T, "H": 12, "D": 64} for B, T in ((4, 64), (2, 128))]
    odd = {"B": 1, "T": 128, "H": 4, "D": 64}
    rows = [row("cpu", 1.0, "backend", shape=shape) for shape in [*shapes, odd]]
    assert plots.sweep(rows, ("T", "B")) == rows[:2]
    step = {"B": 1, "T": 8}
    steps = [row("fast", 1.0, "backend", shape=step), row("plain", 2.0, shape=step)]
    written = {"attention": rows, "train_step": steps, "gelu": [row("cpu", None, status="error")]}
    for script, results in written.items():
        about = document(*results) | {"schema": 1, "script": script}
        result_file.write(tmp_path / f"{script}.json", about)
    drawn = plots.draw(tmp_path, [str(tmp_path / f"{script}.json") for script in written])
    assert [path.name for path in drawn] == ["attention.png", "train_step.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
