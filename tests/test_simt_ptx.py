"""PTX instructions of the interpreter of CUDA kernels, lane by lane, and a GEMM made of them."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from simt import SimtError, run
from tvm.script import tirx as T

ALL = 0xFFFFFFFF


def gemm(k, stages=3, wait=None, barrier=True):
    """c int32 [128, 128] = a int8 [128, K] @ b int8 [128, K]^T: cp.async, swizzle, ldmatrix, mma.

    wait: groups that may be pending when a stage is read; barrier: whether one follows the wait.
    """
    wait = stages - 2 if wait is None else wait
    tile, steps = 128 * 64, k // 64

    @T.prim_func(s_tir=True, private=True)
    def func(
        a: T.Buffer((128, k), "int8"),
        b: T.Buffer((128, k), "int8"),
        c: T.Buffer((128, 128), "int32"),
    ):
        for tx in T.thread_binding(256, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((stages * 2 * tile,), "int8", scope="shared.dyn")
                acc = T.alloc_buffer((64,), "uint32", scope="local")
                fa = T.alloc_buffer((16,), "uint32", scope="local")
                fb = T.alloc_buffer((8,), "uint32", scope="local")
                for i in T.unroll(64):
                    acc[i] = T.uint32(0)
                for step in range(steps + stages - 1):
                    if step >= stages - 1:
                        T.ptx["cp.async.wait_group"](wait)
                        if barrier:
                            T.cuda.cta_sync()
                    if step < steps:
                        for i in T.unroll(2):
                            row = T.Bind(tx // 4 + i * 64)
                            place = T.Bind(row * 64 + (tx % 4 ^ row // 2 % 4) * 16)
                            T.ptx["cp.async.cg.shared.global"](
                                T.address_of(sm[step % stages * 2 * tile + place]),
                                T.address_of(a[row, step * 64 + tx % 4 * 16]),
                                16,
                            )
                            T.ptx["cp.async.cg.shared.global"](
                                T.address_of(sm[(step % stages * 2 + 1) * tile + place]),
                                T.address_of(b[row, step * 64 + tx % 4 * 16]),
                                16,
                            )
                    T.ptx["cp.async.commit_group"]()
                    if step >= stages - 1:
                        stage = T.Bind((step - stages + 1) % stages * 2 * tile)
                        for kk in T.unroll(2):
                            for i in T.unroll(4):
                                r = T.Bind(tx // 32 // 4 * 64 + i * 16 + tx % 16)
                                chunk = T.Bind(kk * 2 + tx % 32 // 16 ^ r // 2 % 4)
                                T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                                    fa[i * 4],
                                    fa[i * 4 + 1],
                                    fa[i * 4 + 2],
                                    fa[i * 4 + 3],
                                    T.address_of(
                                        sm[
                                            stage
                                            + r * 64
                                            + (kk * 2 + tx % 32 // 16 ^ r // 2 % 4) * 16
                                        ]
                                    ),
                                )
                            for j in T.unroll(2):
                                r = T.Bind(tx // 32 % 4 * 32 + j * 16 + tx % 8 + tx % 32 // 16 * 8)
                                chunk = T.Bind(kk * 2 + tx % 16 // 8 ^ r // 2 % 4)
                                T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                                    fb[j * 4],
                                    fb[j * 4 + 1],
                                    fb[j * 4 + 2],
                                    fb[j * 4 + 3],
                                    T.address_of(sm[stage + tile + r * 64 + chunk * 16]),
                                )
                            for i in T.unroll(4):
                                for j in T.unroll(4):
                                    T.ptx["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"](
                                        acc[i * 16 + j * 4],
                                        acc[i * 16 + j * 4 + 1],
                                        acc[i * 16 + j * 4 + 2],
                                        acc[i * 16 + j * 4 + 3],
                                        fa[i * 4],
                                        fa[i * 4 + 1],
                                        fa[i * 4 + 2],
                                        fa[i * 4 + 3],
                                        fb[j * 2],
                                        fb[j * 2 + 1],
                                        acc[i * 16 + j * 4],
                                        acc[i * 16 + j * 4 + 1],
                                        acc[i * 16 + j * 4 + 2],
                                        acc[i * 16 + j * 4 + 3],
                                    )
                T.ptx["cp.async.wait_all"]()
                for i, j, e in T.grid(4, 4, 4):
                    c[
                        tx // 32 // 4 * 64 + i * 16 + tx % 32 // 4 + e // 2 * 8,
                        tx // 32 % 4 * 32 + j * 8 + tx % 4 * 2 + e % 2,
                    ] = T.reinterpret("int32", acc[i * 16 + j * 4 + e])

    return func


def gemm_operands(k):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (2, 128, k), dtype=np.int8)
    return a, b, np.full((128, 128), 0x55555555, np.int32)


def test_pipelined_int8_gemm_is_exact():
    a, b, c = gemm_operands(256)
    run(gemm(256), a, b, c)
    assert_array_equal(c, a.astype(np.int32) @ b.astype(np.int32).T)


def test_gemm_that_waits_for_too_few_groups():
    with pytest.raises(
        SimtError, match=r"read of byte \d+ of sm .* while cp.async into it is in flight"
    ):
        run(gemm(256, wait=2), *gemm_operands(256))


def test_gemm_without_barrier():
    with pytest.raises(
        SimtError, match=r"read of byte \d+ of sm .* no (cta|warp)_sync since thread \d+ wrote it"
    ):
        run(gemm(256, barrier=False), *gemm_operands(256))


MMA = {  # name: (registers of a, b, c), dtype of c
    "m8n8k16.row.col.s32.s8.s8.s32": (1, 1, 2, "uint32"),
    "m16n8k16.row.col.s32.s8.s8.s32": (2, 1, 4, "uint32"),
    "m16n8k32.row.col.s32.s8.s8.s32": (4, 2, 4, "uint32"),
    "m16n8k32.row.col.s32.u8.s8.s32": (4, 2, 4, "uint32"),
    "m16n8k8.row.col.f32.f16.f16.f32": (2, 1, 4, "float32"),
    "m16n8k16.row.col.f32.f16.f16.f32": (4, 2, 4, "float32"),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (4, 2, 4, "float32"),
}


def mma(name, a, b, c):
    """Run one mma; a, b uint32 [32, registers], c [32, registers]; c is overwritten."""
    na, nb, nc, dtype = MMA[name]
    instruction = f"mma.sync.aligned.{name}"

    @T.prim_func(s_tir=True, private=True)
    def func(
        a: T.Buffer((32, na), "uint32"),
        b: T.Buffer((32, nb), "uint32"),
        c: T.Buffer((32, nc), dtype),
    ):
        for tx in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                d = T.alloc_buffer((nc,), dtype, scope="local")
                T.ptx[instruction](
                    *[d[i] for i in range(nc)],
                    *[a[tx, i] for i in range(na)],
                    *[b[tx, i] for i in range(nb)],
                    *[c[tx, i] for i in range(nc)],
                )
                for i in T.unroll(nc):
                    c[tx, i] = d[i]

    run(func, a, b, c)


# One element of A and one of B, by (lane, register, bits below it), meet in one of C, by
# (lane, register): PTX ISA, "Matrix Fragments for mma", groupID = lane / 4, t = lane % 4.
FRAGMENTS = [
    # A[3][9]: group 3, 9 = 4 * 2 + 1; B[9][6]: group 6; C[3][6]: group 3, 6 = 2 * 3 + 0
    ("m8n8k16.row.col.s32.s8.s8.s32", (14, 0, 8), (26, 0, 8), (15, 0)),
    # A[11][9]: group 11 - 8, second register
    ("m16n8k16.row.col.s32.s8.s8.s32", (14, 1, 8), (26, 0, 8), (15, 2)),
    # A[9][21]: group 9 - 8, 21 = 16 + 4 * 1 + 1; B[21][6]: group 6; C[9][6]
    ("m16n8k32.row.col.s32.s8.s8.s32", (5, 3, 8), (25, 1, 8), (7, 2)),
    # A[2][16 + 3]: group 2, third register; B[19][0]; C[2][0]
    ("m16n8k32.row.col.s32.s8.s8.s32", (8, 2, 24), (0, 1, 24), (8, 0)),
    # A[10][5]: group 10 - 8, 5 = 2 * 2 + 1; B[5][5]: group 5; C[10][5]
    ("m16n8k8.row.col.f32.f16.f16.f32", (10, 1, 16), (22, 0, 16), (10, 3)),
    # A[10][13]: 13 = 8 + 2 * 2 + 1; B[13][5]; C[10][5]
    ("m16n8k16.row.col.f32.f16.f16.f32", (10, 3, 16), (22, 1, 16), (10, 3)),
    # A[2][12]: third register, low half; B[12][5]; C[2][5]
    ("m16n8k16.row.col.f32.bf16.bf16.f32", (10, 2, 0), (22, 1, 0), (10, 1)),
]


@pytest.mark.parametrize(("name", "at_a", "at_b", "at_c"), FRAGMENTS)
def test_mma_fragments(name, at_a, at_b, at_c):
    na, nb, nc, dtype = MMA[name]
    three, minus_two = {
        "s8": (0x03, 0xFE),
        "f16": (0x4200, 0xC000),
        "bf16": (0x4040, 0xC000),
    }[name.split(".")[4]]
    a, b = np.zeros((32, na), np.uint32), np.zeros((32, nb), np.uint32)
    c = np.full((32, nc), 7, dtype)
    a[at_a[:2]], b[at_b[:2]] = three << at_a[2], minus_two << at_b[2]
    mma(name, a, b, c)
    expected = np.full((32, nc), 7, dtype)
    expected[at_c] = 1
    assert_array_equal(c, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    # 32 products of -128 * -128, of 255 * -128 (0x80 and 0xFF as they are read)
    [("m16n8k32.row.col.s32.s8.s8.s32", 524288), ("m16n8k32.row.col.s32.u8.s8.s32", -524288)],
)
def test_mma_of_extremes(name, expected):
    a, b = np.full((32, 4), 0x80808080, np.uint32), np.full((32, 2), 0x80808080, np.uint32)
    c = np.zeros((32, 4), np.uint32)
    mma(name, a, b, c)
    assert_array_equal(c.view(np.int32), np.full((32, 4), expected))


@pytest.mark.parametrize("form", ["x1", "x2", "x4", "x4.trans", "x1.trans"])
def test_ldmatrix_and_stmatrix(form):
    count = int(form[1])

    @T.prim_func(s_tir=True, private=True)
    def func(m: T.Buffer((32, 8), "uint16"), r: T.Buffer((32, count), "uint32"),
             back: T.Buffer((32, 8), "uint16")):  # fmt: skip
        for tx in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((512,), "uint16", scope="shared")
                d = T.alloc_buffer((count,), "uint32", scope="local")
                for i in T.vectorized(8):
                    sm[tx * 8 + i] = m[tx, i]
                T.cuda.cta_sync()
                T.ptx[f"ldmatrix.sync.aligned.m8n8.{form}.shared.b16"](
                    *[d[i] for i in range(count)], T.address_of(sm[tx * 8])
                )
                for i in T.unroll(count):
                    r[tx, i] = d[i]
                T.cuda.cta_sync()
                T.ptx[f"stmatrix.sync.aligned.m8n8.{form}.shared.b16"](
                    T.address_of(sm[256 + tx * 8]), *[d[i] for i in range(count)]
                )
                T.cuda.cta_sync()
                if tx < 8 * count:
                    for i in T.vectorized(8):
                        back[tx, i] = sm[256 + tx * 8 + i]

    m = (np.arange(32)[:, None] * 16 + np.arange(8)).astype(np.uint16)  # row, column
    r, back = np.zeros((32, count), np.uint32), np.zeros((32, 8), np.uint16)
    run(func, m, r, back)
    assert_array_equal(back[: 8 * count], m[: 8 * count])
    # Lane 13 holds row 3, columns 2 and 3, of each matrix; transposed, column 3, rows 2 and 3.
    pairs = {"x1": [0x0033_0032], "x1.trans": [0x0033_0023]}.get(form) or [
        (0x0033_0023 if "trans" in form else 0x0033_0032) + 0x0080_0080 * i for i in range(count)
    ]
    assert r[13].tolist() == pairs


@T.prim_func(s_tir=True, private=True)
def zero_filled_copy(x: T.Buffer((40,), "uint8"), y: T.Buffer((64,), "uint8")):
    for tx in T.thread_binding(4, "threadIdx.x"):
        with T.sblock("root"):
            T.reads()
            T.writes()
            sm = T.alloc_buffer((64,), "uint8", scope="shared")
            T.ptx["cp.async.ca.shared.global"](
                T.address_of(sm[tx * 16]),
                T.address_of(x[tx * 16]),
                16,
                T.Cast("uint32", T.max(0, T.min(16, 40 - tx * 16))),
            )
            T.ptx["cp.async.commit_group"]()
            T.ptx["cp.async.wait_group"](0)
            for i in range(16):
                y[tx * 16 + i] = sm[tx * 16 + i]


def test_copy_fills_the_tail_with_zeros():
    x, y = np.arange(1, 41, dtype=np.uint8), np.full(64, 99, np.uint8)
    run(zero_filled_copy, x, y)
    assert_array_equal(y, np.r_[x, np.zeros(24, np.uint8)])


def test_warp_functions():
    @T.prim_func(s_tir=True, private=True)
    def func(y: T.Buffer((8, 64), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                d = T.alloc_buffer((2,), "uint32", scope="local")
                full = T.Bind(T.uint32(ALL))
                y[0, tx] = T.tvm_warp_shuffle_xor(full, tx, 5, 32, 32)
                y[1, tx] = T.tvm_warp_shuffle_down(full, tx, 3, 8, 32)
                y[2, tx] = T.tvm_warp_shuffle_up(full, tx, 2, 32, 32)
                y[3, tx] = T.tvm_warp_shuffle(full, tx, 9, 16, 32)
                y[4, tx] = T.cuda.warp_sum(tx)
                y[5, tx] = T.cuda.warp_max(tx % 7, 8)
                T.ptx["redux_sync.min.s32"](y[6, tx], tx - 40, full)
                T.ptx["vote_sync.ballot.b32"](d[0], tx % 3 == 0, full)
                y[7, tx] = T.reinterpret("int32", d[0])

    y = np.zeros((8, 64), np.int32)
    run(func, y)
    t = np.arange(64)
    lane, base = t % 32, t // 32 * 32
    assert_array_equal(y[0], t ^ 5)
    assert_array_equal(y[1], np.where(t % 8 + 3 < 8, t + 3, t))
    assert_array_equal(y[2], np.where(lane >= 2, t - 2, t))
    assert_array_equal(y[3], t // 16 * 16 + 9)
    assert_array_equal(y[4], np.where(t < 32, 496, 496 + 1024))
    assert_array_equal(y[5], (t % 7).reshape(8, 8).max(1).repeat(8))
    assert_array_equal(y[6], base - 40)
    # multiples of 3: bits 0, 3, ... of the first warp; 33, 36, ... are bits 1, 4, ... of the second
    assert_array_equal(y[7].view(np.uint32), np.where(t < 32, 0x49249249, 0x92492492))


def test_register_instructions():
    @T.prim_func(s_tir=True, private=True)
    def func(y: T.Buffer((12,), "uint32"), f: T.Buffer((2,), "float32")):
        for _ in T.thread_binding(1, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                a = T.alloc_buffer((1,), "uint32", scope="local")
                b = T.alloc_buffer((1,), "uint32", scope="local")
                s = T.alloc_buffer((1,), "int32", scope="local")
                a[0] = T.uint32(0x44332211)
                b[0] = T.uint32(0x887766F5)
                T.ptx["prmt.b32"](y[0], a[0], b[0], T.uint32(0x5410))
                T.ptx["prmt.b32"](y[1], a[0], b[0], T.uint32(0x0C76))
                T.ptx["lop3.b32"](y[2], a[0], b[0], T.uint32(0xFFFF), 0xEA)
                T.ptx["cvt.rn.f16x2.f32"](y[3], T.float32(1.0), T.float32(-2.0))
                T.ptx["cvt.rn.bf16x2.f32"](y[4], T.float32(1.00390625), T.float32(1.01171875))
                T.ptx["cvt.rni.s8.f32"](s[0], T.float32(-200.5))
                y[5] = T.reinterpret("uint32", s[0])
                T.ptx["cvt.rni.s32.f32"](s[0], T.float32(2.5))
                y[6] = T.reinterpret("uint32", s[0])
                T.ptx["dp4a.s32.s32"](s[0], T.int32(0x01FF0203), T.int32(0x05040302), T.int32(-7))
                y[7] = T.reinterpret("uint32", s[0])
                T.ptx["ex2.approx.ftz.f32"](f[0], T.float32(-3.0))
                T.ptx["fma.rn.f32"](f[1], T.float32(3), T.float32(4), T.float32(5))
                y[8] = T.popcount(a[0]) + T.clz(a[0])
                T.ptx["shf.l.wrap.b32"](y[9], a[0], b[0], T.uint32(8))
                T.ptx["bfe.u32"](y[10], a[0], T.uint32(4), T.uint32(8))
                y[11] = T.shift_right(b[0], T.uint32(4)) ^ T.uint32(1)

    y, f = np.zeros(12, np.uint32), np.zeros(2, np.float32)
    run(func, y, f)
    assert [f"{v:08x}" for v in y] == [
        "66f52211",  # bytes 0, 1 of a, then 0, 1 of b
        "11ff8877",  # bytes 6, 7, the sign of byte 4, byte 0
        "0033ffff",  # a & b | c
        "3c00c000",  # 1.0 high, -2.0 low
        "3f803f82",  # ties to even: 1 + 2^-8 down, 1 + 3 * 2^-8 up
        "ffffff80",  # saturates at -128
        "00000002",
        "00000006",  # 1 * 5 - 1 * 4 + 2 * 3 + 3 * 2 - 7
        "0000000b",  # 10 bits set, 1 leading zero
        "7766f544",
        "00000021",
        "0887766e",
    ]
    assert f.tolist() == [0.125, 17.0]
