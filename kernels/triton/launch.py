"""Launches kernels at a small cost on the host.

Triton's own launch binds, specializes and hashes every argument, which takes 8 to 20 µs. launch
does that once for each set of arguments that Triton could compile or launch in its own way. Later
calls find the compiled kernel in a dict and call it.
"""

from torch import Tensor
from triton import JITFunction, knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .. import recorder as recorders

MOST = 4096  # launches remembered; beyond it all are forgotten
_known: dict[tuple, tuple] = {}


def launch(kernel, grid: tuple[int, int, int], *args, **constants) -> None:
    """kernel[grid](*args, **constants) on the device of the tensors, which is the current one.

    args are the parameters before the constants, in their order: tensors, numbers, and tuples of
    numbers whose first element may be a tensor. constants are the constexpr parameters, and options
    such as num_warps.
    """
    recorder = recorders.current()
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        recorders.refuse("Triton's interpreter runs a kernel")
        kernel[grid](*args, **constants)
        return
    active = driver.active
    # kernel.fn in place of kernel, whose hash is a locked property and Python code
    key, low_bits = [kernel.fn, grid, active, *constants.values()], 0
    for arg in args:
        if isinstance(arg, tuple):
            key.append(arg[1:])
            arg = arg[0]
        if isinstance(arg, Tensor):
            low_bits |= arg.data_ptr()
            key.append(arg.dtype)
            tensor = arg
        else:
            key.append(arg)
    device = tensor.get_device()
    key.append(device)
    key = tuple(key)
    # Code is compiled for the alignment of each pointer. Only if all are aligned, the key tells it.
    remembers = low_bits % 16 == 0 and not is_hooked()
    if remembers and (known := _known.get(key)):
        run, function, metadata, values = known
        stream = active.get_current_stream(device)
        launch = *grid, stream, function, metadata, None, None, None, *args, *values
        run(*launch)
        if recorder:
            recorder.launch(run, active.get_current_stream, device, launch)
        return
    recorders.refuse("a kernel was launched for the first time, or with hooks")
    compiled = kernel[grid](*args, **constants)
    if remembers and isinstance(compiled, CompiledKernel):
        if len(_known) >= MOST:
            _known.clear()
        values = [constants[name] for name in kernel.arg_names[len(args) :]]
        _known[key] = compiled.run, compiled.function, compiled.packed_metadata, values


def is_hooked() -> bool:
    """Whether something, such as a profiler, wants to be called at each launch."""
    hook = knobs.runtime.launch_enter_hook  # None in Triton 3.4, a chain from 3.5 on
    return hook is not None and bool(getattr(hook, "calls", True))
