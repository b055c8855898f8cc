"""PTX text → modules, kernels, variables and instructions.

A statement ends at a semicolon, a label at a colon, .loc and .file at the end of their line. At the
start of a statement a brace opens a scope with its own registers and labels (for inline assembly);
elsewhere it is part of a vector operand. Names are resolved here: every register and label gets a
name that is unique within its kernel.
"""

import dataclasses
import hashlib
import re

import numpy as np

from .findings import UnsupportedPTX
from .syntax import (
    BYTES,
    SPECIAL,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Register,
    Symbol,
    Variable,
    Vector,
    place,
)

_COMMENT = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.S)
_BRACE = re.compile(r'"[^"\n]*"|//[^\n]*|[{}]')
_HEADER = re.compile(r"\.(version|target|address_size)[^\n]*")
_LINE = re.compile(r"\.(loc|file)\b[^\n]*")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_ENTRY = re.compile(r"((?:\.(?:visible|weak|extern)\s+)*)\.(entry|func)\b")
_SECTION = re.compile(r"\.section\b[^{]*\{[^}]*\}")
_PREDICATE = re.compile(r"@(!?)\s*([\w$%]+)\s+")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|local|const|global|param)\s+"
    r"(?:\.align\s+(\d+)\s+)?\.(?:v[24]\s+\.)?(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?\.align\s+\d+\s+)?"
    r"([\w$%.]+)((?:\s*\[\d*\])*)(?:\s*=\s*(.*))?$",
    re.S,
)
_MEMORY = re.compile(r"\[\s*([\w$%.]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]$")
_NUMBER = re.compile(
    r"-?(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d[\d.eE+-]*U?)$"
)


class Module:
    """One PTX file. A kernel's body is parsed at its first use, because files have megabytes."""

    def __init__(self, text: str):
        self.text = text
        self.hash = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.kernels: dict[str, Kernel] = {}
        self.variables: dict[str, Variable] = {}
        self.files: dict[str, str] = {}
        self.data: dict[str, np.ndarray] = {}  # of .global and .const variables
        self._read(text)
        for variable in self.variables.values():
            if variable.space in ("global", "const"):
                self.data[variable.name] = _initial(variable)

    def _read(self, text):
        at = 0
        while at < len(text):
            if text[at].isspace() or text[at] == ";":
                at += 1
            elif match := _COMMENT.match(text, at) or _SECTION.match(text, at):
                at = match.end()
            elif match := _LINE.match(text, at):
                if match[1] == "file":
                    number, path = re.match(r"\.file\s+(\d+)\s+\"([^\"]*)\"", match[0]).groups()
                    self.files[number] = path.rsplit("/", 1)[-1]
                at = match.end()
            elif match := _ENTRY.match(text, at):
                at = self._function(text, at, match)
            elif match := _HEADER.match(text, at):
                at = match.end()
            else:
                end = text.index(";", at)
                variable = parse_variable(_COMMENT.sub(_blank, text[at:end]))
                self.variables[variable.name] = variable
                at = end + 1

    def _function(self, text, at, match):
        opening, semicolon = text.find("{", at), text.find(";", at)
        if match[2] == "func" and semicolon > -1 and (opening < 0 or semicolon < opening):
            return semicolon + 1  # a declaration
        end = _closing(text, opening)
        if match[2] == "entry":  # a function's body is skipped: calls are not supported
            header = _COMMENT.sub(_blank, text[match.end() : opening])
            kernel = self._kernel(header)
            kernel.body = opening + 1, end - 1
            self.kernels[kernel.name] = kernel
        return end

    def _kernel(self, header):
        name = re.match(r"\s*([\w$]+)", header)[1]
        inside = re.search(r"\((.*?)\)", header, re.S)
        written = inside[1].split(",") if inside and inside[1].strip() else []
        kernel = Kernel(name, self, [parse_variable(p) for p in written])
        place(kernel.params)
        after = header[inside.end() :] if inside else header
        for directive, numbers in re.findall(r"\.(\w+)\s*([\d,\s]*)", after):
            sizes = tuple(int(n) for n in numbers.replace(",", " ").split())
            if directive == "reqntid":
                kernel.block_size = (*sizes, 1, 1)[:3]
            elif directive == "maxntid":
                kernel.max_threads = int(np.prod(sizes))
            elif directive not in ("minnctapersm", "maxnreg", "maxnctapersm", "noreturn"):
                raise UnsupportedPTX(f"{name}: .{directive} {numbers}")
        return kernel


