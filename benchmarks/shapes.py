"""Problems: what there is to compute, and how much work that is.

Work is in the units of `limits`: operations by kind of instruction, or bytes read. The time at the
limit is the sum over the kinds. Letters: M K N of a matmul, B batch, N1 N2 query and key heads,
S1 S2 query and key length, D head size, G global tokens, W window.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

COLD_CACHE_BYTES = 512 << 20
"""Keys and values that have to come from memory are at least so many, those of several layers in
turn: more than the 480 MiB that the last-level cache of a large server holds.
"""
COLD_WEIGHT_BYTES = 128 << 20
"""The same of weights: fewer, for each layer is a module to compile."""


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
    symbolic: bool = False
    """M is not known when our module is compiled."""
    target: str = "llvm"
    """As `opferry.compile` takes it."""

    @property
    def label(self) -> str:
        epilogue = " per token" * self.per_token + " +C" * self.residual
        where = " COL32" * self.tiled + " cold" * self.cold
        target = "" if self.target == "llvm" else f" on {self.target}"
        size = f"{self.M}x{self.N}x{self.K}" + " symbolic M" * self.symbolic
        return f"{self.op} {size} -> {self.out}{epilogue}{where}{target}"

    @property
    def operations(self) -> float:
        return 2.0 * self.M * self.N * self.K

    @property
    def work(self) -> dict[str, float]:
        if self.cold:
            return {"read": float(self.N * self.K)}
        return {_instruction(self.target): self.operations}

    @property
    def copies(self) -> int:
        """Weights in turn."""
        return math.ceil(COLD_WEIGHT_BYTES / (self.N * self.K)) if self.cold else 1


INSTRUCTION = {
    "x86-avx512vnni": "int8",
    "x86-avxvnni": "int8-256",
    "x86-avx512": "int16-512",
    "x86-avx2": "int16-256",
}
"""Target -> limit that judges an int8 product there."""


@functools.cache
def _instruction(target: str) -> str:
    """The limit of a target, of this host's instructions where that is the target."""
    if target in INSTRUCTION:
        return INSTRUCTION[target]
    from opferry.driver.target import resolve
    from opferry.schedules.intrin import x86

    return "int8-amx" if x86.pick(resolve(target)) is x86.AMX else "int8"


SOFTMAX_OPERATIONS = 22.0
"""Of a pair of a query and a key, in float32: eleven vector instructions, each the time of a
multiply-add. Products on matrix tiles leave them a part of the limit.
"""


@functools.cache
def bf16_instruction() -> str:
    """The limit of bfloat16 products on this host."""
    from opferry.driver.target import host
    from opferry.schedules.intrin import x86_amx

    return "bf16-amx" if x86_amx.available_bf16(host()) else "bf16"


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
    """full, causal, band (the last `BAND` keys), prefix (causal, but the first quarter of the keys
    is seen by all), bool (a dense mask) or pse (a dense bias)."""
    lengths: tuple[int, ...] = ()
    """Sequences packed one after the other (layout TND), S1 = S2 tokens in all."""

    op = "SpeedFusionAttention"
    BAND = 256

    @property
    def label(self) -> str:
        heads = f"{self.N1}" if self.N1 == self.N2 else f"{self.N1}/{self.N2}"
        length = f"{self.S1}" if self.S1 == self.S2 else f"{self.S1}x{self.S2}"
        length += f" of {len(self.lengths)}" if self.lengths else ""
        mask = "" if self.mask == "full" else f" {self.mask}"
        return f"{self.op} B{self.B} N{heads} S{length} D{self.D} {self.dtype}{mask}"

    @property
    def window(self) -> tuple[int | None, int | None]:
        """Keys before and after the diagonal that a row keeps, None for all."""
        window = {"causal": (None, 0), "prefix": (None, 0), "band": (self.BAND - 1, 0)}
        return window.get(self.mask, (None, None))

    @property
    def prefix(self) -> int:
        """Keys that every row keeps."""
        return self.S2 // 4 if self.mask == "prefix" else 0

    @property
    def cells(self) -> int:
        """Pairs of a query and a key that are kept, of one head."""
        if self.lengths:
            return sum(replace(self, lengths=(), S1=n, S2=n).cells for n in self.lengths)
        before, after = self.window
        i = np.arange(self.S1)
        first = np.zeros_like(i) if before is None else np.maximum(i - before, 0)
        last = np.full_like(i, self.S2) if after is None else np.minimum(i + after + 1, self.S2)
        last = np.maximum(last, self.prefix)
        return int((last - first).sum())

    @property
    def operations(self) -> float:
        return 4.0 * self.B * self.N1 * self.cells * self.D

    @property
    def work(self) -> dict[str, float]:
        if self.S1 == 1:  # every key and value is used once: memory decides
            return {"read": self.cache_bytes}
        if self.dtype != "bf16":
            return {"fp32": self.operations}
        if bf16_instruction() == "bf16":
            return {"bf16": self.operations}
        softmax = self.B * self.N1 * self.cells * SOFTMAX_OPERATIONS
        return {"bf16-amx": self.operations, "fp32": softmax}

    @property
    def cache_bytes(self) -> float:
        """Bytes of keys and values."""
        return 2.0 * self.B * self.N2 * self.S2 * self.D * ITEM_BYTES[self.dtype]

    @property
    def copies(self) -> int:
        """Inputs in turn: decoding a token, every layer has keys and values of its own."""
        return math.ceil(COLD_CACHE_BYTES / self.cache_bytes) if self.S1 == 1 else 1


@dataclass(frozen=True)
class Longformer:
    """A quantised self-attention layer: five projections, a band and the first G tokens global."""

    S: int
    G: int
    hidden: int = 768
    heads: int = 12
    W: int = 256

    op = "QOrderedLongformerAttention"
    copies = 1

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
    select: bool = True
    """False: without the scores of blocks and the choice of the best, in ours only."""

    op = "NPUNsaCompressAttention"
    copies = 1

    @property
    def label(self) -> str:
        select = "" if self.select else " without selection"
        return f"{self.op} S{self.S} N{self.N1}/{self.N2} D{self.D}/{self.Dv} {self.dtype}{select}"

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
        return 2.0 * self.pairs * (self.D + self.Dv)

    @property
    def pairs(self) -> float:
        """Of a query and a key that it sees, of all heads."""
        visible = np.clip((np.arange(self.S) - self.l + 1) // self.d + 1, 0, self.compressed)
        return self.N1 * float(visible.sum())

    @property
    def work(self) -> dict[str, float]:
        if self.dtype != "bf16" or bf16_instruction() == "bf16":
            return {self.dtype: self.operations}
        return {"bf16-amx": self.operations, "fp32": self.pairs * SOFTMAX_OPERATIONS}


@dataclass(frozen=True)
class Encoder:
    """all-MiniLM-L6-v2 on B sentences of S tokens: H = 384, 12 heads, 6 layers."""

    B: int
    S: int

    op = "MiniLM"
    copies = 1
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

_VECTOR = {"int8-amx": "int8", "bf16-amx": "bf16"}


def vector_work(problem: Problem) -> dict[str, float]:
    """The products of ``problem.work`` that matrix tiles take, as work of vector instructions."""
    return {_VECTOR[kind]: work for kind, work in problem.work.items() if kind in _VECTOR}
