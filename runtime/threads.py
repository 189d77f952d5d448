"""How many threads kernels use. TVM's pool takes half of the cores on x86 by itself; here all that
we may use.
"""

from __future__ import annotations

import os
import threading

from .cpu import available_cores
from .errors import OpferryError

VARIABLE = "OPFERRY_NUM_THREADS"
_SHARE_ALL_CORES = (
    -3
)  # TVM's AffinityMode: workers float over the given cores instead of being pinned
_configured = threading.local()


def default_threads() -> int:
    """``OPFERRY_NUM_THREADS`` if set, else the cores this process may use."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return available_cores()
    if not value.isdecimal() or int(value) < 1:
        raise OpferryError(f"{VARIABLE}: found {value!r}, allowed a whole number of at least 1")
    return int(value)


def reserve() -> None:
    """Size TVM's pool: it is created at a thread's first parallel region and never grows after."""
    os.environ.setdefault("TVM_NUM_THREADS", str(max(default_threads(), available_cores())))
    os.environ.setdefault("TVM_BIND_THREADS", "0")  # else it pins the caller's thread to one core


def use(count: int) -> None:
    """Let the calling thread's pool work with ``count`` threads (TVM keeps a pool for each calling
    thread).
    """
    if getattr(_configured, "count", None) == count:
        return
    from tvm_ffi import get_global_func

    cores = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(available_cores())
    )
    get_global_func("runtime.config_threadpool")(
        _SHARE_ALL_CORES, count, [str(core) for core in sorted(cores)]
    )
    _configured.count = count
