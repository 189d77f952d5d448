"""What is measured: one table of cases, each a problem and what is asked of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .shapes import (
    INSTRUCTION,
    Attention,
    Encoder,
    Longformer,
    Matmul,
    Nsa,
    Problem,
)


@dataclass(frozen=True)
class OverPeer:
    """How much faster than the fastest peer ours has to be."""

    least: float
    part: str = ""
    """Of the names of the peers that count; "" is all of them."""
    near_limit: float | None = None
    """A peer above `NEAR` of the limit has to be beaten by this factor only."""

    NEAR = 0.95


@dataclass(frozen=True)
class Relative:
    """How long ours may take in comparison with ours of another problem, in the same turns."""

    problem: Problem
    most: float
    per_operation: bool = False


@dataclass(frozen=True)
class Case:
    """A problem and its goals."""

    group: str
    problem: Problem
    of_limit: float | None = None
    """Least fraction of the speed at the limit; of vector instructions where tiles do the work."""
    over_peers: tuple[OverPeer, ...] = ()
    relative: tuple[Relative, ...] = ()
    quick: bool = False
    """Belongs to the short set."""
    peers: bool = True
    """Whether other libraries are measured too."""
    measure: str = "speed"
    """Or "memory", bytes of a call beyond inputs and outputs, or "compile", seconds of
    `opferry.compile`; both in a process of their own."""
    most: float | None = None
    """Bytes or seconds allowed."""

    @property
    def name(self) -> str:
        prefix = {"speed": "", "memory": "memory of ", "compile": "compile time of "}
        return prefix[self.measure] + self.problem.label


def _gemm() -> Iterable[Case]:
    large = [(512, 768, 768), (512, 3072, 768), (512, 768, 3072), (2048, 4096, 4096)]
    small = [(128, 768, 768), (128, 3072, 768), (128, 768, 3072)]
    goals = (
        [(s, 0.93, 0.88, 1.10) for s in large]
        + [(s, 0.88, 0.82, 1.15) for s in small]
        + [((16, 4096, 4096), 0.85, 0.80, 1.05)]
    )
    shown = {(128, 768, 768), (512, 3072, 768)}
    for shape, bare, fused, over_peer in goals:
        quick = shape in shown
        any_peer = (OverPeer(over_peer),)
        to_int8 = (OverPeer(over_peer, near_limit=1.0),) if shape in large else any_peer
        ordered = Matmul(*shape, "int8", "QOrderedMatMul")
        yield Case("gemm", Matmul(*shape, "int32"), bare, any_peer, quick=quick)
        yield Case("gemm", Matmul(*shape, "int8"), fused, to_int8, quick=quick)
        yield Case("gemm", Matmul(*shape, "bf16", per_token=True), fused, any_peer, quick=quick)
        yield Case("gemm", ordered, fused, to_int8, quick=quick)
        if quick:
            static = Matmul(*shape, "int8")
            symbolic = (Relative(static, 1.10),)
            yield Case("gemm", Matmul(*shape, "fp16", per_token=True), fused, any_peer)
            yield Case("gemm", replace(ordered, residual=True), fused, peers=False)
            yield Case("gemm", replace(ordered, tiled=True), fused, to_int8)
            yield Case("gemm", replace(static, symbolic=True), None, (), symbolic, peers=False)
    for M, fraction in ((1, 0.90), (16, 0.65)):
        for out in ("int32", "int8"):
            cold = Matmul(M, 4096, 4096, out, cold=True)
            yield Case("gemm", cold, fraction, (OverPeer(1.05),), quick=out == "int8")


def _tiers() -> Iterable[Case]:
    """Instructions below those of the newest CPUs; no peer can be told to use them."""
    for target in INSTRUCTION:
        for out in ("int32", "int8"):
            yield Case("tiers", Matmul(512, 3072, 768, out, target=target), 0.85, peers=False)


def _odd() -> Iterable[Case]:
    """Sizes that are no multiple of a tile, beside the next size that is.

    The time per operation may be 1.3 times that of the next round size. A single row, column or
    product is held against the time of the next round size itself: vectors have no such fraction.
    """
    sizes = (
        [((m, 768, 768), (r, 768, 768)) for m, r in ((1, 2), (3, 4), (5, 8), (7, 8), (9, 16))]
        + [((m, 768, 768), (r, 768, 768)) for m, r in ((13, 16), (15, 16), (17, 32))]
        + [((100, 768, 768), (128, 768, 768)), ((511, 768, 768), (512, 768, 768))]
        + [((512, n, 768), (512, r, 768)) for n, r in ((1, 16), (33, 64), (100, 128), (1000, 1024))]
        + [((512, 768, k), (512, 768, r)) for k, r in ((1, 4), (17, 32), (100, 128), (4097, 4160))]
    )
    for odd, round_ in sizes:
        relative = Relative(Matmul(*round_, "int8"), 1.3, per_operation=1 not in odd)
        quick = odd in ((17, 768, 768), (512, 768, 100))
        yield Case("odd", Matmul(*odd, "int8"), None, (), (relative,), quick, peers=False)


def _attention() -> Iterable[Case]:
    mini, base, long = (
        Attention(1, 12, 12, 128, 128, 64),
        Attention(1, 12, 12, 512, 512, 64),
        Attention(1, 12, 12, 2048, 2048, 64),
    )
    wide, batch = Attention(1, 16, 16, 4096, 4096, 128), Attention(8, 12, 12, 512, 512, 64)
    grouped = Attention(1, 32, 8, 2048, 2048, 128)
    for full in (mini, base, long, wide, batch, grouped):
        S, quick = full.S1, full in (mini, base)
        causal, bf16 = replace(full, mask="causal"), replace(full, dtype="bf16")
        bf16_causal = replace(bf16, mask="causal")
        of_full = 0.80 if S >= 512 else 0.65
        of_causal = 0.70 if S >= 2048 else 0.50 if S == 512 else None
        of_bf16 = 0.62 if S >= 2048 else 0.55 if S == 512 else None
        of_bf16_causal = 0.50 if S >= 512 else None
        as_fp32 = (Relative(full, 1.0),)
        yield _against(full, of_full, 1.05, quick=quick)
        yield _against(causal, of_causal, 1.5, quick=quick)
        yield _against(bf16, of_bf16, 1.15, quick=quick)
        yield _against(bf16_causal, of_bf16_causal, 1.8, quick=quick)
        yield Case("attention", replace(full, dtype="fp16"), of_full, (), as_fp32, peers=False)
        if full in (mini, base, long):
            for plain, over_peer in ((full, 1.05), (bf16, 1.15)):
                for mask in ("bool", "pse"):
                    allowed = (Relative(plain, 1.15),)
                    shown = full == base and mask == "bool"
                    yield _against(replace(plain, mask=mask), None, over_peer, allowed, shown)
    for mask in ("band", "prefix"):
        yield _against(replace(long, mask=mask), 0.70 if mask == "prefix" else 0.50, 1.5)
    packed = replace(long, mask="causal", lengths=(256, 512, 1280))
    yield Case("attention", packed, 0.70, peers=False)
    yield from _decode()


def _against(
    problem: Attention,
    of_limit: float | None,
    over_peers: float,
    relative: tuple[Relative, ...] = (),
    quick: bool = False,
) -> Case:
    return Case("attention", problem, of_limit, (OverPeer(over_peers),), relative, quick)


def _decode() -> Iterable[Case]:
    """One query row against long keys; half floats take half the time, noise allowed for."""
    for heads in (32, 8):
        fp32 = Attention(1, 32, heads, 1, 4096, 128)
        yield _against(fp32, 0.90, 1.05, quick=True)
        for dtype in ("fp16", "bf16"):
            half = (Relative(fp32, 0.55),)
            yield _against(replace(fp32, dtype=dtype), 0.90, 1.05, half)
    yield _against(Attention(1, 1, 1, 1, 32768, 128), 0.90, 1.05)  # one head: split over keys


def _longformer() -> Iterable[Case]:
    over_peers = (OverPeer(5.0, "transformers fp32"), OverPeer(2.5, "transformers bf16"))
    for S in (1024, 2048, 4096):
        for G in (1, 16):
            doubled = (Relative(Longformer(S // 2, G), 2.1),) if S > 1024 else ()
            quick = (S, G) == (1024, 16)
            yield Case("longformer", Longformer(S, G), 1 / 1.8, over_peers, doubled, quick)


def _nsa() -> Iterable[Case]:
    for S in (4096, 16384):
        for D in (128, 192):
            for dtype, of_limit in (("fp32", 1 / 2.0), ("bf16", 1 / 2.5)):
                problem = Nsa(S, D, dtype)
                # Scores and selection are a fifth of the time at most.
                selection = (Relative(replace(problem, select=False), 1 / 0.8),)
                quick = (S, D) == (4096, 128)
                yield Case("nsa", problem, of_limit, (OverPeer(5.0, dtype),), selection, quick)


def _model() -> Iterable[Case]:
    for B in (1, 8):
        for S in (128, 256):
            quick = (B, S) == (1, 128)
            yield Case("model", Encoder(B, S), None, (OverPeer(1.3, "int8"),), quick=quick)
    yield Case("model", Encoder(1, 128), measure="compile", most=15.0, quick=True)


def _memory() -> Iterable[Case]:
    """Scores of one head alone would be 4 GiB, or 256 MiB where keys are compressed."""
    allowed = float(32 << 20)
    for dtype in ("fp32", "bf16"):
        attention = Attention(1, 2, 2, 32768, 32768, 64, dtype)
        yield Case("memory", attention, measure="memory", most=allowed, quick=dtype == "fp32")
    yield Case("memory", Nsa(32768, 128, N1=16, N2=1), measure="memory", most=allowed)


CASES: tuple[Case, ...] = (
    *_gemm(),
    *_tiers(),
    *_odd(),
    *_attention(),
    *_longformer(),
    *_nsa(),
    *_model(),
    *_memory(),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


def select(groups: Iterable[str] = (), pattern: str = "", quick: bool = False) -> list[Case]:
    """The cases of these groups (none: all) whose name matches `pattern`, ignoring case."""
    groups = set(groups)
    return [
        case
        for case in CASES
        if (not groups or case.group in groups)
        and re.search(pattern, case.name, re.IGNORECASE)
        and (case.quick or not quick)
    ]
