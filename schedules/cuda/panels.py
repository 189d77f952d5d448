"""Weights as shared memory wants them: whole panels, each one bulk copy away from the products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..intrin import cuda as ptx
from ..intrin import hopper
from ..intrin.cuda import CHUNK_BYTES as CHUNK


@dataclass(frozen=True)
class Panels:
    """int8 [zb, N/rows, K/row_bytes, rows, row_bytes], zero-padded, chunks of a row swizzled.

    Index arithmetic holds for integers, NumPy arrays and TIR expressions.
    """

    rows: int = 64
    row_bytes: int = hopper.ROW_BYTES

    @property
    def bytes(self) -> int:
        """Of one panel."""
        return self.rows * self.row_bytes

    def count(self, n: int, k: int) -> tuple[int, int]:
        """Panels along N and along K."""
        return -(-n // self.rows), -(-k // self.row_bytes)

    def entry(self, t: Any, z: Any, n: Any, k: Any) -> Any:
        """Element (n, k) of matrix z of a tensor in panels."""
        row = n % self.rows
        return t[z, n // self.rows, k // self.row_bytes, row, self._byte(row, k % self.row_bytes)]

    def stored(self, panel: Any, step: Any, row: Any, byte: Any) -> tuple[Any, Any]:
        """(n, k) of the element stored there."""
        return panel * self.rows + row, step * self.row_bytes + self._byte(row, byte)

    def _byte(self, row: Any, byte: Any) -> Any:
        """Where in its row a byte is stored, and the other way round."""
        chunk = ptx.swizzle(row, byte // CHUNK, self.row_bytes // CHUNK)
        return chunk * CHUNK + byte % CHUNK
