"""Speed of the compiled operators beside other CPU libraries and the ceilings of the machine.

Importing this package fixes the number of threads of every library, ours included: they read it
from the environment when they are imported, so this package comes first.
"""

import os

THREADS = int(os.environ.get("BENCH_THREADS", "2"))
"""Threads of every library and of the machine's limits."""

for _variable in (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OPFERRY_NUM_THREADS",
    "TVM_NUM_THREADS",
):
    os.environ[_variable] = str(THREADS)
