"""Bulk copies and barriers in shared memory in the interpreter of CUDA kernels."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from simt import SimtError, run
from tvm.script import tirx as T

BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


# -- pieces of kernels ---------------------------------------------------------------------------


@T.inline
def init(barrier, arrivals):
    T.ptx["mbarrier.init.shared::cta.b64"](T.address_of(barrier[0]), T.uint32(arrivals))


@T.inline
def copy(target, source, size, barrier):
    """Arrive and order a copy of ``size`` bytes that belongs to the same phase."""
    T.ptx["mbarrier.arrive.expect_tx.shared::cta.b64"](T.address_of(barrier[0]), T.uint32(size))
    T.ptx[BULK](target, source, T.uint32(size), T.address_of(barrier[0]))


@T.inline
def wait(over, barrier, parity):
    over[0] = T.uint32(0)
    while over[0] == T.uint32(0):
        T.ptx["mbarrier.try_wait.parity.shared::cta.b64"](
            over[0], T.address_of(barrier[0]), T.Cast("uint32", parity)
        )


def copies_in_turn(buffers, fence, all_arrive=False, behind=True):
    """Three copies on one barrier into ``buffers`` of shared memory. Thread 0 orders each as soon
    as it has seen the one before land; behind: once all have. all_arrive: so a phase has 65
    arrivals.
    """
    arrivals = 65 if all_arrive else 1

    @T.prim_func(s_tir=True, private=True)
    def func(x: T.Buffer((3, 64), "int32"), y: T.Buffer((3, 64), "int32")):
        for tx in T.thread_binding(64, "threadIdx.x"):
            with T.sblock("root"):
                T.reads()
                T.writes()
                sm = T.alloc_buffer((64 * buffers,), "int32", scope="shared")
                barrier = T.alloc_buffer((1,), "uint64", scope="shared")
                over = T.alloc_buffer((1,), "uint32", scope="local")
                if tx == 0:
                    init(barrier, arrivals)
                    T.ptx[fence]()
                T.cuda.cta_sync()
                for turn in range(3):
                    at = T.meta_var(turn % buffers * 64)
                    if tx == 0:
                        copy(T.address_of(sm[at]), T.address_of(x[turn, 0]), 256, barrier)
                    if all_arrive:
                        T.ptx["mbarrier.arrive.shared::cta.b64"](T.address_of(barrier[0]))
                    wait(over, barrier, turn % 2)
                    y[turn, tx] = sm[at + 63 - tx]
                    if behind:
                        T.cuda.cta_sync()

    return func


FENCES = ("fence.proxy.async.shared::cta", "fence.mbarrier_init.release.cluster")


# -- what the interpreter does with them ----------------------------------------------------------


@pytest.mark.parametrize("all_arrive", [False, True], ids=["one arrives", "all arrive"])
@pytest.mark.parametrize("fence", FENCES)
@pytest.mark.parametrize("buffers", [1, 3])
def test_phases_of_a_barrier(buffers, fence, all_arrive):
    x, y = np.arange(192, dtype=np.int32).reshape(3, 64), np.zeros((3, 64), np.int32)
    run(copies_in_turn(buffers, fence, all_arrive), x, y)
    assert_array_equal(y, x[:, ::-1])


def test_a_phase_that_may_end_before_the_one_before_is_seen():
    x, y = np.arange(192, dtype=np.int32).reshape(3, 64), np.zeros((3, 64), np.int32)
    message = "phase 1 may end before phase 0 is seen: .* thread 1$"
    with pytest.raises(SimtError, match=message):
        run(copies_in_turn(3, FENCES[1], behind=False), x, y)


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
                    init(barrier, 1)
                    if fence == "before":
                        T.ptx["fence.mbarrier_init.release.cluster"]()
                T.cuda.cta_sync()
                if tx == 0 and fence == "after":
                    T.ptx["fence.mbarrier_init.release.cluster"]()
                if tx == 32:
                    copy(T.address_of(sm[0]), T.address_of(x[0]), 16, barrier)
                wait(over, barrier, 0)
                y[tx] = sm[tx % 4]

    return func


def test_a_barrier_is_there_for_copies_of_other_threads():
    x, y = np.arange(4, dtype=np.int32), np.zeros(64, np.int32)
    run(other_thread("before"), x, y)
    assert_array_equal(y, np.tile(x, 16))
    with pytest.raises(SimtError, match=r"cp\.async\.bulk on an mbarrier with no fence since"):
        run(other_thread("after"), x, y)
