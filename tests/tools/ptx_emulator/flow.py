"""Splits a kernel into straight runs of instructions, and finds registers that some path leaves
unset.

Threads wait for others only where a run begins: at the target of a branch, after a branch, a
barrier or an exit, and at an instruction that needs the whole warp. A run executes without checking
any PC.

A register is watched at run time only if some path from the entry to a read of it does not write
it, or if it is computed from such a register. Computing with an unset value is allowed: compilers
do so in lanes whose results are unused. So arithmetic, selp and shfl propagate whether their
operands were set. A finding is raised when the value escapes: as an address, a predicate, a stored
value, or an operand of mma or a vote.
"""

import dataclasses

import numpy as np

from .findings import UnsupportedPTX
from .parser import read_body
from .registers import INSTRUCTIONS, Decoding, Slots
from .syntax import SPECIAL, Address, Register, Vector, place

ENDS = {"bra", "brx", "ret", "exit", "trap", "bar", "barrier"}
GATHERS = {"shfl", "vote", "match", "redux", "mma", "ldmatrix", "activemask"}
NO_RESULT = {"st", "red", "cp", "prefetch", "prefetchu", "membar", "fence", "bra", "brx", "ret",
             "exit", "trap", "call", "createpolicy", "discard", "applypriority", "nanosleep",
             "griddepcontrol"}  # fmt: skip
ESCAPES = NO_RESULT | GATHERS - {"shfl"} | {"ld", "ldu", "atom", "bar", "barrier"}


@dataclasses.dataclass
class Run:
    start: int
    stop: int  # the first instruction after it
    ops: list  # op(m, t), in order
    always: object = None  # array: its instructions without a predicate, which always run
    gather: object = None  # (m, t) -> the threads whose warps are complete, or None
    end: object = None  # (m, t) -> the PC where all of them continue, or None if they diverge


