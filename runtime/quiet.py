"""TVM's runtime warns about scopes on every save and load; users need not see that."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

_NOISE = (b"Scope Saving", b"Scope Loaded")


@contextlib.contextmanager
def without_scope_warnings() -> Iterator[None]:
    """Drop those two lines from file descriptor 2 and pass the rest on."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held:
                if not any(noise in line for noise in _NOISE):
                    os.write(2, line)
