"""The findings of the emulator: each check must find its planted bug, and pass the corrected
kernel."""

import numpy as np
import ptx_emulator
import pytest
from ptx_emulator.memory import poison
from ptx_emulator.snippet import HEADER, execute, kernel

pytestmark = pytest.mark.usefixtures("own_coverage")

TILE = ".shared .align 16 .b8 tile[512];"


def findings(text, *arrays, **options):
    """The kinds of findings that a launch reports; none for a correct launch."""
    try:
        execute(text, *arrays, **options)
    except ptx_emulator.Findings as error:
        assert str(error) and error.findings[0].line > 0
        return [finding.kind for finding in error.findings]
    return []


AT = "mul.wide.u32 %x0, %tid, 4; add.s64 %x1, %in0, %x0;"
WORD = "shl.b32 %r0, %tid, 2; mov.u32 %r1, tile; add.u32 %r0, %r0, %r1;"
COPY = (
    "shl.b32 %r0, %tid, 4; mov.u32 %r1, tile; add.u32 %r0, %r0, %r1;"
    "mul.wide.u32 %x0, %tid, 16; add.s64 %x1, %in0, %x0;"
    "cp.async.cg.shared.global [%r0], [%x1], 16; cp.async.commit_group;"
)
READ_BACK = "xor.b32 %r2, %r0, 124; ld.shared.u32 %r3, [%r2];"  # another lane's word

