"""The parsed parts of a PTX file: types, operands, variables, instructions, kernels."""

import dataclasses

BYTES = {
    kind + str(bits): bits // 8
    for kind, widths in {"b": (8, 16, 32, 64), "u": (8, 16, 32, 64), "s": (8, 16, 32, 64),
                         "f": (16, 32, 64), "bf": (16,)}.items()
    for bits in widths
} | {"pred": 1, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b128": 16}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Register:
    name: str
    type: str
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Immediate:
    text: str


@dataclasses.dataclass(frozen=True)
class Symbol:
    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclasses.dataclass(frozen=True)
class Vector:
    """{a, b, ...}; also a call's arguments, and both results of d|p."""

    items: tuple


@dataclasses.dataclass
class Variable:
    name: str
    space: str
    align: int
    itemsize: int
    nbytes: int | None  # None: the launch decides
    initial: str | None = None
    offset: int = 0  # in its space


@dataclasses.dataclass
class Instruction:
    opcode: str
    operands: tuple
    predicate: Register | None
    line: int
    text: str
    source: str
    pc: int = -1

    def __post_init__(self):
        self.op = self.opcode.partition(".")[0]


@dataclasses.dataclass
class Kernel:
    name: str
    module: object  # parser.Module
    params: list[Variable]
    block_size: tuple[int, ...] | None = None  # .reqntid
    max_threads: int = 1024
    variables: dict[str, Variable] = dataclasses.field(default_factory=dict)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    tables: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # .branchtargets
    body: tuple[int, int] | None = None  # its place in the module's text, until it is parsed
    program: object = None  # decoded at the first launch: flow.Program


SPECIAL = {
    f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"
} | {"%laneid", "%warpid", "%nwarpid"} | {
    f"%lanemask_{which}" for which in ("eq", "lt", "le", "gt", "ge")
} | {"%dynamic_smem_size", "%total_smem_size"}  # fmt: skip


def place(variables, start=0):
    """Assigns an offset to each variable; returns the end of the last one."""
    for v in variables:
        v.offset = -(-start // v.align) * v.align
        start = v.offset + (v.nbytes or 0)
    return start