def read_body(kernel):
    """Parses a kernel's instructions, labels and variables."""
    if kernel.body is None:
        return
    module, (start, end) = kernel.module, kernel.body
    kernel.body = None
    text = _COMMENT.sub(_blank, module.text[start:end])
    _Body(module, kernel).read(text, 1 + module.text.count("\n", 0, start))


class _Body:
    """Parses a kernel's statements; scopes is a stack of {name in the text: resolved name}."""

    def __init__(self, module, kernel):
        self.module, self.kernel = module, kernel
        self.scopes, self.count = [{}], 0
        self.source = ""
        self.pending = []  # (instruction, operands as written, its scopes): resolved at the end

    def read(self, text, line):
        """Parses text that begins in this line of the PTX."""
        at = counted = 0
        while at < len(text):
            character = text[at]
            if character.isspace() or character == ";":
                at += 1
                continue
            line, counted = line + text.count("\n", counted, at), at
            if character == "{":
                self.count += 1
                self.scopes.append({})
                at += 1
            elif character == "}":
                self.scopes.pop()
                at += 1
            elif match := _LINE.match(text, at):
                _, number, row, *_ = match[0].replace(",", " ").split()
                file = self.module.files.get(number, number)
                self.source = f"{file}:{row}" if row != "0" else ""
                at = match.end()
            elif match := _SECTION.match(text, at):
                at = match.end()
            elif match := _LABEL.match(text, at):
                at = self._label(match[1], text, match.end())
            else:
                stop = text.index(";", at)
                self._statement(text[at:stop].strip(), line)
                at = stop + 1
        for instruction, written, scopes in self.pending:
            instruction.operands = tuple(self._operand(o, scopes) for o in written)
        self._close()

    def _close(self):
        """Adds a return at the closing brace, for a kernel that runs or jumps there."""
        instructions, end = self.kernel.instructions, len(self.kernel.instructions)
        last = instructions[-1] if instructions else None
        ends = last and last.op in ("ret", "exit", "trap", "bra", "brx") and not last.predicate
        targets = {o.name for i in instructions for o in i.operands if isinstance(o, Symbol)}
        if not ends or any(self.kernel.labels.get(name) == end for name in targets):
            instructions.append(Instruction("ret", (), None, 0, "(the end)", "", end))

    def _label(self, name, text, at):
        table = re.compile(r"\s*\.branchtargets\s+([^;]*);").match(text, at)
        if table:
            self.kernel.tables[name] = [t.strip() for t in table[1].split(",")]
            return table.end()
        unique = name if len(self.scopes) == 1 else f"{name}#{self.count}"
        self.scopes[-1][name] = Symbol(unique)
        self.kernel.labels[unique] = len(self.kernel.instructions)
        return at

    def _statement(self, text, line):
        if text.startswith(".reg"):
            return self._registers(text)
        if text.startswith(".pragma"):
            return None
        if text.startswith("."):
            variable = parse_variable(text)
            if variable.space != "param":  # else an argument of a call
                self.kernel.variables[variable.name] = variable
            return None
        predicate, rest = None, text
        if match := _PREDICATE.match(text):
            predicate = dataclasses.replace(
                self._operand(match[2], self.scopes), negated=match[1] == "!"
            )
            rest = text[match.end() :]
        opcode, *extra = re.split(r"\s+", rest, maxsplit=1)
        instruction = Instruction(
            opcode, (), predicate, line, " ".join(text.split()), self.source,
            len(self.kernel.instructions),
        )  # fmt: skip
        self.kernel.instructions.append(instruction)
        self.pending.append((instruction, split(extra[0]) if extra else [], list(self.scopes)))
        return None

    def _registers(self, text):
        kind, names = re.match(r"\.reg\s*\.(\w+)\s+(.*)", text, re.S).groups()
        suffix = "" if len(self.scopes) == 1 else f"#{self.count}"
        scope = self.scopes[-1]
        for name in (n.strip() for n in names.split(",")):
            if match := re.match(r"(.*)<(\d+)>$", name):
                for i in range(int(match[2])):
                    scope[f"{match[1]}{i}"] = Register(f"{match[1]}{i}{suffix}", kind)
            else:
                scope[name] = Register(name + suffix, kind)

    def _operand(self, text, scopes):
        if text.startswith("{") or text.startswith("("):
            return Vector(tuple(self._operand(o, scopes) for o in split(text[1:-1])))
        if text.startswith("["):
            match = _MEMORY.match(text)
            if not match:
                raise UnsupportedPTX(f"{self.kernel.name}: address {text}")
            offset = int(match[3], 0) if match[3] else 0
            return Address(self._operand(match[1], scopes), -offset if match[2] == "-" else offset)
        if "|" in text:
            return Vector(tuple(self._operand(o.strip(), scopes) for o in text.split("|")))
        if text.startswith("!"):
            return dataclasses.replace(self._operand(text[1:].strip(), scopes), negated=True)
        for scope in reversed(scopes):
            if text in scope:
                return scope[text]
        if text in SPECIAL:
            return Register(text, "u32")
        if text == "_":
            return Register("_", "b32")
        if _NUMBER.match(text):
            return Immediate(text)
        if match := re.match(r"([\w$]+)\s*\+\s*(\d+)$", text):
            return Address(Symbol(match[1]), int(match[2]))
        if text.startswith("%"):
            raise UnsupportedPTX(f"{self.kernel.name}: register {text}")
        if text == "WARP_SZ":
            return Immediate("32")
        return Symbol(text)


