"""Bugs to plant in the recording and replaying of calls."""

from . import Mutant

PYTHON = "kernels/recorder.py"
KEY = "csrc/replay/key.h"
NODE = "csrc/replay/node.h"
PROGRAM = "csrc/replay/program.h"
TESTS, LIMITS = "kernels/test_recording.py", "kernels/test_recording_limits.py"

RECORDING_MUTANTS = [
    Mutant(
        "a tensor from elsewhere is taken for an argument", PYTHON,
        'self.refuse("it uses a tensor from elsewhere")', "return Slot(0)",
        f"{LIMITS}::test_not_recorded[outside]", quick=True,
    ),
    Mutant(
        "a value that is read is taken for a constant", PYTHON,
        'self.refuse(f"{op} reads a value")', "pass", f"{LIMITS}::test_not_recorded[item]",
    ),
    Mutant(
        "a place in memory is taken for a constant", PYTHON,
        "op is torch.ops.aten.as_strided.default and", "False and",
        f"{LIMITS}::test_not_recorded[as_strided]",
    ),
    Mutant(
        "a version that no operator changes", "kernels/autograd.py",
        'recorders.refuse("it changes the version of a tensor")', "pass",
        f"{LIMITS}::test_in_place_loss_gradient_is_not_recorded",
    ),
    Mutant(
        "ids checked only once", PYTHON,
        "self.log.steps.append((*step, function, self.log.read(list(args))))", "pass",
        f"{LIMITS}::test_ids_are_checked_at_each_call[cross_entropy]",
    ),
    Mutant(
        "intermediate results kept by the recording", PYTHON,
        "self.known[id(x)] = weakref.ref(x), slot", "self.known[id(x)] = (lambda: x), slot",
        f"{LIMITS}::test_memory_is_freed_as_in_python[recording]",
    ),
    Mutant(
        "a backend that another thread forced for a moment", "kernels/recording.py",
        "if dispatch.changes() != changes:", "if False:",
        f"{LIMITS}::test_a_setting_that_changes_during_a_recording",
    ),
    Mutant(
        "plain PyTorch recorded", "kernels/dispatch.py",
        'recorder.refuse("plain PyTorch computes it")', "pass",
        f"{LIMITS}::test_plain_pytorch_is_not_recorded",
    ),
    Mutant(
        "a shape that depends on values", PYTHON,
        "if torch.Tag.dynamic_output_shape in op.tags:", "if False:",
        f"{LIMITS}::test_not_recorded[dynamic shape]",
    ),
    # csrc/replay
    Mutant(
        "a name taken for a text", "csrc/replay/replay.cpp",
        "key.add(-2);", "", f"{LIMITS}::test_a_name_is_not_a_text",
    ),
    Mutant(
        "strides left out of the key", KEY,
        "for (const int64_t stride : x.strides()) add(stride);", "",
        f"{TESTS}::test_every_kind_of_call_has_its_own_recording",
    ),
    Mutant(
        "autocast left out of the key", KEY,
        "add(autocasting ? int64_t(at::autocast::get_autocast_dtype(device.type())) : -1);", "",
        f"{TESTS}::test_autocast_is_part_of_the_kind",
    ),
    Mutant(
        "whether gradients are recorded left out of the key", KEY,
        "add(at::GradMode::is_enabled());", "",
        f"{TESTS}::test_every_kind_of_call_has_its_own_recording",
    ),
    Mutant(
        "equal arguments left out of the key", NODE,
        "key.add_repeats(inputs);", "", f"{TESTS}::test_one_tensor_as_two_arguments",
    ),
    Mutant(
        "modes not seen", KEY,
        "if (state.included_ != kUsual ||", "if (", f"{TESTS}::test_who_must_see_python",
    ),
    Mutant(
        "subclasses not seen", "csrc/replay/replay.cpp",
        "!THPVariable_CheckExact(value) ||", "", f"{TESTS}::test_who_must_see_python",
    ),
    Mutant(
        "needed gradients left out of the key", NODE,
        "key.add(int64_t(needs));", "", f"{TESTS}::test_gradients_of_some_inputs",
    ),
    Mutant(
        "the sum of a gradient that was changed, in C++", NODE,
        "if (version != int64_t(x._version())) return {};", "",
        f"{LIMITS}::test_sums_are_handed_on",
    ),
    Mutant(
        "ids outside their range let through", PROGRAM,
        "if (!inside) PythonCall::run(slots);", "",
        f"{LIMITS}::test_ids_are_checked_at_each_call[linear_cross_entropy]",
    ),
    Mutant(
        "strided ids read as if contiguous", PROGRAM,
        "if (!ids.is_cpu() || !ids.is_contiguous())", "if (!ids.is_cpu())",
        f"{LIMITS}::test_ids_are_checked_at_each_call[cross_entropy]",
    ),
    Mutant(
        "intermediate results kept by a replay", PROGRAM,
        "for (int slot : step->ends) given[slot].reset();", "",
        f"{LIMITS}::test_memory_is_freed_as_in_python[replay]",
    ),
]  # fmt: skip