class Program:
    """A decoded kernel."""

    def __init__(self, kernel):
        read_body(kernel)
        self.kernel = kernel
        self.size = len(kernel.instructions)
        self.dynamic_start = self._place()
        self.slots = Slots(kernel)
        self.grain = 16  # bytes: the narrowest access to shared memory, set by the decoders
        self.gathers, self.ends, self.moves = {}, {}, {}  # by PC, from the decoders
        ops = [self._decode(ins) for ins in kernel.instructions]
        self.watched = {}  # register name: number
        successors = self._successors()
        self.runs = self._runs(successors)
        self._watch(successors, ops)
        for run in self.runs.values():
            run.ops = [ops[pc] for pc in range(run.start, run.stop) if ops[pc] is not None]
            inside = kernel.instructions[run.start : run.stop]
            run.always = np.array([i.predicate is None or i.op in ENDS for i in inside])

    def _place(self):
        """Assigns addresses to variables: static shared memory first, then the dynamic memory of
        the launch."""
        kernel = self.kernel
        every = [*kernel.module.variables.values(), *kernel.variables.values()]
        shared = [v for v in every if v.space == "shared"]
        self.shared_bytes = place([v for v in shared if v.nbytes is not None])
        dynamic = [v for v in shared if v.nbytes is None]
        start = -(-self.shared_bytes // 16) * 16 if dynamic else self.shared_bytes
        start = max([-(-start // v.align) * v.align for v in dynamic], default=start)
        for v in dynamic:
            v.offset = start
        self.local_bytes = place([v for v in every if v.space == "local"])
        return start

    def _decode(self, ins):
        build = INSTRUCTIONS.get(ins.op)
        where = f"{self.kernel.name}, PTX line {ins.line}: {ins.text}"
        if build is None:
            raise UnsupportedPTX(f"{where}: no instruction {ins.op}")
        decoding = Decoding(ins, self.slots, self)
        try:
            op = build(decoding)
        except UnsupportedPTX as error:
            raise UnsupportedPTX(f"{where}: {error}") from None
        if decoding.mods.left:
            raise UnsupportedPTX(f"{where}: modifier .{' .'.join(decoding.mods.left)}")
        if ins.predicate is None or ins.op in ENDS:
            return op
        if ins.op in GATHERS:
            raise UnsupportedPTX(f"{where}: predicated, though it is for the whole warp")
        return self._predicated(op, ins)

    def _predicated(self, op, ins):
        p, negated, pc = self.slots.read(ins.predicate, "pred"), ins.predicate.negated, ins.pc

        def guarded(m, t):
            keep = m.R[p][t]
            if negated:
                keep = ~keep
            if keep.all():
                m.executed[pc] = True
                op(m, t)
            elif keep.any():
                m.executed[pc] = True
                op(m, m.ids[t][keep])

        return guarded

    def _successors(self):
        """For each instruction, its possible successors."""
        kernel, found = self.kernel, []
        for pc, ins in enumerate(kernel.instructions):
            after = [pc + 1]
            if ins.op == "bra":
                after = [kernel.labels[ins.operands[0].name]] + after * (ins.predicate is not None)
            elif ins.op == "brx":
                after = [kernel.labels[t] for t in kernel.tables[ins.operands[1].name]]
            elif ins.op in ("ret", "exit", "trap"):
                after = after * (ins.predicate is not None)
            found.append([a for a in after if a < self.size])
        return found

    def _runs(self, successors):
        starts = {0, *self.kernel.labels.values()}
        for pc, ins in enumerate(self.kernel.instructions):
            if ins.op in ENDS:
                starts.update(successors[pc], (pc + 1,))
            elif pc in self.gathers:
                starts.add(pc)
        starts = sorted(s for s in starts if s < self.size)
        runs = {}
        for start, stop in zip(starts, [*starts[1:], self.size], strict=True):
            gather, end = self.gathers.get(start), self.ends.get(stop - 1)
            runs[start] = Run(start, stop, [], gather=gather, end=end)
        return runs

    def _watch(self, successors, ops):
        """Definite assignment, forward. A register is set after a run if it is set before it or is
        written in it without a predicate; it is set before a run if it is set after all
        predecessors."""
        instructions, number = self.kernel.instructions, {}

        def bit(name):
            return 1 << number.setdefault(name, len(number))

        writes = [0 if i.predicate else sum(map(bit, set(results(i)))) for i in instructions]
        before = {0: 0}
        todo = [0]
        while todo:
            run = self.runs[todo.pop()]
            state = before[run.start]
            for pc in range(run.start, run.stop):
                state |= writes[pc]
            after = successors[run.stop - 1]
            for pc in after:
                new = state & before[pc] if pc in before else state
                if before.get(pc) != new:
                    before[pc] = new
                    todo.append(pc)
        unset = set()
        for start, state in before.items():
            for pc in range(start, self.runs[start].stop):
                ins = instructions[pc]
                read = sources(ins) + ([ins.predicate.name] if ins.predicate else [])
                unset.update(n for n in read if not state & bit(n))
                state |= writes[pc]
        passes = [(results(i), sources(i)) for i in instructions if i.op not in ESCAPES]
        while more := {d for ds, ss in passes if unset.intersection(ss) for d in ds} - unset:
            unset |= more
        self.watched = {name: i for i, name in enumerate(sorted(unset))}
        for pc, ins in enumerate(instructions):
            read = [self.watched[n] for n in sources(ins) if n in unset]
            written = [self.watched[n] for n in results(ins) if n in unset]
            if read or written or (ins.predicate and ins.predicate.name in unset):
                self._watch_one(pc, ins, read, written, ops)

    def _watch_one(self, pc, ins, read, written, ops):
        """Puts the check before the instruction's function."""
        names = {i: n for n, i in self.watched.items()}
        keep, escapes = ins.predicate, ins.op in ESCAPES
        p = self.slots.read(keep, "pred") if keep else None
        condition = self.watched.get(keep.name) if keep else None
        moved, chosen = self.moves.get(pc), self._choice(ins)

        def check(m, t):
            if keep:
                demand(m, condition, t)
                t = m.ids[t][m.R[p][t] != keep.negated]
            ok = True
            if escapes:
                for i in read:
                    demand(m, i, t)
            elif moved:
                ok = m.set[read[0]][moved(m, t)] if read else True
            elif chosen:
                ok = chosen(m, t)
            else:
                for i in read:
                    ok = ok & m.set[i][t]
            for i in written:
                m.set[i][t] = ok

        def demand(m, i, t):
            if i is not None and not m.set[i][t].all():
                what = f"uses {names[i]}, which was computed from what nothing has written"
                raise m.fault(ins, "uninitialized", what, m.ids[t][~m.set[i][t]])

        def checked(function):
            def run(m, t):
                check(m, t)
                return function(m, t)

            return run

        if pc in self.ends:
            run = next(r for r in self.runs.values() if r.stop == pc + 1)
            run.end = checked(run.end)
        else:
            ops[pc] = checked(ops[pc])

    def _choice(self, ins):
        """For selp d, a, b, p: whether the value that p chooses is set, and whether p is."""
        if ins.op != "selp":
            return None
        a, b, p = (self.watched.get(next(iter(_names(o)), None)) for o in ins.operands[1:])
        slot = self.slots.read(ins.operands[3], "pred")

        def known(m, i, t):
            return True if i is None else m.set[i][t]

        def chosen(m, t):
            return np.where(m.R[slot][t], known(m, a, t), known(m, b, t)) & known(m, p, t)

        return chosen


def results(ins):
    """The registers that an instruction writes."""
    found = [] if _has_no_result(ins) or not ins.operands else _names(ins.operands[0])
    return [*found, "%cc"] if "cc" in ins.opcode.split(".") else found


def sources(ins):
    """The registers that an instruction reads, except its predicate."""
    operands = ins.operands[0 if _has_no_result(ins) else 1 :]
    found = [n for o in operands for n in _names(o)]
    return [*found, "%cc"] if ins.op in ("addc", "subc", "madc") else found


def _has_no_result(ins):
    return ins.op in NO_RESULT or (ins.op in ("bar", "barrier") and "red" not in ins.opcode)


def _names(operand):
    if isinstance(operand, Register):
        return [] if operand.name == "_" or operand.name in SPECIAL else [operand.name]
    if isinstance(operand, Vector):
        return [n for o in operand.items for n in _names(o)]
    return _names(operand.base) if isinstance(operand, Address) else []
