"""The interpreter of CUDA kernels: memory, races, masks, loops, C arithmetic."""

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from simt import SimtError, run
from tvm.script import tirx as T

ALL = 0xFFFFFFFF


def exchange(barrier, again):
    """y[t] = x[t + 32] through shared memory, twice; again: a barrier before the second store."""

    @T.prim_func(s_tir=True, private=True)
    def func(x: T.Buffer((64,), "int32"), y: T.Buffer((64,), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((64,), "int32", scope="shared")
                for turn in range(2):
                    sm[tx] = x[tx] + turn
                    if barrier:
                        T.cuda.cta_sync()
                    y[tx] = sm[tx ^ 32]
                    if again:
                        T.cuda.cta_sync()

    return func


def test_exchange_between_warps():
    x, y = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    run(exchange(True, True), x, y)
    assert_array_equal(y, np.roll(x, 32) + 1)


@pytest.mark.parametrize(
    ("barrier", "again", "message"),
    [
        (
            False,
            True,
            "read of byte 128 of sm .* no cta_sync since thread 32 wrote it, .* thread 0",
        ),
        (True, False, "write of byte 0 of sm .* no cta_sync since thread 32 read it, .* thread 0"),
    ],
)
def test_missing_barriers(barrier, again, message):
    x, y = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    with pytest.raises(SimtError, match=message):
        run(exchange(barrier, again), x, y)


@T.prim_func(s_tir=True, private=True)
def doubled(x: T.Buffer((100,), "float32"), y: T.Buffer((100,), "float32")):
    for bx in T.thread_binding(2, "blockIdx.x"):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                y[bx * 64 + tx] = x[bx * 64 + tx] * T.float32(2)


def test_access_out_of_bounds_names_the_thread():
    x, y = np.ones(100, np.float32), np.full(100, np.nan, np.float32)
    message = (
        r"index 100 of axis 0 is outside x \[100\] \(extent 100\), at blockIdx.x 1, .* thread 36"
    )
    with pytest.raises(SimtError, match=message):
        run(doubled, x, y)
    run(doubled, x, y, blocks=[(0, 0, 0)])
    assert_array_equal(y, np.r_[np.full(64, 2), np.full(36, np.nan)])


def test_masks_select_and_tail():
    @T.prim_func(s_tir=True, private=True)
    def func(n: T.int32, x: T.Buffer((100,), "float32"), y: T.Buffer((128,), "float32")):
        for tx in T.thread_binding(128, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                v = T.alloc_buffer((1,), "float32", scope="local")
                v[0] = T.if_then_else(tx < n, x[tx], T.float32(-1))
                if tx < n and x[tx] > T.float32(9):
                    y[tx] = v[0] + T.Select(tx < n - 1, x[tx + 1], T.float32(0.5))
                else:
                    y[tx] = v[0]

    x, y = np.arange(100, dtype=np.float32), np.zeros(128, np.float32)
    run(func, 100, x, y)
    expected = np.r_[x, np.full(28, -1)]
    expected[10:99] += x[11:]
    expected[99] += 0.5
    assert_array_equal(y, expected)


def test_symbolic_extents_bound_by_the_arrays():
    @T.prim_func(s_tir=True, private=True)
    def func(a: T.handle, b: T.handle):
        m = T.int64()
        x = T.match_buffer(a, (m, 3), "int32")
        y = T.match_buffer(b, (m,), "int32")
        for bx in T.thread_binding((m + 31) // 32, "blockIdx.x"):
            for tx in T.thread_binding(32, "threadIdx.x"):
                with T.sblock("root"):
                    T.reads()
                    T.writes()
                    if bx * 32 + tx < m:
                        y[bx * 32 + tx] = x[bx * 32 + tx, 0] + x[bx * 32 + tx, 2]

    x, y = np.arange(213, dtype=np.int32).reshape(71, 3), np.zeros(71, np.int32)
    run(func, x, y)
    assert_array_equal(y, x[:, 0] + x[:, 2])
    with pytest.raises(TypeError, match="y: m is 71 and 70"):
        run(func, x, y[:70])


def test_loops_that_diverge():
    @T.prim_func(s_tir=True, private=True)
    def func(y: T.Buffer((64, 3), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                s = T.alloc_buffer((3,), "int32", scope="local")
                for i in range(3):
                    s[i] = 0
                for i in range(tx % 5):
                    s[0] = s[0] + i
                while s[1] * s[1] < tx:
                    s[1] = s[1] + 1
                for i in range(tx, 64):
                    s[2] = s[2] + i
                for i in range(3):
                    y[tx, i] = s[i]

    y = np.zeros((64, 3), np.int32)
    run(func, y)
    n = np.arange(64)
    assert_array_equal(y[:, 0], (n % 5) * (n % 5 - 1) // 2)
    assert_array_equal(y[:, 1], np.ceil(np.sqrt(n)))
    assert_array_equal(y[:, 2], [sum(range(i, 64)) for i in n])


@pytest.mark.parametrize("sync", [True, False])
def test_exchange_between_lanes(sync):
    @T.prim_func(s_tir=True, private=True)
    def func(y: T.Buffer((64,), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((64,), "int32", scope="shared")
                sm[tx] = tx
                if tx < 32:
                    if sync:
                        T.cuda.warp_sync()
                    y[tx] = sm[tx ^ 1]
                else:
                    y[tx] = sm[tx]

    y = np.zeros(64, np.int32)
    if sync:
        run(func, y)
        assert_array_equal(y, np.r_[np.arange(32) ^ 1, np.arange(32, 64)])
    else:
        with pytest.raises(SimtError, match=r"no warp_sync since thread 1 wrote it, .* thread 0"):
            run(func, y)


def test_barriers_of_a_part_of_the_block():
    """Warps 0 and 1 exchange behind a barrier of their own; warp 2 knows nothing of it."""

    @T.prim_func(s_tir=True, private=True)
    def func(outsider: T.bool, y: T.Buffer((96,), "int32")):
        for tx in T.thread_binding(96, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((96,), "int32", scope="shared")
                sm[tx] = tx
                if tx < 64:
                    T.ptx["bar.sync"](1, 64)
                    y[tx] = sm[tx ^ 32]
                elif outsider:
                    y[tx] = sm[tx - 64]

    y = np.zeros(96, np.int32)
    run(func, False, y)
    assert_array_equal(y, np.r_[np.arange(64) ^ 32, np.zeros(32)])
    with pytest.raises(SimtError, match=r"no cta_sync since thread 0 wrote it, .* thread 64"):
        run(func, True, y)


def divergent(statement):
    """One warp of two, or half of the first, reaches a statement that needs them all."""

    @T.prim_func(s_tir=True, private=True)
    def barrier(y: T.Buffer((64,), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                if tx < 32:
                    T.cuda.cta_sync()
                y[tx] = 0

    @T.prim_func(s_tir=True, private=True)
    def shuffle(y: T.Buffer((64,), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                if tx < 16:
                    y[tx] = T.tvm_warp_shuffle_xor(T.uint32(ALL), tx, 1, 32, 32)

    @T.prim_func(s_tir=True, private=True)
    def conflict(y: T.Buffer((64,), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                y[tx // 2] = tx

    @T.prim_func(s_tir=True, private=True)
    def misaligned(y: T.Buffer((64,), "int32")):
        for tx in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                v = T.alloc_buffer((2,), "int32", scope="local")
                T.ptx["ld.global.v2.s32"](v[0], v[1], T.address_of(y[tx]))

    return locals()[statement]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("barrier", "cta_sync reached by 32 of 64 threads"),
        ("shuffle", "member mask names other lanes than those that arrive"),
        ("conflict", "threads write different values to byte 0 of y"),
        ("misaligned", r"8-byte access to byte 4 of y \(256 bytes\) is not aligned, .* thread 1"),
    ],
)
def test_divergence_and_conflicts(statement, message):
    with pytest.raises(SimtError, match=message):
        run(divergent(statement), np.zeros(64, np.int32))


def test_arithmetic_of_c():
    @T.prim_func(s_tir=True, private=True)
    def func(f: T.Buffer((4,), "float32"), n: T.Buffer((4,), "int32"), y: T.Buffer((8, 4), "int32"),
             h: T.Buffer((2, 4), "float32")):  # fmt: skip
        for tx in T.thread_binding(4, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                y[0, tx] = T.Cast("int32", f[tx])
                y[1, tx] = T.Cast("int32", T.Cast("int8", f[tx]))
                y[2, tx] = T.truncdiv(n[tx], 3)
                y[3, tx] = T.truncmod(n[tx], 3)
                y[4, tx] = n[tx] // 3
                y[5, tx] = n[tx] % 4
                y[6, tx] = n[tx] * 0x10001
                y[7, tx] = T.shift_left(n[tx], 4)
                h[0, tx] = T.Cast("float32", T.Cast("float16", f[tx]) + T.float16(1))
                h[1, tx] = T.Cast("float32", T.Cast("bfloat16", f[tx]))

    f = np.array([-2.7, 200.5, 3e9, np.nan], np.float32)
    n = np.array([-7, 7, 1 << 20, -(1 << 31)], np.int32)
    y, h = np.zeros((8, 4), np.int32), np.zeros((2, 4), np.float32)
    run(func, f, n, y, h)
    assert y[:2].tolist() == [[-2, 200, 2147483647, 0], [-2, -56, -1, 0]]
    assert y[2].tolist() == [-2, 2, 349525, -715827882]
    assert y[3].tolist() == [-1, 1, 1, -2]
    assert y[4].tolist() == [-3, 2, 349525, -715827883]
    assert y[5].tolist() == [1, 3, 0, 0]
    assert y[6].tolist() == [-7 * 0x10001, 7 * 0x10001, 1 << 20, -(1 << 31)]
    assert y[7].tolist() == [-112, 112, 1 << 24, 0]
    assert_array_equal(h[0], [-1.69921875, 201.5, np.inf, np.nan])
    assert_array_equal(h[1], f.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_atomics_and_views_of_shared_bytes():
    @T.prim_func(s_tir=True, private=True)
    def func(x: T.Buffer((96,), "float16"), y: T.Buffer((3,), "float32")):
        for tx in T.thread_binding(96, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((256,), "uint8", scope="shared.dyn")
                total = T.decl_buffer((3,), "float32", data=sm.data, scope="shared.dyn")
                half = T.decl_buffer(
                    (96,), "float16", data=sm.data, elem_offset=8, scope="shared.dyn"
                )
                if tx < 3:
                    total[tx] = T.float32(0)
                half[tx] = x[tx]
                T.cuda.cta_sync()
                T.cuda.atomic_add(T.address_of(total[tx % 3]), T.Cast("float32", half[95 - tx]))
                T.cuda.cta_sync()
                if tx < 3:
                    y[tx] = total[tx]

    x, y = np.arange(96, dtype=np.float16), np.zeros(3, np.float32)
    run(func, x, y)
    assert y.tolist() == x[::-1].astype(np.float32).reshape(32, 3).sum(0).tolist()


def test_what_is_missing_is_named():
    @T.prim_func(s_tir=True, private=True)
    def func(y: T.Buffer((32,), "uint32")):
        for tx in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                T.ptx["bfind.u32"](y[tx], y[tx])

    with pytest.raises(NotImplementedError, match=r"PTX instruction bfind .*ptx\.CALLS"):
        run(func, np.zeros(32, np.uint32))


def test_kernels_one_after_the_other():
    """Partial sums of blocks in scratch memory, combined by a second kernel."""

    @T.prim_func(s_tir=True, private=True)
    def func(x: T.Buffer((4, 32), "float32"), y: T.Buffer((1,), "float32")):
        parts = T.alloc_buffer((4,), "float32", scope="global")
        for bx in T.thread_binding(4, "blockIdx.x"):
            for tx in T.thread_binding(32, "threadIdx.x"):
                with T.sblock("partial"):
                    T.reads()
                    T.writes()
                    total = T.Bind(T.cuda.warp_sum(x[bx, tx]))
                    if tx == 0:
                        parts[bx] = total
        for tx in T.thread_binding(1, "threadIdx.x"):
            with T.sblock("combine"):
                T.reads()
                T.writes()
                y[tx] = parts[0] + parts[1] + parts[2] + parts[3]

    x, y = np.arange(128, dtype=np.float32).reshape(4, 32), np.zeros(1, np.float32)
    run(func, x, y)
    assert y[0] == 127 * 64
    run(func, x, y, blocks=[(0, 0, 0)])  # the other partial sums are poison
    assert np.isnan(y[0])


def test_vectors_pointers_and_predicated_instructions():
    @T.prim_func(s_tir=True, private=True)
    def func(x: T.Buffer((32, 8), "int8"), y: T.Buffer((32, 8), "int32")):
        for tx in T.thread_binding(32, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((512,), "uint8", scope="shared.dyn")
                words = T.alloc_buffer((4,), "uint32", scope="local")
                base = T.Bind(T.cuda.cvta_generic_to_shared(T.address_of(sm[0])))
                y[tx, T.ramp(0, 1, 4)] = T.Cast("int32x4", x[tx, T.ramp(0, 2, 4)])
                y[tx, 4] = T.dp4a(x[tx, T.ramp(0, 1, 4)], x[tx, T.ramp(4, 1, 4)], tx)
                words[0] = T.reinterpret("uint32", x[tx, T.ramp(0, 1, 4)])
                words[1] = T.uint32(7)
                T.ptx["st.shared.v2.b32"](
                    base + T.Cast("uint32", tx * 16) ^ T.uint32(8), words[0], words[1]
                )
                T.ptx["ld.shared.v2.b32"](
                    words[2], words[3], T.address_of(sm[tx * 16 + 8]), pred=tx < 16
                )
                if tx < 16:
                    y[tx, 5] = T.reinterpret("int32", words[2])
                    y[tx, 6] = T.reinterpret("int32", words[3])
                pointer = T.Bind(T.address_of(x[tx, 0]))
                T.ptx["ld.global.s8"](words[2], T.ptx.addr(pointer, 3))
                y[tx, 7] = T.reinterpret("int32", words[2])

    x = np.random.default_rng(0).integers(-128, 128, (32, 8), dtype=np.int8)
    y = np.full((32, 8), -1, np.int32)
    run(func, x, y)
    wide = x.astype(np.int32)
    assert_array_equal(y[:, :4], wide[:, ::2])
    assert_array_equal(y[:, 4], (wide[:, :4] * wide[:, 4:]).sum(1) + np.arange(32))
    assert_array_equal(y[:16, 5], x[:16, :4].copy().view(np.int32)[:, 0])
    assert_array_equal(y[:, 6], np.where(np.arange(32) < 16, 7, -1))
    assert_array_equal(y[:, 7], wide[:, 3])


def test_functions_of_floats():
    @T.prim_func(s_tir=True, private=True)
    def func(x: T.Buffer((6,), "float32"), y: T.Buffer((8, 6), "float32")):
        for tx in T.thread_binding(6, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                y[0, tx] = T.exp(x[tx])
                y[1, tx] = T.erf(x[tx])
                y[2, tx] = T.nearbyint(x[tx])
                y[3, tx] = T.tanh(x[tx])
                y[4, tx] = T.max(x[tx], T.float32(0))
                y[5, tx] = T.Cast("float32", T.exp(T.Cast("float16", x[tx])))
                y[6, tx] = T.fma(x[tx], x[tx], T.float32(1))
                y[7, tx] = T.rsqrt(x[tx])

    x = np.array([0, 0.5, 1.5, -2.5, 4, np.nan], np.float32)
    y = np.zeros((8, 6), np.float32)
    run(func, x, y)
    np.testing.assert_allclose(y[0, :3], [1, 1.6487213, 4.481689], rtol=1e-6)
    np.testing.assert_allclose(y[1, :3], [0, 0.5204999, 0.9661051], rtol=1e-6)
    assert_array_equal(y[2], [0, 0, 2, -2, 4, np.nan])
    np.testing.assert_allclose(y[3, 1:3], [0.46211716, 0.90514827], rtol=1e-6)
    assert_array_equal(y[4], [0, 0.5, 1.5, 0, 4, 0])
    assert_array_equal(y[5, :3], [1, 1.6484375, 4.48046875])  # halves 2^-10 and 2^-8 apart
    assert_array_equal(y[6], [1, 1.25, 3.25, 7.25, 17, np.nan])
    assert_array_equal(y[7, [0, 4]], [np.inf, 0.5])
