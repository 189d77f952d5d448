"""The machine's ceilings, measured beside the work that they judge.

A limit is a rate: operations a second of one instruction out of registers ("int8" is vpdpbusd on
512 bits, "int8-256" on 256, "int8-amx" is tdpbssd on matrix tiles, "int16-512" and "int16-256" are
what CPUs without these have, "fp32" is a fused multiply-add, "bf16" is vdpbf16ps, "bf16-amx" is
tdpbf16ps on matrix tiles), or bytes a second that vector loads bring from memory ("read"). The
kernels are in limits.c and are compiled for this machine at the first use.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import THREADS

SECONDS = 0.002
"""A call of a limit takes about this long: short enough to be one of many in a turn."""

_SOURCE = Path(__file__).with_name("limits.c")
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")


class Unavailable(RuntimeError):
    """This machine has no compiler, too few cores, or not the instruction."""


class Limit:
    """One ceiling: a callable that keeps every thread busy and returns the seconds it took.

    The time is that of the slowest thread while it was on its core: neither waking threads nor
    other processes count, the clock rate does. `work` is what a call does, in operations or bytes.

    footprint: bytes that "read" goes over again and again, all threads together. It has to be that
    of the work it judges, for what caches keep of it from one pass to the next helps both.
    """

    def __init__(
        self,
        kind: str,
        threads: int = THREADS,
        seconds: float = SECONDS,
        footprint: float = 0,
    ):
        self.kind = kind
        self.threads = threads
        self.work = 0.0
        self._footprint = int(footprint)
        self._rates = (ctypes.c_double * threads)()
        self._rounds = 1
        self()  # maps the memory
        while self() < seconds / 2:
            self._rounds *= 2

    def __call__(self) -> float:
        seconds = ctypes.c_double()
        self.work = _library().limit_run(
            self.kind.encode(),
            self.threads,
            self._rounds,
            self._footprint,
            self._rates,
            ctypes.byref(seconds),
        )
        if self.work < 0:
            raise Unavailable(f"no limit {self.kind!r} on {self.threads} threads of this machine")
        return seconds.value

    @property
    def thread_rates(self) -> list[float]:
        """Work a second of each thread in the last call, by the clock on the wall: lower than that
        of others when the thread had to share its core.
        """
        return list(self._rates)


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise Unavailable("no C compiler was found")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "limits.so"
        done = subprocess.run(
            [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)], capture_output=True, text=True
        )
        if done.returncode:
            raise Unavailable(f"{_SOURCE.name} does not compile: {done.stderr.strip()[:300]}")
        library = ctypes.CDLL(str(built))
    double_p = ctypes.POINTER(ctypes.c_double)
    library.limit_run.restype = ctypes.c_double
    library.limit_run.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_long,
        ctypes.c_size_t,
        double_p,
        double_p,
    ]
    return library
