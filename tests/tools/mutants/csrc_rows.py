"""Bugs to plant in csrc's row kernels."""

from . import Mutant

GELU_H = "csrc/cpu/gelu.h"
NORM_H = "csrc/cpu/layer_norm.h"
LOSS_H = "csrc/cpu/cross_entropy.h"
ROWS_H = "csrc/cpu/rows.h"
VEC_H = "csrc/cpu/vec.h"

ROW_MUTANTS = [
    # gelu
    Mutant(
        "1 - g cancels", GELU_H,
        "(e * g) * g, g)", "(one - g) * g, g)",
        "kernels/test_gelu.py::test_gradient_on_the_right_keeps_its_accuracy[cpu-avx2]",
    ),
    # layer_norm
    Mutant(
        "the residual's gradient in 16 bits", NORM_H,
        "if (dresidual != nullptr) store(g, dresidual + start + c, lanes);",
        "if (dresidual != nullptr)"
        " store(load<V>(dx + start + c, lanes), dresidual + start + c, lanes);",
        "kernels/test_layer_norm.py::test_float32_stream_is_not_rounded[cpu-avx2-bf16]",
    ),
    # cross_entropy
    Mutant(
        "sum not rescaled", LOSS_H,
        "l = l * exp_minus(V::set(m), V::set(top.max()));", "",
        "kernels/test_cross_entropy.py::test_cross_entropy[cpu-avx2-20.0-V9001-N3-fp32-none]",
    ),
    Mutant(
        "loss of ignored rows kept", LOSS_H,
        "losses[row] = target == rows.ignore_index ? 0 :", "losses[row] = target < -99 ? 0 :",
        "kernels/test_cross_entropy.py::test_ignore_index[cpu-avx2-3]",
    ),
    # rows
    Mutant(
        "tail stored unmasked", ROWS_H,
        "v.store(p, n);", "if (n > 0) v.store(p);",
        "kernels/test_cross_entropy.py::test_in_place_rows_touch_nothing_else[cpu-avx2-7-fp32]",
    ),
    Mutant(
        "every strip of columns stored over the first", ROWS_H,
        "store(sum, out + begin + c, lanes);", "store(sum, out + c, lanes);",
        "kernels/test_cpu.py::test_bits_do_not_depend_on_threads[cpu-avx2-layer_norm-fp32]",
    ),
    # vectors and their functions
    Mutant(
        "bfloat16 ties away from zero", VEC_H,
        "(u + 0x7fff + (u >> 16 & 1)) >> 16", "(u + 0x8000) >> 16",
        "kernels/test_cpu.py::test_every_half_precision_number_is_read_and_rounded[cpu-scalar-bf16]",
    ),
]  # fmt: skip
