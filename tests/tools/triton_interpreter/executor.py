"""Launches: arguments as a GPU receives them, the grid, and triton.language inside a kernel."""

import inspect
import types

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from .builder import Reduce, Scan
from .floats import TensorHandle
from .memory import KernelFault, Launch

MAX_GRID = (2**31 - 1, 65535, 65535)


class Executor(stock.GridExecutor):
    """Runs the programs of one launch directly on its tensors."""

    races = True  # whether memory.Launch checks for races
    language = None  # the context of a launch

    def __call__(self, *args, **kwargs):
        kernel = self.fn.__name__
        kwargs = {name: value for name, value in kwargs.items() if name in self.arg_names}
        arguments = inspect.getcallargs(self.fn, *args, **kwargs)
        grid = tuple(map(int, self.grid(arguments) if callable(self.grid) else self.grid))
        grid += (1,) * (3 - len(grid))
        if any(size > limit for size, limit in zip(grid, MAX_GRID, strict=True)):
            raise KernelFault(f"{kernel}: grid {grid} is larger than CUDA's {MAX_GRID}")
        for hook in self.pre_run_hooks:
            hook(*args, **kwargs)
        tensors = [pair for name, arg in arguments.items() for pair in _tensors(name, arg)]
        launch = Launch(kernel, tensors, self.races)
        builder = stock.interpreter_builder
        builder.set_grid_dim(*grid)
        builder.launch = launch
        try:
            with self.language, np.errstate(all="ignore"):
                for name in arguments.keys() - self.constexprs:
                    arguments[name] = _parameter(arguments[name])
                for launch.grid_idx in np.ndindex(grid):
                    launch.program += 1
                    builder.set_grid_idx(*launch.grid_idx)
                    self.fn(**arguments)
        except KernelFault:
            raise
        except Exception as error:
            raise InterpreterError(f"{kernel}, program {launch.grid_idx}: {error!r}") from error
        finally:
            builder.launch = None


def _tensors(name, arg):
    """The (name, tensor) pairs in one argument of a launch."""
    if isinstance(arg, tuple):
        for i, item in enumerate(arg):
            yield from _tensors(f"{name}[{i}]", item)
    elif isinstance(arg, TensorDescriptor):
        yield from _tensors(name, arg.base)
    elif hasattr(arg, "data_ptr"):
        tensor = stock._unwrap_tensor(arg)
        if tensor.device.type != "cpu":
            raise KernelFault(f"{name} is on {tensor.device}: the interpreter runs on the CPU")
        yield name, tensor


def _parameter(arg):
    """Converts an argument as for the GPU: a float becomes float32, a bool one bit."""
    if isinstance(arg, (bool, float)):
        dtype, data = (tl.int1, np.bool_) if isinstance(arg, bool) else (tl.float32, np.float32)
        return tl.tensor(TensorHandle(np.array([arg], data), dtype), dtype)
    if isinstance(arg, tuple):
        items = map(_parameter, arg)
        return type(arg)(*items) if hasattr(arg, "_fields") else tuple(items)
    return stock._implicit_cvt(arg)


class Language:
    """The context in which triton.language computes: Triton's patches, collected once."""

    def __init__(self):
        # Triton finds the language in a kernel's globals, under either of two names
        probe = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
        scope = stock._patch_lang(probe)
        names = {(target, name): None for target, name, _ in scope._changes}
        patched = {key: getattr(*key) for key in names}
        scope.restore()
        self.originals = {key: getattr(*key, stock._MISSING) for key in names}
        self.patches = {  # Triton's wrapper of a builtin searches the keywords; ours does not
            key: _bind(self.originals[key]) if "_patch_attr" in str(patch) else patch
            for key, patch in patched.items()
        }
        self.patches[tl.tensor, "__index__"] = lambda x: x.handle.data.item()
        for module in (tl, tl.core):
            self.patches[module, "reduce"] = _reduce
            self.patches[module, "associative_scan"] = _scan

    def __enter__(self):
        for (target, name), value in self.patches.items():
            setattr(target, name, value)

    def __exit__(self, *_):
        for (target, name), value in self.originals.items():
            if value is stock._MISSING:
                delattr(target, name)
            else:
                setattr(target, name, value)


def _bind(builtin):
    """A builtin of the language that a kernel calls without `_semantic`."""
    function, semantic = getattr(builtin, "__wrapped__", builtin), stock.interpreter_semantic

    def bound(*args, _semantic=None, **kwargs):
        return function(*args, _semantic=semantic, **kwargs)

    return bound


def _reduce(input, axis, combine_fn, keep_dims=False, **_):
    return Reduce(axis, combine_fn, keep_dims).apply(input)


def _scan(input, axis, combine_fn, reverse=False, **_):
    return Scan(axis, combine_fn, reverse).apply(input)


def _call(self, *args, **kwargs):
    """Calls another @triton.jit function; the language is already patched."""
    if stock.interpreter_builder.launch is None:
        raise RuntimeError(f"{self.__name__} is a @triton.jit function: launch it on a grid")
    return self.rewrite()(*args, **kwargs)


def _compile_and_exec(self, tree):
    """Compiles without copying the interpreter's globals into the kernel's module, where np, math
    or T would exist that do not on a GPU."""
    scope = self.fn.__globals__
    scope.setdefault("interpreter_semantic", stock.interpreter_semantic)
    names = dict(self.kwargs)
    exec(compile(tree, self.filename, "exec"), scope, names)
    return names[self.fn.__name__]


def install():
    Executor.language = Language()
    stock.GridExecutor = Executor
    stock.InterpretedFunction.__call__ = _call
    stock.FunctionRewriter._compile_and_exec = _compile_and_exec
