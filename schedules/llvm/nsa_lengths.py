"""The length lists inside the NSA kernel: tilings of packed rows, and what protects memory.

Lists are prefix sums int64 [B]. A tiling by ``step`` rows is aligned with the sequences and needs
no table: the tiles of sequence b start at slot p[b-1] // step + b. These starts increase, and leave
room for every tile (ceil(n / step) <= (p + n) // step - p // step + 1), so a slot finds its
sequence by bisection, and at most one slot of a sequence stays empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

if TYPE_CHECKING:
    from ...relay_ops.nsa_compress_attention import Problem


def start(prefix: Buffer, b: Expr) -> Expr:
    """First packed row of sequence b."""
    return T.if_then_else(b > 0, prefix[T.max(b - 1, 0)], T.int64(0))


def slots(rows: Expr, sequences: Expr, step: int) -> Expr:
    """Slots of a tiling of ``rows`` packed rows."""
    return rows // step + sequences


def first_slot(prefix: Buffer, b: Expr, step: int) -> Expr:
    """Slot of the first tile of sequence b."""
    return start(prefix, b) // step + b


@T.inline
def find_sequence(found, prefix, sequences, step, slot):
    """found[0] = the sequence that owns ``slot``; found is int64 [2]."""
    found[0] = T.int64(0)
    found[1] = sequences
    while found[1] - found[0] > 1:
        middle: T.int64 = (found[0] + found[1]) // 2
        if prefix[middle - 1] // step + middle <= slot:
            found[0] = middle
        else:
            found[1] = middle


def guard(problem: Problem):
    """An inline ``check(QL, KL, SL, B, Tq, Tk, R, C, RF, CF)``: nothing is read or written outside
    of a buffer once it has passed.

    QL, KL, SL are the lists of query rows, compressed keys and selection blocks; the extents are
    those of query and key [Tq, ...], [Tk, ...] and of the masks [R, C], [RF, CF]. Lists that come
    from the caller were judged before, in words that show the values.
    """
    limit, stride = problem.cmp_skv_limit, problem.blocks_stride
    has_mask, has_forced = problem.atten_mask is not None, problem.topk_mask is not None

    def error(subject, allowed):
        return ("ValueError", [f"{problem.label}: {subject}: found values outside, {allowed}"])

    @T.inline
    def check_mask(name, QL, KL, b, rows, columns, keys_per_column):
        assert QL[b] - start(QL, b) <= rows, error(
            f'input "{name}" rows', "allowed one for each query row of a sequence"
        )
        assert T.ceildiv(KL[b] - start(KL, b), keys_per_column) <= columns, error(
            f'input "{name}" columns', "allowed as many as the longest sequence needs"
        )

    @T.inline
    def check(QL, KL, SL, B, Tq, Tk, R, C, RF, CF):
        for b in range(B):
            assert start(QL, b) <= QL[b], error(
                '"actual_seq_qlen"', "allowed non-decreasing prefix sums starting at 0 or more"
            )
            assert start(KL, b) <= KL[b], error(
                '"actual_cmp_seq_kvlen"', "allowed non-decreasing prefix sums starting at 0 or more"
            )
            assert KL[b] - start(KL, b) <= limit, error(
                '"actual_cmp_seq_kvlen"', f"allowed at most {limit} keys in a sequence"
            )
            assert SL[b] - start(SL, b) == problem.blocks(KL[b] - start(KL, b)), error(
                '"actual_sel_seq_kvlen"', f"allowed ceil(compressed keys / {stride}) a sequence"
            )
            if has_mask:
                check_mask("atten_mask", QL, KL, b, R, C, 1)
            if has_forced:
                check_mask("topk_mask", QL, KL, b, RF, CF, stride)
        assert QL[B - 1] <= Tq, error('"actual_seq_qlen"', "allowed at most the rows of query")
        assert KL[B - 1] <= Tk, error('"actual_cmp_seq_kvlen"', "allowed at most the rows of key")

    return check
