"""Checks what a pickle would build, from its opcodes, before anything is built.

A few bytes can request a lot: deeply nested tuples are hashed and freed by recursion, and 60 tuples
that each contain the previous one twice have 2^60 parts. `check` runs the opcodes on a stack of
counts, where each value is its number of parts and its depth. This is linear in the number of
opcodes, and stops at the first opcode that breaks a limit.
"""

from collections.abc import Callable
from pickletools import genops
from typing import Any

from ..errors import brief

MAX_OPCODES = 2**20  # 100,000 characters of meta.pkl take half of them
MAX_PARTS = 2**20  # of a value; a part counts once for each reference to it
MAX_DEPTH = 100  # a checkpoint with its optimizer nests 8 deep
_MAX_STACK = 2**14  # picklers collect 1,000 values at a time
_MAX_KEY = 2**32  # integers up to it have different hashes

_NUMBERS = {"INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1"}
_TEXTS = {
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
}
_OTHERS = {"NONE", "NEWTRUE", "NEWFALSE", "FLOAT", "BINFLOAT", "EMPTY_TUPLE"}
_EMPTY = {"EMPTY_DICT", "EMPTY_LIST"}
_FIXED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BINPERSID": 1, "REDUCE": 2, "NEWOBJ": 2}
_MARKED = {"TUPLE", "LIST", "DICT"}
_FILLS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}  # opcode -> number of values that it takes
_FILLS_MARKED = {"APPENDS", "SETITEMS"}
_PUTS = {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_SILENT = {"PROTO", "FRAME"}
_OBJECTS = {"GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"}  # allowed only with `name`


class _Value:
    """A value that a pickle builds: its number of parts, and their depth."""

    __slots__ = ("depth", "parts", "shared")

    def __init__(self, shared: bool = False):
        self.parts, self.depth = 1, 0
        self.shared = shared  # whether there is a second reference to it, from the memo

    def take(self, values: list["_Value"]) -> None:
        if self.shared:  # a pickler refers only to complete values, except in a cycle
            raise ValueError("its pickle changes a value after a second reference to it")
        self.parts += sum(value.parts for value in values)
        self.depth = max(self.depth, 1 + max((value.depth for value in values), default=0))
        if self.depth > MAX_DEPTH:
            raise ValueError(f"its pickle nests deeper than {MAX_DEPTH}")
        if self.parts > MAX_PARTS:
            raise ValueError(f"its pickle refers to more than {MAX_PARTS} parts")


_KEY, _ATOM = _Value(shared=True), _Value(shared=True)  # texts and small integers; other atoms


def check(
    data: bytes,
    name: Callable[[str], Any] | None = None,
    *,
    max_objects: int = 0,
) -> None:
    """Raises ValueError unless data is a pickle of plain values: dictionaries whose keys are text
    or small integers, lists, tuples, text and numbers.

    With `name`, up to max_objects objects, such as tensors, are allowed too. name is called with
    the global of each, such as "collections OrderedDict", and may raise ValueError.
    """
    machine = _Machine(name, max_objects)
    for count, (opcode, argument, _) in enumerate(genops(data)):
        if count >= MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES} opcodes")
        try:
            machine.step(opcode.name, argument)
        except IndexError:
            raise ValueError(f"its pickle lacks a value for {opcode.name}") from None


class _Machine:
    def __init__(self, name: Callable[[str], Any] | None, max_objects: int):
        self.name, self.room = name, max_objects
        self.stack: list[_Value] = []
        self.marks: list[int] = []  # positions in the stack
        self.memo: dict[int, _Value] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if self.name is None and opcode in _OBJECTS:
            raise ValueError(f"it asks for {brief(argument or opcode)}")
        if opcode in _TEXTS:
            self.push(_KEY)
        elif opcode in _NUMBERS:
            self.push(_KEY if type(argument) is int and abs(argument) < _MAX_KEY else _ATOM)
        elif opcode in _OTHERS:
            self.push(_ATOM)
        elif opcode in _EMPTY:
            self.push(_Value())
        elif opcode == "GLOBAL":
            self.name(argument)
            self.push(_ATOM)
        elif opcode == "MARK":
            self.marks.append(len(self.stack))
            if len(self.marks) > MAX_DEPTH:
                raise ValueError(f"its pickle nests deeper than {MAX_DEPTH}")
        elif opcode in _FIXED:
            self.make(opcode, self.pop(_FIXED[opcode]))
        elif opcode in _MARKED:
            self.make(opcode, self.pop_mark())
        elif opcode in _FILLS:
            self.fill(opcode, self.pop(_FILLS[opcode]))
        elif opcode in _FILLS_MARKED:
            self.fill(opcode, self.pop_mark())
        elif opcode in _PUTS:
            self.put(len(self.memo) if argument is None else argument)
        elif opcode in _GETS:
            self.get(argument)
        elif opcode == "POP":
            self.pop(1)
        elif opcode == "POP_MARK":
            self.pop_mark()
        elif opcode == "STOP":
            self.pop(1)
        elif opcode not in _SILENT:
            raise ValueError(f"its pickle has {opcode}")

    def push(self, value: _Value) -> None:
        self.stack.append(value)
        if len(self.stack) > _MAX_STACK:
            raise ValueError(f"its pickle holds more than {_MAX_STACK} values in no container")

    def pop(self, count: int) -> list[_Value]:
        """Pops the last values. Raises IndexError unless all of them lie after the last mark."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise IndexError
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_mark(self) -> list[_Value]:
        return self.pop(len(self.stack) - self.marks.pop())

    def make(self, opcode: str, values: list[_Value]) -> None:
        if opcode in _OBJECTS:
            self.room -= 1
            if self.room < 0:
                raise ValueError("its pickle makes more objects than the file holds")
        made = _Value()
        if opcode == "DICT":
            _check_keys(values)
        made.take(values)
        self.push(made)

    def fill(self, opcode: str, values: list[_Value]) -> None:
        if opcode in ("SETITEM", "SETITEMS"):
            _check_keys(values)
        [filled] = self.pop(1)
        filled.take(values)
        self.push(filled)

    def put(self, place: int) -> None:
        """Stores the last value in the memo. Picklers number the memo from 0 or 1; a much larger
        number is refused, because it would only waste memory."""
        if not 0 <= place <= len(self.memo) + 1:
            raise ValueError(f"its pickle has place {place} of the memo")
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError(f"its pickle refers to place {place} of the memo, which is empty")
        self.memo[place].shared = True
        self.push(self.memo[place])


def _check_keys(values: list[_Value]) -> None:
    if len(values) % 2 or any(key is not _KEY for key in values[::2]):
        raise ValueError("its pickle has a key that is neither a text nor a small integer")
