"""The emulator's warps, branches, barriers, state spaces and devices, against PTX's rules and the
results of numpy and torch."""

import numpy as np
import ptx_emulator
import pytest
from ptx_emulator.snippet import HEADER, execute, kernel, run

pytestmark = pytest.mark.usefixtures("own_coverage")


@pytest.mark.parametrize(
    "how, by, clamp, source",
    [
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
        ("down", 4, 31, lambda i: i + 4 if i + 4 < 32 else i),
        ("down", 2, 0x181F, lambda i: i + 2 if i % 8 + 2 < 8 else i),
        ("idx", 9, 31, lambda i: 9),
        ("idx", 1, 0x1C1F, lambda i: i // 4 * 4 + 1),
    ],
)
def test_shfl(how, by, clamp, source):
    x = np.arange(64, dtype=np.uint32) * 3
    value, inside = run(
        f"shfl.sync.{how}.b32 %d0|%d1, %a0, {by}, {clamp}, -1;", "b32 pred", ("u32", x)
    )
    assert value.tolist() == [3 * (i // 32 * 32 + source(i % 32)) for i in range(64)]
    moved = [source(i % 32) != i % 32 for i in range(64)]
    if how in ("up", "down", "bfly"):
        assert inside.tolist() == moved


def test_votes_matches_and_sums():
    body = """
    .reg .pred odd; .reg .b32 bit; and.b32 bit, %a0, 1; setp.ne.u32 odd, bit, 0;
    vote.sync.ballot.b32 %d0, odd, -1; vote.sync.any.pred %d1, odd, -1;
    vote.sync.all.pred %d2, !odd, -1; match.any.sync.b32 %d3, bit, -1;
    redux.sync.add.s32 %d4, %a0, -1; redux.sync.max.u32 %d5, %a0, -1;
    """
    x = np.concatenate([np.arange(32), np.zeros(32)]).astype(np.int32)
    ballot, some, none, match, total, most = run(body, "b32 pred pred b32 s32 u32", ("s32", x))
    assert ballot[0] == 0xAAAAAAAA and ballot[32] == 0
    assert (some[0], some[32], none[0], none[32]) == (1, 0, 0, 1)
    assert match[0] == 0x55555555 and match[1] == 0xAAAAAAAA and match[32] == 0xFFFFFFFF
    assert (total[0], total[32], most[5]) == (496, 0, 31)


@pytest.mark.parametrize(
    "kind, k, shape", [("bf16", 16, "m16n8k16"), ("f16", 16, "m16n8k16"), ("f16", 8, "m16n8k8"),
                       ("tf32", 8, "m16n8k8"), ("tf32", 4, "m16n8k4")]
)  # fmt: skip
def test_mma_is_a_product(kind, k, shape):
    """Fragments are laid out element by element as in PTX's figures."""
    rng = np.random.default_rng(k)
    A, B, C = (
        rng.integers(-9, 9, (16, k)),
        rng.integers(-9, 9, (k, 8)),
        rng.integers(-9, 9, (16, 8)),
    )
    per = 1 if kind == "tf32" else 2

    def bits(x):
        x = np.float32(x)
        if kind == "tf32":
            return int(x.view(np.uint32))
        return int(np.float16(x).view(np.uint16)) if kind == "f16" else int(x.view(np.uint32)) >> 16

    def word(elements):
        return sum(bits(e) << 16 * i for i, e in enumerate(elements))

    a, b, c = ([[] for _ in range(32)] for _ in range(3))
    for lane in range(32):
        g, q = divmod(lane, 4)
        for half in range(k // (4 * per)):
            columns = [half * 4 * per + q * per + i for i in range(per)]
            a[lane] += [word([A[row, j] for j in columns]) for row in (g, g + 8)]
            b[lane].append(word([B[j, g] for j in columns]))
        c[lane] = [float(C[row, 2 * q + i]) for row in (g, g + 8) for i in range(2)]
    names = iter(range(99))
    operands, inputs = [], []
    for kinds, fragment in (("b32", a), ("b32", b), ("f32", c)):
        columns = list(zip(*fragment, strict=True))
        operands.append("{" + ", ".join(f"%a{next(names)}" for _ in columns) + "}")
        inputs += [(kinds, column) for column in columns]
    opcode = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32"
    body = f"{opcode} {{%d0, %d1, %d2, %d3}}, {', '.join(operands)};"
    d = run(body, "f32 f32 f32 f32", *inputs)
    D = A @ B + C
    for lane in range(32):
        g, q = divmod(lane, 4)
        assert [x[lane] for x in d] == [
            D[g, 2 * q],
            D[g, 2 * q + 1],
            D[g + 8, 2 * q],
            D[g + 8, 2 * q + 1],
        ]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count, trans):
    data = np.arange(32 * 8, dtype=np.uint16)
    out = np.zeros((count, 32), np.uint32)
    names = ", ".join(f"%r{i + 8}" for i in range(count))
    stores = "\n".join(f"st.global.b32 [%x1+{128 * i}], %r{i + 8};" for i in range(count))
    text = kernel(
        f"""
        mul.wide.u32 %x0, %tid, 16; add.s64 %x1, %in0, %x0;
        ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%x1];
        mov.u32 %r4, tile; mad.lo.u32 %r5, %tid, 16, %r4;
        st.shared.v4.b32 [%r5], {{%r0, %r1, %r2, %r3}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r5];
        mul.wide.u32 %x0, %tid, 4; add.s64 %x1, %in1, %x0;
        {stores}
        """,
        2, ".shared .align 16 .b8 tile[512];",
    )  # fmt: skip
    execute(text, data, out)
    tiles = data.reshape(4, 8, 8)[:count]
    tiles = tiles.transpose(0, 2, 1) if trans else tiles
    assert np.array_equal(out, np.ascontiguousarray(tiles).view(np.uint32).reshape(count, 32))


def test_atomics_go_in_the_order_of_threads():
    total, order = np.array([100], np.int32), np.zeros(64, np.int32)
    text = kernel(
        "atom.global.add.s32 %r0, [%in0], 2; mul.wide.u32 %x0, %tid, 4; add.s64 %x1, %in1, %x0;"
        "st.global.u32 [%x1], %r0; red.global.max.s32 [%in0], %tid;", 2,
    )  # fmt: skip
    execute(text, total, order, block=64)
    assert total[0] == 228 and order.tolist() == list(range(100, 228, 2))


def test_threads_that_part_meet_again():
    """Loops of different lengths, then a shuffle that needs the whole warp."""
    out = np.zeros(64, np.uint32)
    text = kernel(
        """
        mov.u32 %r0, 0; and.b32 %r1, %tid, 7;
        LOOP: setp.eq.u32 %p0, %r1, 0; @%p0 bra DONE;
        add.u32 %r0, %r0, %r1; sub.u32 %r1, %r1, 1; bra LOOP;
        DONE: shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
        mul.wide.u32 %x0, %tid, 4; add.s64 %x1, %in0, %x0; st.global.u32 [%x1], %r2;
        """, 1,
    )  # fmt: skip
    counts = execute(text, out, block=64).counts
    triangle = [n * (n + 1) // 2 for n in range(8)]
    assert out.tolist() == [triangle[(i ^ 1) & 7] for i in range(64)]
    assert counts.warp_instructions < counts.thread_instructions < 32 * counts.warp_instructions


def test_a_table_of_branches():
    out = np.zeros(32, np.uint32)
    text = kernel(
        """
        and.b32 %r0, %tid, 1; mov.u32 %r1, 5;
        TABLE: .branchtargets EVEN, ODD;
        brx.idx %r0, TABLE;
        ODD: mov.u32 %r1, 7;
        EVEN: add.u32 %r1, %r1, %tid;
        mul.wide.u32 %x0, %tid, 4; add.s64 %x1, %in0, %x0; st.global.u32 [%x1], %r1;
        """, 1,
    )  # fmt: skip
    execute(text, out)
    assert out.tolist() == [i + (7 if i & 1 else 5) for i in range(32)]


def test_barrier_that_reduces():
    out = np.zeros(3, np.uint32)
    text = kernel(
        """
        setp.lt.u32 %p0, %tid, 40; setp.lt.u32 %p1, %tid, 99; setp.eq.u32 %p5, %tid, 63;
        bar.red.popc.u32 %r0, 0, %p0; bar.red.and.pred %p2, 0, %p0; bar.red.or.pred %p3, 0, !%p1;
        selp.b32 %r1, 1, 0, %p2; selp.b32 %r2, 1, 0, %p3;
        @!%p5 bra END;
        st.global.u32 [%in0], %r0; st.global.u32 [%in0+4], %r1; st.global.u32 [%in0+8], %r2;
        END:
        """, 1,
    )  # fmt: skip
    execute(text, out, block=64)
    assert out.tolist() == [40, 0, 0]


def test_every_state_space_through_a_generic_address():
    """Each thread's address is in local, shared, constant or global memory, chosen by its
    number."""
    data, out = np.array([1000], np.uint32), np.zeros(32, np.uint32)
    text = kernel(
        """
        add.u32 %r0, %tid, 100;
        mov.u64 %x0, depot; cvta.local.u64 %x1, %x0; st.local.u32 [%x0], %r0;
        mov.u64 %x2, tile; cvta.shared.u64 %x3, %x2;
        setp.eq.u32 %p0, %tid, 0; @%p0 st.shared.u32 [tile], 500; bar.sync 0;
        mov.u64 %x4, table; ld.const.u32 %r1, [table+4];
        and.b32 %r2, %tid, 3;
        setp.eq.u32 %p1, %r2, 1; setp.eq.u32 %p2, %r2, 2; setp.eq.u32 %p3, %r2, 3;
        selp.b64 %x5, %x3, %x1, %p1; selp.b64 %x5, %x4, %x5, %p2; selp.b64 %x5, %in0, %x5, %p3;
        ld.u32 %r3, [%x5]; add.u32 %r3, %r3, %r1;
        mul.wide.u32 %x6, %tid, 4; add.s64 %x7, %in1, %x6; st.u32 [%x7], %r3;
        """, 2, ".local .align 8 .b8 depot[8]; .shared .align 4 .b8 tile[4];",
        ".const .align 4 .u32 table[2] = {7, 0x10000};",
    )  # fmt: skip
    execute(text, data, out)
    expected = [[100 + i, 500, 7, 1000][i & 3] + 0x10000 for i in range(32)]
    assert out.tolist() == expected


def test_a_struct_by_value_and_sizes_of_the_grid():
    text = (
        HEADER
        + """
    .visible .entry k(.param .align 8 .b8 k_param_0[24], .param .u64 .ptr .align 1 k_param_1)
    {
        .reg .b32 %r<9>; .reg .b64 %x<9>;
        ld.param.u64 %x0, [k_param_1]; mov.b64 %x1, k_param_0; ld.param.v2.u32 {%r0, %r1}, [%x1+8];
        mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %ctaid.x;
        mad.lo.s32 %r5, %r2, %r3, %r4; mov.u32 %r6, %ntid.x; mov.u32 %r7, %tid.x;
        mad.lo.s32 %r5, %r5, %r6, %r7; mad.lo.s32 %r0, %r0, %r5, %r1;
        mul.wide.u32 %x2, %r5, 4; add.s64 %x2, %x0, %x2; st.global.u32 [%x2], %r0;
    }"""
    )
    out = np.zeros(5 * 3 * 40, np.uint32)
    struct = np.array([0, 3, 11, 0], np.uint64)[:3].copy()
    struct.view(np.uint32)[2:4] = 3, 11
    ptx_emulator.launch(
        ptx_emulator.Module(text), "k", (5, 3), (40,), [struct.tobytes(), out.ctypes.data],
        ptx_emulator.Memory.of(out),
    )  # fmt: skip
    assert out.tolist() == [3 * i + 11 for i in range(out.size)]


def test_bank_conflicts_are_counted():
    def conflicts(stride):
        text = kernel(f"mul.lo.u32 %r0, %tid, {stride}; st.shared.u32 [%r0], %tid;", 0,
                      ".shared .align 16 .b8 tile[8192];")  # fmt: skip
        return execute(text, banks=True).counts.bank_conflicts

    assert [conflicts(stride) for stride in (4, 8, 128, 132)] == [0, 1, 31, 0]


def test_coverage_tells_what_has_not_run():
    text = kernel("setp.gt.u32 %p0, %tid, 99; @%p0 bra SKIP; bra END; SKIP: mov.u32 %r0, 1; END:")
    execute(text)
    coverage, key = ptx_emulator.coverage, ("k", ptx_emulator.Module(text).hash)
    assert [row[1] for row in coverage.missed(*key)] == ["mov.u32 %r0, 1"]
    saved = coverage.to_json()
    coverage.clear()
    coverage.merge(saved)
    assert [row[1] for row in coverage.missed(*key)] == ["mov.u32 %r0, 1"]
    assert "of 6 instructions" in coverage.report() and "mov.u32 %r0, 1" in coverage.report()


def test_a_masked_copy_of_an_access_may_be_missed():
    """As for a row of 257 in a block of 512: but only if another copy has run, only in a Triton
    kernel, and only for loads and stores with a mask."""

    def excused(ran, *accesses):
        coverage = type(ptx_emulator.coverage)()
        coverage.kernels["k", "h"] = [(i, *access, None) for i, access in enumerate(accesses)]
        coverage.executed["k", "h"] = np.array(ran)
        return [why is not None for why in coverage.excused(("k", "h"))]

    load = "@%p3 ld.global.b32 { %r1 }, [ %rd1 + 0 ]"
    here, bare = (load, "lang.py:28"), ("ld.global.b32 { %r1 }, [ %rd1 ]", "lang.py:28")
    assert excused([True, False], here, here) == [True, True]
    assert excused([False, False], here, here) == [False, False]
    assert excused([True, False], here, (load, "lang.py:29")) == [True, False]
    for other in ((load, "attention.cu:28"), ("@%p3 bra END", "lang.py:28"), bare):
        assert excused([True, False], other, other) == [False, False]


# Devices
