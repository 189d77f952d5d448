"""TVM warns on stderr about things no user can act on; those lines are dropped."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

VARIABLE = "OPFERRY_TVM_STDERR"
"""Set to 1, this environment variable lets everything through at once, for the hunt of a crash."""

_NOISE = (
    b"Scope Saving",  # on every save
    b"Scope Loaded",  # on every load
    b"Unknown pragma pragma_scope",  # TVM's own code generator about TVM's own loops
    b"Unable to detect CUDA version",  # a CUDA target on a machine without a GPU
)


class _Filter:
    """Holds back file descriptor 2, which belongs to the whole process, while anybody asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._held: BinaryIO | None = None
        self._stderr = -1

    def start(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1 or os.environ.get(VARIABLE) == "1":
                return
            try:
                self._stderr = os.dup(2)
            except OSError:  # there is no stderr
                return
            try:
                self._held = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `stop`)
            except OSError:  # nowhere to hold it: all is passed on
                os.close(self._stderr)
                return
            _flush()
            os.dup2(self._held.fileno(), 2)

    def stop(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users or self._held is None:
                return
            _flush()
            os.dup2(self._stderr, 2)
            os.close(self._stderr)
            held, self._held = self._held, None
            with held:
                held.seek(0)
                for line in held:
                    if not any(noise in line for noise in _NOISE):
                        os.write(2, line)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
        sys.stderr.flush()


_filter = _Filter()


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Hold back what goes to file descriptor 2 and pass on at the end all but those lines."""
    _filter.start()
    try:
        yield
    finally:
        _filter.stop()
