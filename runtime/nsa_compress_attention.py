"""Rules on the length lists of NPUNsaCompressAttention, at compile time or before a call."""

from __future__ import annotations

import numpy as np

from .errors import InvalidInputError, message

LENGTHS = ("actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen")
CMP_SKV_LIMIT = 14000
"""Most compressed keys of one sequence: the original hardware's limit, kept."""


def lengths(
    label: str,
    *,
    actual_seq_qlen: np.ndarray | None,
    actual_cmp_seq_kvlen: np.ndarray | None,
    actual_sel_seq_kvlen: np.ndarray | None,
    tokens: int | None,
    key_tokens: int | None,
    blocks_stride: int,
    atten_mask_rows: int | None,
    atten_mask_columns: int | None,
    topk_mask_rows: int | None,
    topk_mask_columns: int | None,
) -> None:
    """The lists are prefix sums int64 [B] that fit the packed tensors, each other and the masks.

    tokens is T, key_tokens T2, blocks_stride r; the mask extents are None where there is no mask.
    None stands for what is not known yet. Raises InvalidInputError.
    """

    def refuse(name: str, found: object, allowed: object) -> None:
        raise InvalidInputError(message(label, f'"{name}"', found, allowed))

    given = dict(zip(LENGTHS, (actual_seq_qlen, actual_cmp_seq_kvlen, actual_sel_seq_kvlen)))
    known = {name: values for name, values in given.items() if values is not None}
    for name, values in known.items():
        if values.ndim != 1 or not values.size:
            refuse(name, f"shape {values.shape}", "shape (B,), B >= 1")
        other = next(iter(known))
        if values.size != known[other].size:
            refuse(name, f"length {values.size}", f"{known[other].size}, that of {other}")
        if values[0] < 0 or np.any(values[1:] < values[:-1]):
            refuse(name, _show(values), "non-decreasing prefix sums starting at 0 or more")

    extents = {"actual_seq_qlen": tokens, "actual_cmp_seq_kvlen": key_tokens}
    for name, extent in extents.items():
        if name in known and extent is not None and known[name][-1] > extent:
            owner = "query" if name == "actual_seq_qlen" else "key"
            refuse(name, f"last element {known[name][-1]}", f"at most {extent}, rows of {owner}")

    counts = {name: np.diff(values, prepend=0) for name, values in known.items()}
    rows, keys, blocks = (counts.get(name) for name in LENGTHS)
    if keys is not None and keys.max() > CMP_SKV_LIMIT:
        b = int(keys.argmax())
        refuse(
            "actual_cmp_seq_kvlen",
            f"{keys[b]} keys in sequence {b}",
            f"at most {CMP_SKV_LIMIT}",
        )
    if keys is not None and blocks is not None:
        wanted = -(-keys // blocks_stride)
        for b in np.flatnonzero(blocks != wanted)[:1]:
            refuse(
                "actual_sel_seq_kvlen",
                f"{blocks[b]} blocks in sequence {b}",
                f"{wanted[b]}, ceil({keys[b]} compressed keys / {blocks_stride})",
            )

    covers = (
        ("atten_mask", "rows", atten_mask_rows, rows, "query rows"),
        ("atten_mask", "columns", atten_mask_columns, keys, "compressed keys"),
        ("topk_mask", "rows", topk_mask_rows, rows, "query rows"),
        ("topk_mask", "columns", topk_mask_columns, blocks, "selection blocks"),
    )
    for mask, axis, extent, count, what in covers:
        if extent is not None and count is not None and count.max() > extent:
            refuse(
                mask, f"{extent} {axis}", f"at least {count.max()}, the most {what} of a sequence"
            )


def _show(values: np.ndarray) -> str:
    """All of a short list, the neighbourhood of the first fault of a long one."""
    if values.size <= 16:
        return str(values.tolist())
    faults = np.flatnonzero(values < np.concatenate(([0], values[:-1])))
    at = int(faults[0])
    first = max(at - 2, 0)
    return f"{values[first : at + 3].tolist()} at index {first}"
