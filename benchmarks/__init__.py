"""Speed of the compiled operators beside other CPU libraries and the ceilings of the machine."""

import os

THREADS = int(os.environ.get("BENCH_THREADS", "2"))
"""Threads of every library and of the machine's limits."""


def use_threads() -> None:
    """Have every library, ours included, use `THREADS` threads.

    They read the environment when they are imported: call this before `ours` or `peers` is.
    """
    for variable in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "OPFERRY_NUM_THREADS",
        "TVM_NUM_THREADS",
    ):
        os.environ[variable] = str(THREADS)