def parse_variable(text):
    match = _VARIABLE.match(" ".join(text.split()))
    if not match or match[3] not in BYTES:
        raise UnsupportedPTX(text.strip().splitlines()[0] if text.strip() else "an empty statement")
    space, align, kind, name, dims, initial = match.groups()
    itemsize = BYTES[kind]
    vector = int(v[1]) if (v := re.search(r"\.v([24])\b", text)) else 1
    nbytes = itemsize * vector
    for dim in re.findall(r"\[(\d*)\]", dims):
        nbytes = nbytes * int(dim) if dim and nbytes is not None else None
    return Variable(name, space, int(align or itemsize * vector), itemsize, nbytes, initial)


def split(text):
    """Splits at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def _initial(variable):
    data = np.zeros(-(-(variable.nbytes or 0) // 8) * 8 + 8, np.uint8)
    if variable.initial:
        values = [v.strip() for v in variable.initial.strip("{} ").split(",")]
        if not all(_NUMBER.match(v) for v in values):
            raise UnsupportedPTX(f"initial value of {variable.name}: {variable.initial}")
        words = [int(v[2:], 16) if v[:2] in ("0f", "0d", "0F", "0D") else int(v.rstrip("U"), 0)
                 for v in values]  # fmt: skip
        raw = b"".join(
            (w % (1 << 8 * variable.itemsize)).to_bytes(variable.itemsize, "little") for w in words
        )
        data[: len(raw)] = np.frombuffer(raw, np.uint8)
    return data


def _blank(match):
    """Replaces comments by spaces, line by line; strings stay."""
    if match[0].startswith('"'):
        return match[0]
    return re.sub(r"[^\n]", " ", match[0])


def _closing(text, opening):
    depth = 0
    for match in _BRACE.finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise UnsupportedPTX("a brace that nothing closes")
