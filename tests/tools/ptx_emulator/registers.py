"""Operands as numpy arrays, modifiers, and the table of instructions.

A register is one array with an element per thread. An instruction accesses it through a *slot*, a
view of that array with the type that it names (float32, int32, ...). Slots are numbered when a
kernel is decoded; their arrays are allocated at launch. An instruction becomes a function op(m, t)
of the machine and the executing threads (a slice or an index array), e.g.

    def op(m, t):
        m.R[d][t] = f(m.R[a][t], m.R[b][t])
"""

import numpy as np

from .findings import UnsupportedPTX
from .syntax import BYTES, Address, Immediate, Register, Symbol, Vector

DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.uint32,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}

# Start of the windows of generic addresses into shared, local or parameter memory; host memory is
# below.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 1 << 61, 1 << 62

INSTRUCTIONS = {}  # "add": build(ins) -> op(m, t)


def instruction(*names):
    def register(build):
        for name in names:
            assert name not in INSTRUCTIONS, name
            INSTRUCTIONS[name] = build
        return build

    return register


class Slots:
    """The register arrays of one kernel: which to allocate for a launch."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.index, self.recipes = {}, []  # recipe: (register name, its width, dtype) or a constant

    def _slot(self, key, recipe):
        if key not in self.index:
            self.index[key] = len(self.recipes)
            self.recipes.append(recipe)
        return self.index[key]

    def read(self, operand, kind):
        """The slot for reading an operand as a type; of a wider register, its low bits."""
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            self._check(operand, kind, BYTES[operand.type] >= BYTES[kind])
            return self._slot(
                (operand.name, dtype), (operand.name, BYTES[operand.type], operand.type, dtype)
            )
        if isinstance(operand, Immediate):
            return self.constant(number(operand.text, kind))
        if isinstance(operand, Symbol):
            return self.constant(DTYPES[kind](self.symbol(operand.name)))
        if isinstance(operand, Address) and isinstance(operand.base, Symbol):
            return self.constant(DTYPES[kind](self.symbol(operand.base.name) + operand.offset))
        raise UnsupportedPTX(f"operand {operand}")

    def write(self, operand, kind):
        """The slot for writing a result; a wider register is sign- or zero-extended."""
        if not isinstance(operand, Register):
            raise UnsupportedPTX(f"result {operand}")
        width = BYTES[operand.type]
        if operand.name == "_":
            width, dtype = 8, DTYPES[kind]
            return self._slot(("_", dtype), ("_", width, "b64", dtype))
        self._check(operand, kind, width >= BYTES[kind])
        dtype = DTYPES[kind]
        if width > BYTES[kind]:
            if kind[0] == "f" and kind not in ("f16", "f16x2"):
                raise UnsupportedPTX(f".{kind} into {operand.name}, which has .{operand.type}")
            dtype = (SIGNED if kind[0] == "s" else UNSIGNED)[width]
        return self._slot((operand.name, dtype), (operand.name, width, operand.type, dtype))

    def _check(self, register, kind, fits):
        if not fits or (register.type == "pred") != (kind == "pred"):
            raise UnsupportedPTX(f"{register.name} has .{register.type}, not .{kind}")

    def constant(self, value):
        key = (value.dtype.str, value.tobytes())
        return self._slot(key, value)

    def symbol(self, name):
        """The value of a variable's name: an offset in its space, or a host address."""
        kernel = self.kernel
        for variable in (*kernel.variables.values(), *kernel.module.variables.values()):
            if variable.name == name:
                if variable.space in ("global", "const"):
                    return kernel.module.data[name].ctypes.data
                return variable.offset
        for param in kernel.params:
            if param.name == name:
                return param.offset
        raise UnsupportedPTX(f"{kernel.name}: symbol {name}")

    def allocate(self, n):
        """Allocates the arrays of a launch of n threads. Fresh registers hold the canary too."""
        storage, arrays = {}, []
        for recipe in self.recipes:
            if not isinstance(recipe, tuple):
                arrays.append(np.broadcast_to(recipe, (n,)))
                continue
            name, width, kind, dtype = recipe
            if kind == "pred":
                arrays.append(storage.setdefault(name, np.zeros(n, np.bool_)))
                continue
            if name not in storage:
                storage[name] = np.full(n * max(width // 2, 1), 0x7FA5, np.uint16)
            raw = storage[name].view(np.uint8)[: n * width].view(dtype)
            arrays.append(raw[:: width // np.dtype(dtype).itemsize])
        return arrays


def number(text, kind):
    """An immediate as a value of a type."""
    dtype = DTYPES[kind]
    head = text.lstrip("-")[:2].lower()
    if head in ("0f", "0d"):
        bits = int(text[2:], 16)
        value = (
            np.uint32(bits).view(np.float32) if head == "0f" else np.uint64(bits).view(np.float64)
        )
        if kind in ("f32", "f64"):
            return dtype(value)
        if kind in ("b32", "u32", "s32") and head == "0f":
            return value.view(dtype)
        if kind in ("b64", "u64", "s64") and head == "0d":
            return value.view(dtype)
        raise UnsupportedPTX(f"{text} as .{kind}")
    if kind == "pred":
        return np.bool_(int(text, 0))
    if kind in ("f32", "f64"):
        return dtype(float(text))
    bits = 8 * BYTES[kind]
    digits = text.rstrip("U")
    octal = digits.lstrip("-").isdigit() and digits.lstrip("-").startswith("0")
    value = int(digits, 8 if octal and digits.strip("-0") else 10 if octal else 0)
    raw = UNSIGNED[bits // 8](value & ((1 << bits) - 1))
    return raw.view(dtype)


class Modifiers:
    """The modifiers of an opcode. Each must be read once; an unread one is an error."""

    def __init__(self, opcode):
        self.left = opcode.split(".")[1:]

    def flag(self, *names):
        found = [n for n in names if n in self.left]
        for name in found:
            self.left.remove(name)
        return bool(found)

    def one_of(self, *names, default=None):
        for name in self.left:
            if name in names:
                self.left.remove(name)
                return name
        if default is None:
            raise UnsupportedPTX(f"none of .{' .'.join(names)}")
        return default

    def type(self):
        """Reads the next modifier, which must be a type."""
        return self.one_of(*DTYPES)

    def skip(self, *prefixes):
        """Skips hints that change no result."""
        self.left = [m for m in self.left if not m.startswith(prefixes)]


class Decoding:
    """An instruction and its kernel's slots: the interface for the builders of instructions."""

    def __init__(self, ins, slots, program):
        self.ins, self.slots, self.program = ins, slots, program
        self.mods = Modifiers(ins.opcode)
        self.op, self.operands = ins.op, ins.operands

    def reads(self, kind, start=1, count=None):
        ops = self.operands[start : None if count is None else start + count]
        return [self.slots.read(o, kind) for o in ops]

    def read(self, i, kind):
        return self.slots.read(self.operands[i], kind)

    def write(self, kind, i=0):
        return self.slots.write(self.operands[i], kind)

    def vector(self, i, kind, write=False):
        """The slots of an operand {a, b, ...}, or of a single register."""
        operand = self.operands[i]
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return [(self.slots.write if write else self.slots.read)(o, kind) for o in items]

    def apply(self, f, kind, result=None, count=None):
        """result = f(operands): one element per thread."""
        return apply(f, self.write(result or kind), self.reads(kind, 1, count))


def apply(f, d, sources):
    if len(sources) == 1:
        (a,) = sources

        def op(m, t):
            m.R[d][t] = f(m.R[a][t])
    elif len(sources) == 2:
        a, b = sources

        def op(m, t):
            R = m.R
            R[d][t] = f(R[a][t], R[b][t])
    elif len(sources) == 3:
        a, b, c = sources

        def op(m, t):
            R = m.R
            R[d][t] = f(R[a][t], R[b][t], R[c][t])
    else:

        def op(m, t):
            m.R[d][t] = f(*(m.R[s][t] for s in sources))

    return op