# name: (kind, body, text of {} in the buggy kernel, text of {} in the correct one, launch options)
CASES = {
    "off by one": ("bounds", AT + "st.global.u32 [%x1{}], %tid;", "+4", ""),
    "before the start": ("bounds", AT + "st.global.u32 [%x1{}], %tid;", "+-4", ""),
    "a tail without its mask": (
        "bounds", AT + "setp.lt.u32 %p0, %tid, {}; @%p0 st.global.u32 [%x1], %tid;", "64", "32",
        {"block": 64},
    ),
    "an offset of 32 bits that overflows": (
        "bounds",
        "mov.u32 %r2, 0x40000000; mov.u32 %r3, 4; mov.u64 %x3, 0x100000000; {}"
        "sub.s64 %x0, %x0, %x3; add.s64 %x1, %in0, %x0; st.global.u32 [%x1], 7;",
        "mul.lo.u32 %r4, %r2, %r3; cvt.u64.u32 %x0, %r4;",
        "mul.wide.u32 %x0, %r2, %r3;",
    ),
    "past the shared memory": ("bounds", WORD + "st.shared.u32 [%r0+{}], %tid;", "388", "384"),
    "a vector not aligned": (
        "alignment", "mov.u64 %x1, %in0; {} st.global.v2.u32 [%x1], {{%tid, %tid}};",
        "add.s64 %x1, %x1, 4;", "", {"block": 1},
    ),
    "a shared vector not aligned": (
        "alignment", "mov.u32 %r0, tile; st.shared.v4.u32 [%r0+{}], {{%tid, %tid, %tid, %tid}};",
        "8", "16", {"block": 1},
    ),
    "shared memory that nobody wrote": (
        "uninitialized", WORD + "{} bar.sync 0; ld.shared.u32 %r2, [%r0];",
        "", "st.shared.u32 [%r0], %tid;",
    ),
    "half of a word that nobody wrote": (
        "uninitialized",
        WORD + "mov.u16 %h0, 1; st.shared.u16 [%r0], %h0; {} ld.shared.u32 %r2, [%r0];",
        "", "st.shared.u16 [%r0+2], %h0;",
    ),
    "a register stored before it is set": (
        "uninitialized",
        AT + "setp.lt.u32 %p0, %tid, {}; @%p0 mov.u32 %r5, 1; add.u32 %r6, %r5, 1;"
        "st.global.u32 [%x1], %r6;",
        "31", "32",
    ),
    "a branch on a register that is not set": (
        "uninitialized", "{} setp.eq.u32 %p1, %r9, 0; @%p1 bra L; L:", "", "mov.u32 %r9, 0;",
    ),
    "a lost barrier": (
        "race",
        WORD + "st.shared.u32 [%r0], %tid; {} xor.b32 %r2, %r0, 128; ld.shared.u32 %r3, [%r2];",
        "", "bar.sync 0;", {"block": 64},
    ),
    "a lost barrier before the next write": (
        "race",
        WORD + "st.shared.u32 [%r0], %tid; bar.sync 0; xor.b32 %r2, %r0, 128;"
        "ld.shared.u32 %r3, [%r2]; {} st.shared.u32 [%r0], %r3;",
        "", "bar.sync 0;", {"block": 64},
    ),
    "a lost barrier within a warp": (
        "race", WORD + "st.shared.u32 [%r0], %tid; {}" + READ_BACK, "", "bar.warp.sync -1;",
    ),
    "a shuffle is no barrier": (
        "race", WORD + "st.shared.u32 [%r0], %tid; {}" + READ_BACK,
        "shfl.sync.idx.b32 %r4, %tid, 0, 31, -1;", "bar.warp.sync -1;",
    ),
    "bar.warp.sync between two warps": (
        "race",
        WORD + "st.shared.u32 [%r0], %tid; {} xor.b32 %r2, %r0, 128; ld.shared.u32 %r3, [%r2];",
        "bar.warp.sync -1;", "bar.sync 0;", {"block": 64},
    ),
    "two values for one word": (
        "race", "mov.u32 %r1, tile; st.shared.u32 [%r1], {};", "%tid", "7",
    ),
    "bytes of one word are no race": (
        "race", "mov.u32 %r1, tile; add.u32 %r1, %r1, {}; st.shared.u8 [%r1], %tid;", "0", "%tid",
    ),
    "many read, one writes": (
        "race",
        "mov.u32 %r1, tile; setp.eq.u32 %p0, %tid, 0; @%p0 st.shared.u32 [%r1], 1; bar.sync 0;"
        "ld.shared.u32 %r2, [%r1]; {} @%p0 st.shared.u32 [%r1], 2;",
        "", "bar.sync 0;", {"block": 64},
    ),
    "ldmatrix of a lane's row": (
        "race",
        "shl.b32 %r0, %tid, 4; mov.u32 %r1, tile; add.u32 %r0, %r0, %r1;"
        "st.shared.v4.u32 [%r0], {{%tid, %tid, %tid, %tid}}; {}"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r0];",
        "", "bar.warp.sync -1;",
    ),
    "an atomic and a plain read": (
        "race",
        "mov.u32 %r1, tile; setp.eq.u32 %p0, %tid, 0; @%p0 st.shared.u32 [%r1], 0; bar.sync 0;"
        "atom.shared.add.u32 %r2, [%r1], 1; {} ld.shared.u32 %r3, [%r1];",
        "", "bar.sync 0;", {"block": 64},
    ),
    "a copy that nobody waits for": (
        "async", COPY + "{} ld.shared.u32 %r2, [%r0];", "", "cp.async.wait_group 0;",
    ),
    "a wait for all but the last group": (
        "async", COPY + "cp.async.wait_group {}; ld.shared.u32 %r2, [%r0];", "1", "0",
    ),
    "another thread's copy": (
        "race",
        COPY + "cp.async.wait_all; {} xor.b32 %r2, %r0, 16; ld.shared.u32 %r3, [%r2];",
        "", "bar.sync 0;",
    ),
    "a copy into what others still read": (
        "race",
        COPY + "cp.async.wait_all; bar.sync 0; xor.b32 %r2, %r0, 16; ld.shared.u32 %r3, [%r2]; {}"
        "cp.async.cg.shared.global [%r0], [%x1], 16; cp.async.wait_all;",
        "", "bar.sync 0;",
    ),
    "a source overwritten too early": (
        "async", COPY + "{} st.global.u32 [%x1], -1; cp.async.wait_all;", "", "cp.async.wait_all;",
    ),
    "a thread that leaves before a barrier": (
        "barrier", "setp.eq.u32 %p0, %tid, {}; @%p0 exit; bar.sync 0;", "3", "99",
    ),
    "two arms with a barrier each": (
        "barrier",
        "setp.lt.u32 %p0, %tid, {}; @%p0 bra L; bar.sync 0; bra E; L: bar.sync 0; E:", "8", "32",
        {"block": 64},
    ),
    "barriers of different numbers": (
        "barrier",
        "setp.lt.u32 %p0, %tid, 32; selp.b32 %r0, 1, {}, %p0; bar.sync %r0;", "2", "1",
        {"block": 64},
    ),
    "a barrier that one warp skips": (
        "barrier", "setp.lt.u32 %p0, %tid, {}; @%p0 bra E; bar.sync 0; E: bar.sync 1;", "32", "0",
        {"block": 64},
    ),
    "a shuffle without all its lanes": (
        "barrier",
        "setp.lt.u32 %p0, %tid, {}; @%p0 bra E; shfl.sync.idx.b32 %r0, %tid, 9, 31, -1;"
        "E: bar.sync 0;", "4", "0",
    ),
    "a lane that has exited": (
        "barrier",
        "setp.lt.u32 %p0, %tid, 4; @%p0 exit; shfl.sync.idx.b32 %r0, %tid, {}, 31, -1;", "3", "9",
    ),
    "a lane that the mask does not name": (
        "barrier",
        "setp.gt.u32 %p0, %tid, 15; @%p0 bra E; shfl.sync.idx.b32 %r0, %tid, {}, 31, 0xFFFF; E:",
        "20", "10",
    ),
    "a failed assertion": ("trap", "setp.lt.u32 %p0, %tid, {}; @%p0 trap;", "1", "0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bug_is_found_and_its_twin_is_not(name):
    kind, body, bug, twin, *options = CASES[name]
    options = options[0] if options else {}
    source = np.arange(128, dtype=np.uint32)  # 512 bytes; most kernels need 128

    def run(change):
        array = np.ascontiguousarray(source[:32] if "cp.async" not in body else source)
        return findings(kernel(body.format(change), 1, TILE), array, **options)

    assert run(bug) == [kind]
    assert run(twin) == []


def test_fresh_global_memory():
    text = kernel(AT + "ld.global.u32 %r0, [%x1];", 1)
    assert findings(text, poison(np.empty(32, np.uint32))) == ["uninitialized"]
    assert findings(text, poison(np.empty(32, np.uint32)), canary=False) == []
    assert findings(text, np.zeros(32, np.uint32)) == []


def test_a_copy_of_fresh_global_memory():
    text = kernel(COPY + "cp.async.wait_all;", 1, TILE)
    assert findings(text, poison(np.empty(128, np.uint32))) == ["uninitialized"]


def test_a_copy_of_fewer_bytes_reads_no_more_and_fills_with_zeros():
    data, out = np.full(4, 7, np.uint32), np.zeros(8, np.uint32)
    body = """
    mov.u32 %r0, tile; shl.b32 %r1, %tid, 4; add.u32 %r0, %r0, %r1; mul.wide.u32 %x0, %tid, 4096;
    add.s64 %x1, %in0, %x0; setp.eq.u32 %p0, %tid, 0; selp.b32 %r2, 8, 0, %p0;
    cp.async.ca.shared.global [%r0], [%x1], 16, %r2; cp.async.wait_all;
    ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r0];
    mul.wide.u32 %x0, %tid, 16; add.s64 %x1, %in1, %x0;
    st.global.v4.u32 [%x1], {%r4, %r5, %r6, %r7};
    """
    execute(kernel(body, 2, TILE), data, out, block=2)
    assert out.tolist() == [7, 7, 0, 0, 0, 0, 0, 0]


def test_a_finding_names_the_place():
    text = kernel("bar.sync 0;" + AT + "st.global.u32 [%x1+64], %tid;", 1)
    with pytest.raises(ptx_emulator.Findings) as raised:
        execute(text, np.zeros(32, np.uint32))
    (finding,) = raised.value.findings
    assert (finding.kernel, finding.block, finding.thread, finding.threads) == (
        "k",
        (0, 0, 0),
        (16, 0, 0),
        16,
    )
    assert finding.text == "st.global.u32 [%x1+64], %tid"
    assert text.splitlines()[finding.line - 1].endswith(finding.text + ";")
    assert "store of 4 bytes at byte 128 of an allocation of 128 bytes" in str(finding)


@pytest.mark.parametrize(
    "line, said",
    [
        ("frobnicate.b32 %r0, %r1;", "no instruction frobnicate"),
        ("add.s32.loud %r0, %r1, %r2;", "modifier .loud"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0}, {%r1}, {%r2}, {%r3};", "m16n8k16"),
        ("add.s32 %h0, %r1, %r2;", ".b16, not .s32"),
        ("call.uni puts, (%r0);", "calls of functions"),
        ("cvt.rn.e4m3x2.f32 %h0, %f0, %f1;", "none of"),
    ],
)
def test_unknown_ptx_is_an_error(line, said):
    with pytest.raises(ptx_emulator.UnsupportedPTX, match=said.replace(".", r"\.")):
        execute(kernel(f"setp.ne.u32 %p0, %tid, %tid; @%p0 bra E; {line} E:"))


def test_a_launch_that_cuda_refuses():
    text = kernel("")
    with pytest.raises(ValueError, match="CUDA allows"):
        execute(text, block=1056)
    with pytest.raises(ValueError, match="compiled for"):
        execute(text.replace("k()\n", "k()\n.reqntid 64\n"), block=32)
    assert HEADER in text
