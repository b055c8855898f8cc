"""Notes the work of a call: its operators, launches and autograd functions, as steps on numbered
tensors, which csrc/replay can run. recording.py says when and why.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

NONE = -1  # in place of a slot: None
implementations: dict[object, Callable] = {}  # of the raw ops, whose operators are noted instead

_local = threading.local()  # .recorder: of the call that this thread records


def current() -> "Recorder | None":
    """The recorder of the call that this thread records, if it records one."""
    return getattr(_local, "recorder", None)


def refuse(reason: str) -> None:
    """Says that the call of this thread must not be replayed, if it is being recorded: it does what
    no operator does."""
    if recorder := current():
        recorder.log.refuse(reason)


class Slot:
    """A tensor's number, in the place of the tensor."""

    __slots__ = ("index",)

    def __init__(self, index: int):
        self.index = index


class Log:
    """Steps on numbered tensors, as csrc/replay/program.h describes them.

    It keeps no tensor alive, so a recorded call needs no more memory than others.
    """

    def __init__(self, inputs):
        self.known: dict[int, tuple[weakref.ref, int]] = {}  # id -> (tensor, slot)
        self.count = 0  # slots
        self.steps: list[tuple] = []
        self.refused: str | None = None  # why this cannot be replayed
        for x in inputs:
            if x is not None:
                self.name(x, self.count)
            self.count += 1
        self.inputs = self.count

    def refuse(self, reason: str) -> None:
        self.refused = self.refused or reason

    def name(self, x: Tensor, slot: int) -> None:
        self.known[id(x)] = weakref.ref(x), slot

    def slot(self, x: Tensor) -> int | None:
        tensor, slot = self.known.get(id(x), (None, None))
        return slot if tensor is not None and tensor() is x else None

    def write(self, x: Tensor) -> int:
        """The slot of a result: a new one, unless x is an argument that was written to."""
        slot = self.slot(x)
        if slot is None:
            slot, self.count = self.count, self.count + 1
            self.name(x, slot)
        return slot

    def read(self, value):
        """value, with slots in place of tensors."""
        if isinstance(value, Tensor):
            slot = self.slot(value)
            if slot is not None:
                return Slot(slot)
            self.refuse("it uses a tensor from elsewhere")
        elif isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(map(self.read, value))
        return value

    def results(self, tensors) -> list[int]:
        """The slots of what the call returns."""
        found = []
        for x in tensors:
            slot = NONE if x is None else self.slot(x) if isinstance(x, Tensor) else None
            if slot is None:
                self.refuse("it returns something else than tensors that it has computed")
            found.append(slot)
        return found

    def call(self, op, args, kwargs, found) -> None:
        """Notes a call of an operator."""
        given = [args[i] if i < len(args) else kwargs.get(parameter.name, ...)
                 for i, parameter in enumerate(op._schema.arguments)]  # fmt: skip
        results = found if isinstance(found, (list, tuple)) else () if found is None else (found,)
        if not all(isinstance(x, Tensor) for x in results):
            if any(isinstance(x, Tensor) for x in given):
                self.refuse(f"{op} reads a value")
            return  # a fact about dtypes, which is the same each time
        if torch.Tag.dynamic_output_shape in op.tags:
            self.refuse(f"the shape of {op}'s result depends on values")
        if op is torch.ops.aten.as_strided.default and (self.slot(args[0]) or 0) < self.inputs:
            self.refuse("as_strided of an argument depends on its place in memory")
        if not op._schema.is_mutable and len(results) == 1:
            if any(found is x for x in given):  # contiguous, to
                return
            is_detach = op is torch.ops.aten.detach.default and not args[0].requires_grad
            slot = self.slot(args[0]) if is_detach else None
            if slot is not None:  # how a dispatch mode sees torch.empty
                self.name(found, slot)
                return
        values, writes = self.read(given), [self.write(x) for x in results]
        self.steps.append(("call", op._schema.name, op._schema.overload_name, values, writes))

    def program(self, library, results: list[int]):
        """The program, or None if this cannot be replayed."""
        if self.refused:
            return None
        try:
            return library.Program(self.inputs, self.count, self.steps, results)
        except (RuntimeError, TypeError, ValueError) as error:  # an argument that C++ cannot hold
            self.refuse(str(error))
            return None


