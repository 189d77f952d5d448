"""SpeedFusionAttention: rules on the values of its integer lists, known late or early.

Source: the operator's specification, sections 4.2, 4.3 and 5. A value or size that is not known yet
is ``None``, and what depends on it is skipped.
"""

from __future__ import annotations

import numpy as np

from .errors import InvalidInputError, message

MAX_SEQUENCES = 1024
MAX_LENGTH = 524288
MAX_PREFIXES = 32
PACKED_ROWS = 1024


def check_prefix(
    label: str,
    *,
    prefix: np.ndarray | None,
    B: int | None,
    S1: int | None,
    S2: int | None,
) -> None:
    """One value per batch entry, max(0, S2 - S1) <= prefix[b] <= S2.

    Raises:
        InvalidInputError: naming ``prefix``, what was found and what is allowed.
    """
    if prefix is None:
        return

    def refuse(found: object, allowed: str) -> None:
        raise InvalidInputError(message(label, '"prefix"', found, allowed))

    if prefix.ndim != 1 or prefix.size > MAX_PREFIXES:
        refuse(f"{prefix.size} values", f"one per batch entry, at most {MAX_PREFIXES}")
    if B is not None and prefix.size != B:
        refuse(f"{prefix.size} values", f"one per batch entry, that is {B}")
    if S1 is not None and S2 is not None:
        low = max(0, S2 - S1)
        if np.any((prefix < low) | (prefix > S2)):
            refuse(prefix.tolist(), f"values from max(0, S2 - S1) = {low} to S2 = {S2}")


def check_sequences(
    label: str,
    *,
    actual_seq_qlen: np.ndarray | None,
    actual_seq_kvlen: np.ndarray | None,
    T1: int | None,
    T2: int | None,
    W: int | None,
    equal: bool,
    packed: bool,
    grows: bool,
) -> None:
    """Cumulative lengths of TND.

    Args:
        T1, T2: packed query and key tokens, which the lists end with.
        W: last axis of a packed bias, the largest length.
        equal: a bias is given, each S1_b = S2_b.
        packed: the bias is packed, the largest length is above 1024.
        grows: sparse_mode 3 with a mask, each S1_b <= S2_b.

    Raises:
        InvalidInputError: naming the list, what was found and what is allowed.
    """
    lists = {"actual_seq_qlen": (actual_seq_qlen, T1), "actual_seq_kvlen": (actual_seq_kvlen, T2)}
    for name, (ends, total) in lists.items():
        if ends is not None:
            _check_ends(label, name, ends, total)
    if actual_seq_qlen is None or actual_seq_kvlen is None:
        return
    if actual_seq_qlen.size != actual_seq_kvlen.size:
        found = f"{actual_seq_qlen.size} and {actual_seq_kvlen.size} values"
        _refuse_sequences(label, found, "lists of one length")
    queries, keys = (np.diff(ends, prepend=0) for ends in (actual_seq_qlen, actual_seq_kvlen))
    _forbid(label, (queries > 0) & (keys == 0), queries, keys, "keys for every sequence of queries")
    if grows:
        _forbid(label, queries > keys, queries, keys, "S1 <= S2 in sparse_mode 3")
    if equal:
        _forbid(label, queries != keys, queries, keys, "S1 = S2, since pse is given")
    largest = int(keys.max())
    if packed and largest <= PACKED_ROWS:
        allowed = f"a length above {PACKED_ROWS}, since pse of pse_type 0 or 1 is packed in TND"
        _refuse_sequences(label, f"largest length {largest}", allowed)
    if packed and W is not None and largest != W:
        found = f"last axis {W} with largest length {largest}"
        raise InvalidInputError(message(label, 'input "pse"', found, "the largest length"))


def _check_ends(label: str, name: str, ends: np.ndarray, total: int | None) -> None:
    def refuse(found: object, allowed: str) -> None:
        raise InvalidInputError(message(label, f'"{name}"', found, allowed))

    if ends.ndim != 1 or not 1 <= ends.size <= MAX_SEQUENCES:
        refuse(f"{ends.size} values", f"1 to {MAX_SEQUENCES} values")
    lengths = np.diff(ends, prepend=0)
    if np.any(lengths < 0) or ends[0] < 0:
        refuse(_excerpt(ends), "non-decreasing cumulative lengths from 0 on")
    if lengths.max() > MAX_LENGTH:
        refuse(f"a length of {lengths.max()}", f"at most {MAX_LENGTH}")
    if total is not None and ends[-1] != total:
        refuse(f"last value {ends[-1]}", f"{total}, the number of packed tokens")


def _forbid(
    label: str, wrong: np.ndarray, queries: np.ndarray, keys: np.ndarray, allowed: str
) -> None:
    if wrong.any():
        b = int(np.argmax(wrong))
        found = f"S1 = {queries[b]}, S2 = {keys[b]} in sequence {b}"
        _refuse_sequences(label, found, allowed)


def _refuse_sequences(label: str, found: str, allowed: str) -> None:
    subject = '"actual_seq_qlen" and "actual_seq_kvlen"'
    raise InvalidInputError(message(label, subject, found, allowed))


def _excerpt(values: np.ndarray) -> str:
    shown = ", ".join(map(str, values[:16].tolist()))
    return f"[{shown}{', ...' if values.size > 16 else ''}]"
