"""What is measured: one table of cases, each a problem and what is asked of its speed.

A problem says how much work it is, in the units of `limits`: operations by kind of instruction, or
bytes read. The time at the limit is the sum over the kinds. Letters: M K N of a matmul, B batch,
N1 N2 query and key heads, S1 S2 query and key length, D head size, G global tokens, W window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Matmul:
    """Y[M, N] = epilogue(A[M, K] @ B[K, N]) of int8 matrices, B constant."""

    M: int
    N: int
    K: int
    out: str
    """int32 without epilogue; int8, bf16 or fp16 with a scale per column and a bias."""
    op: str = "NPUQuantMatmul"
    """Or QOrderedMatMul."""
    per_token: bool = False
    """A second scale, per row."""
    residual: bool = False
    """QOrderedMatMul: C is added."""
    tiled: bool = False
    """QOrderedMatMul: COL32 activations and COL32_2R_4R4 weights instead of ROW and COL."""
    cold: bool = False
    """The weights come from memory: several are used in turn, as by the layers of a model."""
    target: str = "llvm"
    """As `opferry.compile` takes it."""

    COPIES = 6
    """Weights of a cold problem. Together they exceed the last-level cache several times."""

    @property
    def label(self) -> str:
        epilogue = " per token" * self.per_token + " +C" * self.residual
        where = " COL32" * self.tiled + " cold" * self.cold
        target = "" if self.target == "llvm" else f" on {self.target}"
        return f"{self.op} {self.M}x{self.N}x{self.K} -> {self.out}{epilogue}{where}{target}"

    @property
    def operations(self) -> float:
        return 2.0 * self.M * self.N * self.K

    @property
    def work(self) -> dict[str, float]:
        if self.cold:
            return {"read": float(self.N * self.K)}
        return {INSTRUCTION.get(self.target, "int8"): self.operations}

    @property
    def footprint(self) -> float:
        """Bytes of all weights of a cold problem."""
        return float(self.COPIES * self.N * self.K)


INSTRUCTION = {
    "x86-avxvnni": "int8-256",
    "x86-avx512": "int16-512",
    "x86-avx2": "int16-256",
}
"""Target -> limit that judges an int8 product there."""


@dataclass(frozen=True)
class Attention:
    """O[B, N1, S1, D] = softmax(Q K^T / sqrt(D), masked) V."""

    B: int
    N1: int
    N2: int
    S1: int
    S2: int
    D: int
    dtype: str = "fp32"
    mask: str = "full"
    """full, causal, band (the last `BAND` keys), bool (a dense mask) or pse (a dense bias)."""

    op = "SpeedFusionAttention"
    BAND = 256

    @property
    def label(self) -> str:
        heads = f"{self.N1}" if self.N1 == self.N2 else f"{self.N1}/{self.N2}"
        length = f"{self.S1}" if self.S1 == self.S2 else f"{self.S1}x{self.S2}"
        mask = "" if self.mask == "full" else f" {self.mask}"
        return f"{self.op} B{self.B} N{heads} S{length} D{self.D} {self.dtype}{mask}"

    @property
    def window(self) -> tuple[int | None, int | None]:
        """Keys before and after the diagonal that a row keeps, None for all."""
        return {"causal": (None, 0), "band": (self.BAND - 1, 0)}.get(self.mask, (None, None))

    @property
    def cells(self) -> int:
        """Pairs of a query and a key that are kept, of one head."""
        before, after = self.window
        i = np.arange(self.S1)
        first = np.zeros_like(i) if before is None else np.maximum(i - before, 0)
        last = np.full_like(i, self.S2) if after is None else np.minimum(i + after + 1, self.S2)
        return int((last - first).sum())

    @property
    def operations(self) -> float:
        return 4.0 * self.B * self.N1 * self.cells * self.D

    @property
    def work(self) -> dict[str, float]:
        if self.S1 == 1:  # every key and value is used once: memory decides
            return {"read": self.footprint}
        return {"bf16" if self.dtype == "bf16" else "fp32": self.operations}

    @property
    def footprint(self) -> float:
        """Bytes of keys and values."""
        return 2.0 * self.B * self.N2 * self.S2 * self.D * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Longformer:
    """A quantised self-attention layer: five projections, a band and the first G tokens global."""

    S: int
    G: int
    hidden: int = 768
    heads: int = 12
    W: int = 256

    op = "QOrderedLongformerAttention"

    @property
    def label(self) -> str:
        return f"{self.op} S{self.S} G{self.G}"

    @property
    def cells(self) -> int:
        """Pairs of a query and a key, of one head; keys in a window and global count once."""
        i = np.arange(self.S)
        low, high = np.maximum(i - self.W, 0), np.minimum(i + self.W, self.S - 1)
        outside = np.minimum(self.G, low)  # global keys before the window
        local = (high - low + 1 + outside)[self.G :]
        return int(local.sum()) + self.G * self.S

    @property
    def projections(self) -> float:
        """Operations: query, key, value and global key, value of all tokens, global query of G."""
        return 2.0 * self.hidden**2 * (5 * self.S + self.G)

    @property
    def operations(self) -> float:
        return self.projections + self.work["fp32"]

    @property
    def work(self) -> dict[str, float]:
        return {"int8": self.projections, "fp32": 4.0 * self.cells * self.hidden}


@dataclass(frozen=True)
class Nsa:
    """Attention to compressed keys, causal, and the k blocks of largest score per key head."""

    S: int
    D: int
    dtype: str = "fp32"
    Dv: int = 128
    N1: int = 64
    N2: int = 4
    l: int = 32
    d: int = 16
    block: int = 64
    k: int = 16

    op = "NPUNsaCompressAttention"

    @property
    def label(self) -> str:
        return f"{self.op} S{self.S} N{self.N1}/{self.N2} D{self.D}/{self.Dv} {self.dtype}"

    @property
    def compressed(self) -> int:
        """Compressed keys."""
        return (self.S - self.l) // self.d + 1

    @property
    def blocks(self) -> int:
        """Blocks to select from."""
        return -(-self.compressed // (self.block // self.d))

    @property
    def operations(self) -> float:
        """Of the pairs that a causal mask keeps: key c is complete at position c * d + l - 1."""
        visible = np.clip((np.arange(self.S) - self.l + 1) // self.d + 1, 0, self.compressed)
        return 2.0 * self.N1 * float(visible.sum()) * (self.D + self.Dv)

    @property
    def work(self) -> dict[str, float]:
        return {self.dtype: self.operations}


@dataclass(frozen=True)
class Encoder:
    """all-MiniLM-L6-v2 on B sentences of S tokens: H = 384, 12 heads, 6 layers."""

    B: int
    S: int

    op = "MiniLM"
    HIDDEN, INNER, LAYERS = 384, 1536, 6

    @property
    def label(self) -> str:
        return f"{self.op} B{self.B} S{self.S}"

    @property
    def operations(self) -> float:
        return sum(self.work.values())

    @property
    def work(self) -> dict[str, float]:
        tokens = self.LAYERS * self.B * self.S
        linear = 2.0 * tokens * self.HIDDEN * (4 * self.HIDDEN + 2 * self.INNER)
        return {"int8": linear, "fp32": 4.0 * tokens * self.S * self.HIDDEN}


Problem = Matmul | Attention | Longformer | Nsa | Encoder


@dataclass(frozen=True)
class Case:
    """A problem and its goals."""

    group: str
    problem: Problem
    of_limit: float | None = None
    """Least fraction of the speed at the limit."""
    of_peers: tuple[tuple[str, float], ...] = ()
    """(part of a peer's name, least speedup over the fastest such peer); "" is any peer."""
    quick: bool = False
    """Belongs to the short set."""
    neighbour: Problem | None = None
    """The next round size, measured in place of peers; its time per operation is the measure."""

    @property
    def name(self) -> str:
        return self.problem.label


def _gemm() -> Iterable[Case]:
    large = [(512, 768, 768), (512, 3072, 768), (512, 768, 3072), (2048, 4096, 4096)]
    small = [(128, 768, 768), (128, 3072, 768), (128, 768, 3072)]
    goals = (
        [(s, 0.93, 0.88, 1.10) for s in large]
        + [(s, 0.88, 0.82, 1.15) for s in small]
        + [((16, 4096, 4096), 0.85, 0.80, 1.05)]
    )
    shown = {(128, 768, 768), (512, 3072, 768)}
    for shape, bare, fused, peer in goals:
        quick = shape in shown
        any_peer = (("", peer),)
        yield Case("gemm", Matmul(*shape, "int32"), bare, any_peer, quick)
        yield Case("gemm", Matmul(*shape, "int8"), fused, any_peer, quick)
        yield Case("gemm", Matmul(*shape, "bf16", per_token=True), fused, any_peer, quick)
        if quick:
            yield Case("gemm", Matmul(*shape, "fp16", per_token=True), fused, any_peer)
            ordered = Matmul(*shape, "int8", "QOrderedMatMul")
            yield Case("gemm", ordered, fused, any_peer, quick)
            with_c = Matmul(*shape, "int8", "QOrderedMatMul", residual=True)
            yield Case("gemm", with_c, fused)
            tiled = Matmul(*shape, "int8", "QOrderedMatMul", tiled=True)
            yield Case("gemm", tiled, fused, any_peer)
    for M, fraction in ((1, 0.90), (16, 0.65)):
        for out in ("int32", "int8"):
            cold = Matmul(M, 4096, 4096, out, cold=True)
            yield Case("gemm", cold, fraction, (("", 1.05),), quick=out == "int8")


def _tiers() -> Iterable[Case]:
    for target in INSTRUCTION:
        yield Case("tiers", Matmul(512, 3072, 768, "int32", target=target), 0.85)


def _odd() -> Iterable[Case]:
    """Sizes that are no multiple of a tile, beside the next size that is."""
    sizes = (
        [((m, 768, 768), (16 if m <= 16 else 32, 768, 768)) for m in (2, 3, 5, 7, 9, 13, 15, 17)]
        + [((100, 768, 768), (128, 768, 768)), ((511, 768, 768), (512, 768, 768))]
        + [((512, n, 768), (512, -(-n // 64) * 64, 768)) for n in (1, 33, 100, 1000)]
        + [((512, 768, k), (512, 768, -(-k // 64) * 64)) for k in (1, 17, 100, 4097)]
    )
    for odd, round_ in sizes:
        neighbour = Matmul(*round_, "int8")
        quick = odd in ((17, 768, 768), (512, 768, 100))
        yield Case("odd", Matmul(*odd, "int8"), None, (("", 1 / 1.3),), quick, neighbour)


def _attention() -> Iterable[Case]:
    mini, base, long = (
        (1, 12, 12, 128, 128, 64),
        (1, 12, 12, 512, 512, 64),
        (1, 12, 12, 2048, 2048, 64),
    )
    wide, batch = (1, 16, 16, 4096, 4096, 128), (8, 12, 12, 512, 512, 64)
    grouped = (1, 32, 8, 2048, 2048, 128)
    for shape in (mini, base, long, wide, batch, grouped):
        S = shape[3]
        quick = shape in (mini, base)

        def case(dtype, mask, of_limit, of_peer, quick=quick, shape=shape):
            goal = ((("", of_peer),)) if of_peer else ()
            return Case("attention", Attention(*shape, dtype, mask), of_limit, goal, quick)

        full = 0.80 if S >= 512 else 0.65
        yield case("fp32", "full", full, 1.05)
        yield case("fp32", "causal", 0.70 if S >= 2048 else 0.50 if S == 512 else None, 1.5)
        yield case("bf16", "full", {128: None, 512: 0.55}.get(S, 0.62), 1.15)
        yield case("bf16", "causal", 0.50 if S >= 512 else None, 1.8)
        yield case("fp16", "full", full, None, quick=False)
        if shape in (mini, base, long):  # a dense mask may cost 15 %
            yield case("fp32", "bool", full / 1.15, 1.05, quick=shape == base)
            yield case("fp32", "pse", full / 1.15, 1.05, quick=False)
    yield Case("attention", Attention(*long, "fp32", "band"), 0.50, (("", 1.5),))
    for heads in (32, 8):
        for dtype in ("fp32", "fp16", "bf16"):
            decode = Attention(1, 32, heads, 1, 4096, 128, dtype)
            quick = dtype == "fp32"
            yield Case("attention", decode, 0.90, (("", 1.05),) if quick else (), quick)


def _longformer() -> Iterable[Case]:
    for S in (1024, 2048, 4096):
        for G in (1, 16):
            goals = (("transformers fp32", 5.0), ("transformers bf16", 2.5))
            yield Case("longformer", Longformer(S, G), 1 / 1.8, goals, (S, G) == (1024, 16))


def _nsa() -> Iterable[Case]:
    for S in (4096, 16384):
        for D in (128, 192):
            for dtype, of_limit in (("fp32", 1 / 2.0), ("bf16", 1 / 2.5)):
                goals = ((dtype, 5.0),)
                quick = (S, D) == (4096, 128)
                yield Case("nsa", Nsa(S, D, dtype), of_limit, goals, quick)


def _model() -> Iterable[Case]:
    for B in (1, 8):
        for S in (128, 256):
            yield Case("model", Encoder(B, S), None, (("int8", 1.3),), (B, S) == (1, 128))


CASES: tuple[Case, ...] = (
    *_gemm(),
    *_tiers(),
    *_odd(),
    *_attention(),
    *_longformer(),
    *_nsa(),
    *_model(),
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
