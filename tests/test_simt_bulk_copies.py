"""Bulk copies and barriers in shared memory in the interpreter of CUDA kernels."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from simt import SimtError, run
from tvm.script import tirx as T

BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


def test_phases_of_a_barrier():
    """Three copies one after the other through one buffer and one barrier."""

    @T.prim_func(s_tir=True, private=True)
    def func(x: T.Buffer((3, 64), "int32"), y: T.Buffer((3, 64), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((64,), "int32", scope="shared")
                barrier = T.alloc_buffer((1,), "uint64", scope="shared")
                over = T.alloc_buffer((1,), "uint32", scope="local")
                if tx == 0:
                    T.ptx["mbarrier.init.shared::cta.b64"](T.address_of(barrier[0]), T.uint32(65))
                    T.ptx["fence.proxy.async.shared::cta"]()
                T.cuda.cta_sync()
                for turn in range(3):
                    if tx == 0:
                        T.ptx["mbarrier.arrive.expect_tx.shared::cta.b64"](
                            T.address_of(barrier[0]), T.uint32(256)
                        )
                        T.ptx[BULK](
                            T.address_of(sm[0]),
                            T.address_of(x[turn, 0]),
                            T.uint32(256),
                            T.address_of(barrier[0]),
                        )
                    T.ptx["mbarrier.arrive.shared::cta.b64"](T.address_of(barrier[0]))
                    over[0] = T.uint32(0)
                    while over[0] == T.uint32(0):
                        T.ptx["mbarrier.try_wait.parity.shared::cta.b64"](
                            over[0], T.address_of(barrier[0]), T.Cast("uint32", turn % 2)
                        )
                    y[turn, tx] = sm[63 - tx]
                    T.cuda.cta_sync()

    x, y = np.arange(192, dtype=np.int32).reshape(3, 64), np.zeros((3, 64), np.int32)
    run(func, x, y)
    assert_array_equal(y, x[:, ::-1])


def copies_in_turn(behind):
    """One thread orders each copy as soon as it has seen the one before land; behind: once all
    have."""

    @T.prim_func(s_tir=True, private=True)
    def func(x: T.Buffer((3, 64), "int32"), y: T.Buffer((3, 64), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((192,), "int32", scope="shared")
                barrier = T.alloc_buffer((1,), "uint64", scope="shared")
                over = T.alloc_buffer((1,), "uint32", scope="local")
                if tx == 0:
                    T.ptx["mbarrier.init.shared::cta.b64"](T.address_of(barrier[0]), T.uint32(1))
                    T.ptx["fence.mbarrier_init.release.cluster"]()
                T.cuda.cta_sync()
                for turn in range(3):
                    if tx == 0:
                        T.ptx["mbarrier.arrive.expect_tx.shared::cta.b64"](
                            T.address_of(barrier[0]), T.uint32(256)
                        )
                        T.ptx[BULK](
                            T.address_of(sm[turn * 64]),
                            T.address_of(x[turn, 0]),
                            T.uint32(256),
                            T.address_of(barrier[0]),
                        )
                    over[0] = T.uint32(0)
                    while over[0] == T.uint32(0):
                        T.ptx["mbarrier.try_wait.parity.shared::cta.b64"](
                            over[0], T.address_of(barrier[0]), T.Cast("uint32", turn % 2)
                        )
                    y[turn, tx] = sm[turn * 64 + 63 - tx]
                    if behind:
                        T.cuda.cta_sync()

    return func


def test_a_phase_that_may_end_before_the_one_before_is_seen():
    x, y = np.arange(192, dtype=np.int32).reshape(3, 64), np.zeros((3, 64), np.int32)
    run(copies_in_turn(True), x, y)
    assert_array_equal(y, x[:, ::-1])
    message = "phase 1 may end before phase 0 is seen: .* thread 1$"
    with pytest.raises(SimtError, match=message):
        run(copies_in_turn(False), x, y)


def other_thread(fence):
    """Thread 0 makes a barrier, thread 32 a copy on it; fence: before or after both meet."""

    @T.prim_func(s_tir=True, private=True)
    def func(x: T.Buffer((4,), "int32"), y: T.Buffer((64,), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((4,), "int32", scope="shared")
                barrier = T.alloc_buffer((1,), "uint64", scope="shared")
                over = T.alloc_buffer((1,), "uint32", scope="local")
                if tx == 0:
                    T.ptx["mbarrier.init.shared::cta.b64"](T.address_of(barrier[0]), T.uint32(1))
                    if fence == "before":
                        T.ptx["fence.mbarrier_init.release.cluster"]()
                T.cuda.cta_sync()
                if tx == 0 and fence == "after":
                    T.ptx["fence.mbarrier_init.release.cluster"]()
                if tx == 32:
                    T.ptx["mbarrier.arrive.expect_tx.shared::cta.b64"](
                        T.address_of(barrier[0]), T.uint32(16)
                    )
                    T.ptx[BULK](
                        T.address_of(sm[0]),
                        T.address_of(x[0]),
                        T.uint32(16),
                        T.address_of(barrier[0]),
                    )
                over[0] = T.uint32(0)
                while over[0] == T.uint32(0):
                    T.ptx["mbarrier.try_wait.parity.shared::cta.b64"](
                        over[0], T.address_of(barrier[0]), T.uint32(0)
                    )
                y[tx] = sm[tx % 4]

    return func


def test_a_barrier_is_there_for_copies_of_other_threads():
    x, y = np.arange(4, dtype=np.int32), np.zeros(64, np.int32)
    run(other_thread("before"), x, y)
    assert_array_equal(y, np.tile(x, 16))
    with pytest.raises(SimtError, match=r"cp\.async\.bulk on an mbarrier with no fence since"):
        run(other_thread("after"), x, y)
