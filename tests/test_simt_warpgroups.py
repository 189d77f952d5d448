"""Products of warpgroups in the interpreter of CUDA kernels; expected places by hand from the PTX
ISA.
"""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from simt import SimtError, run
from tvm.script import tirx as T

SIZE = 16384  # bytes of one operand in shared memory
BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


def fields(mode, leading, stride):
    """A matrix descriptor without its address; mode 1, 2, 3: swizzles of 128, 64, 32 bytes."""
    return mode << 62 | (stride >> 4) << 32 | (leading >> 4) << 16


def product(a_fields, b_fields, a_at=0, b_at=0, n=32, skip="", phase=0, align=1024):
    """d = a @ b of one warpgroup on bytes as they shall lie in shared memory.

    skip: a step to leave out, or one to add.
    """
    registers = n // 2
    mma = f"wgmma.mma_async.sync.aligned.m64n{n}k32.s32.s8.s8"

    @T.prim_func(s_tir=True, private=True)
    def func(
        a: T.Buffer((SIZE,), "int8"), b: T.Buffer((SIZE,), "int8"),
        d: T.Buffer((128, registers), "int32"),
    ):  # fmt: skip
        for tx in T.thread_binding(128, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((2 * SIZE + 8,), "int8", scope="shared.dyn", align=align)
                acc = T.alloc_buffer((registers,), "uint32", scope="local")
                over = T.alloc_buffer((1,), "uint32", scope="local")
                for i in T.unroll(registers):
                    acc[i] = T.uint32(5)
                if tx == 0:
                    T.ptx["mbarrier.init.shared::cta.b64"](T.address_of(sm[2 * SIZE]), T.uint32(1))
                    if skip != "publish":
                        T.ptx["fence.mbarrier_init.release.cluster"]()
                    if skip != "expect":
                        T.ptx["mbarrier.arrive.expect_tx.shared::cta.b64"](
                            T.address_of(sm[2 * SIZE]),
                            T.uint32(SIZE if skip == "bytes" else 2 * SIZE),
                        )
                    T.ptx[BULK](
                        T.address_of(sm[0]),
                        T.address_of(a[0]),
                        T.uint32(SIZE),
                        T.address_of(sm[2 * SIZE]),
                    )
                    T.ptx[BULK](
                        T.address_of(sm[SIZE]),
                        T.address_of(b[0]),
                        T.uint32(SIZE),
                        T.address_of(sm[2 * SIZE]),
                    )
                if skip != "sync":
                    T.cuda.cta_sync()
                over[0] = T.uint32(0)
                if skip != "wait":
                    while over[0] == T.uint32(0):
                        T.ptx["mbarrier.try_wait.parity.shared::cta.b64"](
                            over[0], T.address_of(sm[2 * SIZE]), T.uint32(phase)
                        )
                if skip.startswith("store"):
                    sm[tx] = sm[tx]
                    if skip == "store, fence":
                        T.ptx["fence.proxy.async.shared::cta"]()
                    if skip == "store, global fence":
                        T.ptx["fence.proxy.async.global"]()
                    T.cuda.cta_sync()
                    if skip == "store, late fence":
                        T.ptx["fence.proxy.async.shared::cta"]()
                if skip != "fence":
                    T.ptx["wgmma.fence.sync.aligned"]()
                if skip == "write":
                    acc[0] = T.uint32(6)
                if skip == "write the same":
                    acc[0] = acc[0]
                T.ptx[mma](
                    *[acc[i] for i in range(registers)],
                    T.uint64(a_fields >> 32) << T.uint64(32)
                    | T.uint64(a_fields & 0xFFFFFFFF)
                    | T.Cast(
                        "uint64",
                        T.cuda.cvta_generic_to_shared(T.address_of(sm[a_at])) >> T.uint32(4),
                    ),
                    T.uint64(b_fields >> 32) << T.uint64(32)
                    | T.uint64(b_fields & 0xFFFFFFFF)
                    | T.Cast(
                        "uint64",
                        T.cuda.cvta_generic_to_shared(T.address_of(sm[SIZE + b_at])) >> T.uint32(4),
                    ),
                    T.ptx.pred(T.bool(True)),
                )
                if skip != "commit":
                    T.ptx["wgmma.commit_group.sync.aligned"]()
                if skip == "read":
                    d[tx, 0] = T.reinterpret("int32", acc[0])
                if skip == "overwrite":
                    sm[SIZE + tx] = T.int8(0)
                if skip == "reuse":
                    acc[0] = T.uint32(0)
                if skip == "reuse, the same":
                    acc[0] = acc[0]
                T.ptx["wgmma.wait_group.sync.aligned"](1 if skip == "done" else 0)
                if skip != "read":
                    for i in T.unroll(registers):
                        d[tx, i] = T.reinterpret("int32", acc[i])

    return func


def zeros(n=32):
    """Operands and result."""
    return np.zeros(SIZE, np.int8), np.zeros(SIZE, np.int8), np.zeros((128, n // 2), np.int32)


# Where A[row][k] and B[column][k] lie, and which thread's register is C[row][column]: PTX ISA,
# "Shared Memory Matrix Layout", "Matrix Descriptor Format", "Register Fragments".
PLACES = [
    # 128 bytes, start 32 bytes on: A[10][37] in the second 8 rows, their row 2, chunk 2 ^ 2 = 0,
    # byte 5; B[19][37]: third 8 rows, row 3, chunk 2 ^ 3. C[10][19]: warp 0, row 2 + 8, thread
    # 4 * 2 + 1, column 8 * 2 + 2 * 1 + 1: register 4 * 2 + 2 + 1
    (fields(1, 0, 1024), 32, 1024 + 256 + 0 + 5, 2048 + 384 + 16 + 5, (9, 11)),
    # Start 96 bytes on: A[61][101] in the eighth 8 rows, row 5, chunk 6 ^ 5; B[0][101]: chunk 6.
    # C[61][0]: warp 3, row 13: thread 96 + 4 * 5, register 2
    (fields(1, 0, 1024), 96, 7 * 1024 + 640 + 48 + 5, 96 + 5, (116, 2)),
    # 64 bytes, start 32 on: A[10][37] in row 2, chunk 2 ^ 1 (each pair of rows); B[19][37]: 2 ^ 1
    (fields(2, 0, 512), 32, 512 + 128 + 48 + 5, 1024 + 192 + 48 + 5, (9, 11)),
    # 32 bytes: A[13][21] in row 5, chunk 1 ^ 1 (each four rows); B[19][21]: row 3, chunk 1.
    # C[13][19]: row 5 + 8
    (fields(3, 0, 256), 0, 256 + 160 + 0 + 5, 512 + 96 + 16 + 5, (21, 11)),
    # none: 8 rows of 16 bytes in turn, the second half of k 2048 bytes on
    (fields(0, 2048, 128), 0, 2048 + 128 + 32 + 5, 2048 + 256 + 48 + 5, (9, 11)),
]


@pytest.mark.parametrize(("descriptor", "start", "at_a", "at_b", "at_d"), PLACES)
def test_products_of_single_elements(descriptor, start, at_a, at_b, at_d):
    a, b, d = zeros()
    a[at_a], b[at_b] = 3, -4
    run(product(descriptor, descriptor, start, start), a, b, d)
    expected = np.full((128, 16), 5)
    expected[at_d] = 5 - 12
    assert_array_equal(d, expected)


def swizzled(matrix):
    """Rows of 128 bytes as the widest swizzle stores them."""
    rows = np.zeros((len(matrix), 8, 16), np.int8)
    for row, chunks in enumerate(matrix.reshape(len(matrix), 8, 16)):
        for chunk in range(8):
            rows[row, chunk ^ row % 8] = chunks[chunk]
    return rows.reshape(-1)


def test_product_of_extremes():
    rng = np.random.default_rng(0)
    left, right = rng.integers(-128, 128, (64, 128)), rng.integers(-128, 128, (128, 128))
    left[:8, :32] = right[:8, :32] = -128
    a, b, d = zeros(128)
    a[: 64 * 128], b[:] = swizzled(left.astype(np.int8)), swizzled(right.astype(np.int8))
    run(product(fields(1, 0, 1024), fields(1, 0, 1024), 0, 0, 128), a, b, d)
    expected = 5 + left[:, :32] @ right[:, :32].T
    for thread in range(128):
        row = thread // 32 * 16 + thread % 32 // 4
        for register in range(64):
            column = register // 4 * 8 + thread % 4 * 2 + register % 2
            assert d[thread, register] == expected[row + register // 2 % 2 * 8, column]


ERRORS = {
    "publish": "cp.async.bulk on an mbarrier with no fence since",
    "expect": "never comes: 1 arrivals and -32768 bytes are missing",
    "bytes": "never comes: 0 arrivals and -16384 bytes are missing",
    "sync": r"read of byte 32768 of sm .* no (cta|warp)_sync since thread 0 wrote it",
    "wait": "wgmma reads byte 0 of sm .* written by a copy in flight",
    "store": "wgmma of byte 0 of sm .* with no fence.proxy.async since it was written",
    "store, global fence": "with no fence.proxy.async since it was written",
    "store, late fence": "or no barrier since that fence",
    "fence": "register 0 of acc written since the last wgmma.fence",
    "write": "register 0 of acc written since the last wgmma.fence",
    "write the same": "register 0 of acc written since the last wgmma.fence",
    "overwrite": "write near byte 16384 of sm .* while wgmma reads it",
    "reuse": "register 0 of acc written while wgmma writes it",
    "reuse, the same": "register 0 of acc written while wgmma writes it",
    "done": "wgmma still in flight at the end",
    "commit": "wgmma still in flight at the end",
}


@pytest.mark.parametrize("step", ERRORS)
def test_steps_that_are_needed(step):
    wide = fields(1, 0, 1024)
    with pytest.raises(SimtError, match=ERRORS[step]):
        run(product(wide, wide, skip=step), *zeros())


def test_stores_may_precede_products_behind_a_fence():
    a, b, d = zeros()
    a[0], b[0] = 2, 3
    run(product(fields(1, 0, 1024), fields(1, 0, 1024), skip="store, fence"), a, b, d)
    assert d[0, 0] == 11


def test_results_are_undefined_until_a_wait():
    a, b, d = zeros()
    run(product(fields(1, 0, 1024), fields(1, 0, 1024), skip="read"), a, b, d)
    assert (d[:, 0] == -1).all()


def test_products_add_where_a_predicate_says_so():
    """To registers that nobody wrote before: the first of three turns overwrites them."""
    low, high = fields(1, 0, 1024) & 0xFFFFFFFF, fields(1, 0, 1024) >> 32

    @T.prim_func(s_tir=True, private=True)
    def func(a: T.Buffer((64, 128), "int8"), d: T.Buffer((128, 4), "int32")):
        for tx in T.thread_binding(128, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((64, 128), "int8", scope="shared", align=1024)
                acc = T.alloc_buffer((4,), "uint32", scope="local")
                for i in range(64):
                    sm[i, tx] = a[i, tx]
                T.ptx["fence.proxy.async.shared::cta"]()
                T.cuda.cta_sync()
                for turn in range(3):
                    T.ptx["wgmma.fence.sync.aligned"]()
                    T.ptx["wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8"](
                        *[acc[i] for i in range(4)],
                        *[
                            T.uint64(high) << T.uint64(32)
                            | T.uint64(low)
                            | T.Cast(
                                "uint64", T.cuda.cvta_generic_to_shared(T.address_of(sm[0, 0]))
                            )
                            >> T.uint64(4)
                            for _ in range(2)
                        ],
                        T.ptx.pred(turn > 0),
                    )
                    T.ptx["wgmma.commit_group.sync.aligned"]()
                    T.ptx["wgmma.wait_group.sync.aligned"](0)
                for i in T.unroll(4):
                    d[tx, i] = T.reinterpret("int32", acc[i])

    a, d = np.zeros((64, 128), np.int8), np.zeros((128, 4), np.int32)
    a[0, 5] = 7
    run(func, a, d)
    expected = np.zeros((128, 4))
    expected[0, 0] = 3 * 7 * 7
    assert_array_equal(d, expected)


def test_a_phase_that_is_not_over_yet():
    """The parity of the phase before the first: what a wait would see at once."""
    with pytest.raises(SimtError, match=r"wgmma reads byte 0 .* written by a copy in flight"):
        run(product(fields(1, 0, 1024), fields(1, 0, 1024), phase=1), *zeros())


@pytest.mark.parametrize(
    ("descriptor", "at", "message"),
    [
        (fields(1, 0, 1024), 128, "matrix at 0x480, not in the first row of 1024 bytes"),
        (fields(1, 0, 1024), 112, "matrix at 0x470, not in the first row of 1024 bytes"),
        (fields(1, 0, 8192), 0, "wgmma outside"),
        (1 << 14, 0, "with reserved bits"),
    ],
)
def test_descriptors_that_are_refused(descriptor, at, message):
    with pytest.raises(SimtError, match=message):
        run(product(descriptor, fields(1, 0, 1024), at), *zeros())


@pytest.mark.parametrize("align", [-1, 512])
def test_alignment_that_was_not_asked_for(align):
    wide = fields(1, 0, 1024)
    with pytest.raises(SimtError, match="not in the first row of 1024 bytes"):
        run(product(wide, wide, align=align), *zeros())


def test_vectors_where_the_buffer_is_aligned_to_less():
    @T.prim_func(s_tir=True, private=True)
    def func(y: T.Buffer((4,), "uint32")):
        for _ in T.thread_binding(1, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((64,), "uint8", scope="shared", align=8)
                T.ptx["st.shared.v4.b32"](T.address_of(sm[0]), y[0], y[1], y[2], y[3])

    with pytest.raises(SimtError, match=r"16-byte access to byte 0 of sm .* is not aligned"):
        run(func, np.zeros(4, np.uint32))


def two_shapes(fence):
    """Products of 64 x 16 and of 64 x 8 that add to the same registers."""
    wide = fields(1, 0, 1024)

    @T.prim_func(s_tir=True, private=True)
    def func(y: T.Buffer((128, 8), "int32")):
        for tx in T.thread_binding(128, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((8192,), "int8", scope="shared", align=1024)
                acc = T.alloc_buffer((8,), "uint32", scope="local")
                for i in range(64):
                    sm[i * 128 + tx] = T.int8(1)
                for i in T.unroll(8):
                    acc[i] = T.uint32(0)
                T.ptx["fence.proxy.async.shared::cta"]()
                T.cuda.cta_sync()
                matrix = T.Bind(
                    T.uint64(wide >> 32) << T.uint64(32)
                    | T.Cast("uint64", T.cuda.cvta_generic_to_shared(T.address_of(sm[0])))
                    >> T.uint64(4)
                )
                T.ptx["wgmma.fence.sync.aligned"]()
                for _ in T.unroll(2):
                    T.ptx["wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8"](
                        *[acc[i] for i in range(8)], matrix, matrix, T.ptx.pred(T.bool(True))
                    )
                if fence:
                    T.ptx["wgmma.fence.sync.aligned"]()
                T.ptx["wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8"](
                    *[acc[i] for i in range(4)], matrix, matrix, T.ptx.pred(T.bool(True))
                )
                T.ptx["wgmma.commit_group.sync.aligned"]()
                T.ptx["wgmma.wait_group.sync.aligned"](0)
                for i in T.unroll(8):
                    y[tx, i] = T.reinterpret("int32", acc[i])

    return func


def test_accumulators_of_two_shapes():
    y = np.zeros((128, 8), np.int32)
    run(two_shapes(True), y)
    assert_array_equal(y, np.broadcast_to([96] * 4 + [64] * 4, (128, 8)))
    message = "register 0 of acc used by wgmma of another shape since the last wgmma.fence"
    with pytest.raises(SimtError, match=message):
        run(two_shapes(False), y)


def transposed_product(kind, fields, n=128, written=False):
    """d = a @ b of one warpgroup: a in registers, b as rows of k; written: a register too soon."""
    registers = n // 2
    mma = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"

    @T.prim_func(s_tir=True, private=True)
    def func(
        a: T.Buffer((128, 4), "uint32"), b: T.Buffer((8192,), "uint16"),
        d: T.Buffer((128, registers), "float32"),
    ):  # fmt: skip
        for tx in T.thread_binding(128, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((8192,), "uint16", scope="shared", align=1024)
                acc = T.alloc_buffer((registers,), "float32", scope="local")
                left = T.alloc_buffer((4,), "uint32", scope="local")
                for i in range(64):
                    sm[i * 128 + tx] = b[i * 128 + tx]
                T.ptx["fence.proxy.async.shared::cta"]()
                T.cuda.cta_sync()
                for i in T.unroll(4):
                    left[i] = a[tx, i]
                T.ptx["wgmma.fence.sync.aligned"]()
                T.ptx[mma](
                    *[acc[i] for i in range(registers)],
                    *[left[i] for i in range(4)],
                    T.uint64(fields >> 32) << T.uint64(32)
                    | T.uint64(fields & 0xFFFFFFFF)
                    | T.Cast("uint64", T.cuda.cvta_generic_to_shared(T.address_of(sm[0])))
                    >> T.uint64(4),
                    T.ptx.pred(T.bool(False)),
                    1,
                    1,
                    1,
                )
                T.ptx["wgmma.commit_group.sync.aligned"]()
                if written:
                    left[0] = T.uint32(9)
                T.ptx["wgmma.wait_group.sync.aligned"](0)
                for i in T.unroll(registers):
                    d[tx, i] = acc[i]

    return func


# A[10][5]: warp 0, row 2 + 8: second register of thread 4 * 2 + 2, upper half. B[5][19]: row 5 of
# 128 bytes, bytes 38 and 39: chunk 2 ^ 5 = 7. C[10][19] as above.
# A[61][12]: warp 3, row 13 = 5 + 8, second half of k: fourth register of thread 96 + 4 * 5 + 2,
# lower half. B[12][70]: second 8 rows, row 4; second 64 columns, byte 12: chunk 0 ^ 4. C[61][70]:
# column 8 * 8 + 2 * 3: thread 96 + 4 * 5 + 3, register 4 * 8 + 2
HALVES = [
    ("f16", (10, 1, 16), 640 + 7 * 16 + 6, (9, 11)),
    ("bf16", (118, 3, 0), 1024 + 2048 + 512 + 4 * 16 + 12, (119, 34)),
]


@pytest.mark.parametrize(("kind", "at_a", "at_b", "at_d"), HALVES)
def test_products_of_registers_and_rows_of_k(kind, at_a, at_b, at_d):
    """Eight rows of 64 columns are 1024 bytes; so is the way to the next 64, times two."""
    three, minus_two = {"f16": (0x4200, 0xC000), "bf16": (0x4040, 0xC000)}[kind]
    a, b = np.zeros((128, 4), np.uint32), np.zeros(8192, np.uint16)
    d = np.full((128, 64), np.nan, np.float32)
    a[at_a[:2]], b[at_b // 2] = three << at_a[2], minus_two
    run(transposed_product(kind, fields(1, 2048, 1024)), a, b, d)
    expected = np.zeros((128, 64))
    expected[at_d] = -6
    assert_array_equal(d, expected)


def test_left_registers_stay_until_a_wait():
    a, b = np.zeros((128, 4), np.uint32), np.zeros(8192, np.uint16)
    with pytest.raises(SimtError, match="register 0 of left written while wgmma reads it"):
        run(
            transposed_product("f16", fields(1, 2048, 1024), written=True),
            a,
            b,
            np.zeros((128, 64), np.float32),
        )