class Recorder(TorchDispatchMode):
    """Notes the work of a call in `log`, while it is active."""

    def __init__(self, library, inputs):
        super().__init__()
        self.library = library
        self.log = Log(inputs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch.compile never sees a recording, and marking the code for it would import the
        compiler, which takes seconds."""
        return False

    @contextlib.contextmanager
    def active(self):
        _local.recorder = self
        try:
            with self:
                yield
        finally:
            _local.recorder = None

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in implementations:
            with self:
                return implementations[op](*args)
        found = op(*args, **(kwargs or {}))
        self.log.call(op, args, kwargs or {}, found)
        return found

    def check_ids(self, check: Callable, ids: Tensor, low: int, size: int, *args) -> None:
        """Notes that check(ids, *args) must be called if an id is outside [low, size), or on a GPU;
        and calls it."""
        self.python(check, ids, *args, step=("check", low, size))

    def python(self, function: Callable, *args, step: tuple = ("python",)) -> None:
        """Calls function(*args), which returns nothing, at each replay, too."""
        self.log.steps.append((*step, function, self.log.read(list(args))))
        _local.recorder = None
        try:
            with _disable_current_modes():
                function(*args)
        finally:
            _local.recorder = self

    def launch(self, run: Callable, stream_of: Callable, device: int, args: tuple) -> None:
        """Notes run(*args), a launch on the stream stream_of(device), which replaces args[3]."""
        from .triton.launch import is_hooked

        self.library.ask(is_hooked)
        self.log.steps.append(("launch", run, stream_of, device, self.log.read(list(args))))

    def apply(self, function: type[torch.autograd.Function], *args):
        """function.apply(*args), noted as one step."""
        outer = self.log
        tensors = [x for x in args if isinstance(x, Tensor)]
        inner, attributes, ends = Log(tensors), {}, {}

        def forward(ctx, *args):
            self.log = inner
            try:
                ends["outputs"] = function.forward(_Ctx(ctx, attributes, ends), *args)
            finally:
                self.log = Log(())  # for what PyTorch does with the outputs, which is not noted
            return ends["outputs"]

        noted = type(function.__name__, (function,), {"forward": staticmethod(forward)})
        try:
            found = noted.apply(*args)
        finally:
            self.log = outer
        outputs = as_tuple(ends["outputs"])
        results = inner.results((*outputs, *ends.get("saved", ())))
        written = set(results[: len(outputs)])
        if len(written) < len(outputs) or any(x is None or x < inner.inputs for x in written):
            inner.refuse("an output is an argument, or another output")
        if any(isinstance(x, Tensor) for x in attributes.values()):
            inner.refuse("a tensor is an attribute of ctx")
        program = inner.program(self.library, results)
        if program is None:
            outer.refuse(inner.refused)
        else:
            backward = _Backward(self.library, function, attributes, args)
            name = f"{function.__name__}Backward"
            sums = getattr(function, "uses_sums", False)
            step = self.library.Function(name, program, len(outputs), sums, backward)
            reads = [slot.index for slot in outer.read(tensors) if isinstance(slot, Slot)]
            writes = [outer.write(x) for x in as_tuple(found)]
            outer.steps.append(("apply", step, reads, writes))
        return found


class _Ctx:
    """The ctx of a forward. It also notes what is saved and set."""

    def __init__(self, ctx, attributes: dict, ends: dict):
        object.__setattr__(self, "_parts", (ctx, attributes, ends))

    def save_for_backward(self, *tensors):
        ctx, _, ends = self._parts
        ends["saved"] = tensors
        ctx.save_for_backward(*tensors)

    def __setattr__(self, name, value):
        ctx, attributes, _ = self._parts
        attributes[name] = value
        setattr(ctx, name, value)


class _Backward:
    """Runs the backward of a function whose forward was replayed, where that is not recorded."""

    def __init__(self, library, function, attributes: dict, args: tuple):
        self.library, self.function, self.attributes = library, function, attributes
        self.is_tensor = [isinstance(x, Tensor) for x in args]

    def __call__(self, grads, saved, needs: int, record: bool):
        """(the gradients of the arguments that are tensors, their program or None). Bit i of needs
        says whether the i-th needs one. With record the program is wanted."""
        bits = iter([bool(needs >> i & 1) for i in range(sum(self.is_tensor))])
        needed = tuple(next(bits) if x else False for x in self.is_tensor)
        ctx = SimpleNamespace(saved_tensors=saved, needs_input_grad=needed, **self.attributes)
        if not record:
            return self._gradients(self.function.backward(ctx, *grads)), None
        uses_sums = getattr(self.function, "uses_sums", False)
        sums = map(attached_sum, grads) if uses_sums else [None] * len(grads)
        inputs = [*grads, *saved, *sums]
        recorder = Recorder(self.library, inputs)
        with recorder.active():
            found = self._gradients(self.function.backward(ctx, *grads))
        return found, recorder.log.program(self.library, recorder.log.results(found))

    def _gradients(self, found) -> tuple:
        found = as_tuple(found)
        return tuple(x for x, is_tensor in zip(found, self.is_tensor, strict=True) if is_tensor)


def as_tuple(found) -> tuple:
    return found if isinstance(found, tuple) else (found,)


# ---- the sum of a gradient over its rows, which a kernel has computed beside it


def attach_sum(x: Tensor, total: Tensor) -> None:
    """Remembers the sum of x over its rows."""
    if recorder := current():
        recorder.python(attach_sum, x, total)
        return
    x.column_sum = x._version, total


def attached_sum(x: Tensor) -> Tensor | None:
    """The sum of x over its rows, if it was attached and x has not changed since."""
    version, total = getattr(x, "column_sum", (None, None))
    return total if version == x._version else None
