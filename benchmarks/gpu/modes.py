"""Every operator in every mode, small and at odd sizes: what has to be right before time is taken.

Inputs are functions of a seed alone, so that only compiled modules travel. NumPy only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

Feeds = dict[str, np.ndarray]
Rng = np.random.Generator

F16, BF16, F32 = np.dtype("float16"), np.dtype(ml_dtypes.bfloat16), np.dtype("float32")
_SHORT = {F16: "fp16", BF16: "bf16", F32: "fp32"}
_CAUSAL = np.triu(np.ones((2048, 2048), np.uint8), 1)
_ATTENTION_OUTPUTS = ("attention_out", "softmax_max", "softmax_sum")
_NSA_OUTPUTS = ("softmax_max", "softmax_sum", "attention_out", "topk_indices_out")


@dataclass(frozen=True)
class Mode:
    """One node."""

    op: str
    what: str
    make: Callable[[Rng], Feeds]
    """All inputs of the node; shapes and dtypes do not depend on the generator."""
    attrs: Mapping[str, object] = field(default_factory=dict)
    outputs: tuple[str, ...] | None = None
    """Those to ask for; None: all."""
    constant: tuple[str, ...] = ()
    """Inputs that are stored in the model: the same for every seed."""
    symbolic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.what}"

    def feeds(self, seed: int) -> Feeds:
        """Inputs by name; another seed gives other values."""
        feeds = self.make(np.random.default_rng([seed, 1]))
        if self.constant:
            stored = self.make(np.random.default_rng([0, 1]))
            feeds |= {name: stored[name] for name in self.constant}
        return feeds


@functools.cache
def modes() -> tuple[Mode, ...]:
    """The table."""
    return (*_qordered_matmul(), *_linear(), *_speed_fusion(), *_longformer(), *_nsa())


def _int8(rng: Rng, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape, dtype=np.int8)


def _normal(rng: Rng, dtype: np.dtype, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def _column_scale(rng: Rng, n: int, k: int) -> np.ndarray:
    """Outputs then have a deviation of about 40 units: some saturate."""
    return (rng.uniform(0.5, 1.5, n) * 40 / (5400 * np.sqrt(k))).astype(np.float32)


# -- QOrderedMatMul --------------------------------------------------------------------------------

ROW, COL, COL32, COL4_4R2_8C, COL32_2R_4R4 = 1, 0, 2, 3, 4
_PLAIN, _TURING, _AMPERE = (
    (ROW, COL, ROW),
    (COL32, COL4_4R2_8C, COL32),
    (COL32, COL32_2R_4R4, COL32),
)


def _qordered(orders, batch, M, N, K, *, column=True, bias=False, residual=False, fed=True):
    def make(rng: Rng) -> Feeds:
        scale = _column_scale(rng, N, K)
        feeds = {
            "A": _int8(rng, *batch, M, K),
            "scale_A": np.float32(0.5),
            "B": _int8(rng, K, N),
            "scale_B": scale if column else scale[:1],
            "scale_Y": np.float32(0.5),
        }
        if bias:
            feeds["bias"] = rng.normal(0, 5, N).astype(np.float32)
        if residual:
            feeds |= {"C": _int8(rng, *batch, M, N), "scale_C": np.float32(0.125)}
        return feeds

    parts = ["x".join(map(str, (*batch, M, N, K))), "orders " + "".join(map(str, orders))]
    parts += [word for word, given in _words(bias=bias, residual=residual) if given]
    parts += ["per column" if column else "one scale", "B fed" if fed else "B stored"]
    scales = ("scale_A", "scale_B", "scale_Y", *(("scale_C",) if residual else ()))
    return Mode(
        "QOrderedMatMul",
        ", ".join(parts),
        make,
        dict(zip(("order_A", "order_B", "order_Y"), orders)),
        constant=scales if fed else ("B", *scales),
    )


def _words(**given: bool):
    return given.items()


def _qordered_matmul() -> list[Mode]:
    sizes = {
        _PLAIN: [((), 1, 33, 77), ((), 16, 96, 200), ((2,), 37, 51, 130), ((), 130, 260, 96)],
        _TURING: [((), 1, 32, 32), ((), 37, 64, 96), ((2,), 130, 160, 64)],
        _AMPERE: [((), 1, 32, 32), ((), 37, 64, 96), ((2,), 130, 160, 64)],
    }
    found = []
    for orders, shapes in sizes.items():
        found += [_qordered(orders, *shape, bias=orders == _PLAIN) for shape in shapes]
        whole = {"bias": orders == _PLAIN, "residual": True}
        found.append(_qordered(orders, *shapes[1], **whole))
        found.append(_qordered(orders, *shapes[2], **whole, column=False, fed=False))
    return found


# -- NPUQuantMatmul --------------------------------------------------------------------------------

_OUT = {"int8": 3, "int32": 6, "fp16": 10, "bf16": 16}


def _matmul(
    out, M, N, K, *, b1=(), b2=(), transpose=(0, 1), scale="column", token=False, bias=None,
    offset=False, fed=True, symbolic=False,
):  # fmt: skip
    def make(rng: Rng) -> Feeds:
        x1, x2 = _int8(rng, *b1, M, K), _int8(rng, *b2, K, N)
        flip = [x.swapaxes(-1, -2) if t else x for x, t in zip((x1, x2), transpose)]
        columns = _column_scale(rng, N, K)
        if scale == "one":
            columns = columns[:1]
        elif scale == "packed":
            bits = columns.view(np.uint32) & np.uint32(0xFFFFE000)
            columns = (bits.astype(np.uint64) | np.uint64(1 << 46)).view(np.int64)
        elif scale == "bf16":
            columns = columns.astype(BF16)
        feeds = {"x1": np.ascontiguousarray(flip[0]), "x2": np.ascontiguousarray(flip[1])}
        feeds["scale"] = columns
        if offset:
            feeds["offset"] = rng.integers(-20, 20, N).astype(np.float32)
        if token:
            feeds["pertoken_scale"] = rng.uniform(0.5, 1.5, M).astype(np.float32)
        if bias is not None:
            values = rng.normal(0, 5, N)
            feeds["bias"] = (values * 200).astype(bias) if bias == np.int32 else values.astype(bias)
        return feeds

    shape = f"{'x'.join(map(str, (*b1, M)))}x{'x'.join(map(str, (*b2, N)))}x{K} -> {out}"
    parts = [shape, f"{scale} scale"]
    parts += [
        word for word, given in _words(token=token, offset=offset, symbolic=symbolic) if given
    ]
    parts += [] if bias is None else [f"bias {np.dtype(bias).name}"]
    parts += ["transpose {}{}".format(*transpose)] if transpose != (0, 1) else []
    parts += [] if fed else ["x2 stored"]
    constant = [n for n, given in _words(offset=offset, bias=bias is not None) if given]
    return Mode(
        "NPUQuantMatmul",
        ", ".join(parts),
        make,
        {"output_dtype": _OUT[out], "transpose_x1": transpose[0], "transpose_x2": transpose[1]},
        constant=(*(() if fed else ("x2",)), "scale", *constant),
        symbolic={"x1": {0: "M"}} if symbolic else {},
    )


def _linear() -> list[Mode]:
    m = _matmul
    return [
        m("int32", 37, 51, 130),
        m("int32", 16, 96, 200),
        m("int32", 130, 260, 96, fed=False),
        m("int32", 1, 64, 256, bias=np.int32),
        m("int8", 37, 51, 130),
        m("int8", 37, 51, 130, scale="packed", bias=np.int32),
        m("int8", 16, 96, 200, offset=True),
        m("int8", 130, 260, 96, scale="one", fed=False),
        m("fp16", 37, 51, 130, bias=np.int32),
        m("fp16", 37, 51, 130, token=True, bias=F16),
        m("fp16", 16, 96, 200, token=True, bias=F32),
        m("fp16", 130, 260, 96, scale="packed", fed=False),
        m("bf16", 37, 51, 130),
        m("bf16", 37, 51, 130, token=True, bias=BF16),
        m("bf16", 16, 96, 200, token=True, bias=np.int32, scale="bf16"),
        m("bf16", 130, 260, 96, token=True, bias=F32, symbolic=True),
        m("bf16", 3, 260, 96, token=True, symbolic=True, fed=False),
        m("int8", 37, 51, 130, transpose=(0, 0)),
        m("int32", 37, 51, 130, transpose=(1, 0)),
        m("fp16", 37, 51, 130, transpose=(1, 1), fed=False),
        m("int32", 37, 51, 130, b1=(3,), b2=(3,)),
        m("fp16", 19, 40, 70, b1=(2, 1), b2=(3,)),
        m("int8", 200, 300, 1500, transpose=(0, 0)),
        m("fp16", 517, 330, 2000, token=True, fed=False),
    ]


# -- SpeedFusionAttention --------------------------------------------------------------------------


def _qkv(rng: Rng, B, N1, N2, S1, S2, D, dtype, layout) -> Feeds:
    def tensor(N, S):
        shape = {
            "BNSD": (B, N, S, D),
            "BSND": (B, S, N, D),
            "BSH": (B, S, N * D),
            "SBH": (S, B, N * D),
            "TND": (S, N, D),
        }[layout]
        return _normal(rng, dtype, *shape)

    return {"query": tensor(N1, S1), "key": tensor(N2, S2), "value": tensor(N2, S2)}


def _attention(what, shape, dtype=F16, layout="BNSD", more=None, symbolic=(), only=None, **attrs):
    """``more(rng)``: further inputs; a compressed mask is stored in the model."""
    compressed = attrs.get("sparse_mode", 0) in (2, 3, 4)

    def make(rng: Rng) -> Feeds:
        feeds = _qkv(rng, *shape, dtype, layout)
        feeds |= {"atten_mask": _CAUSAL} if compressed else {}
        return feeds | ({} if more is None else more(rng))

    return Mode(
        "SpeedFusionAttention",
        f"{what}, {layout} {'x'.join(map(str, shape))} {_SHORT[dtype]}",
        make,
        {"input_layout": layout, "head_num": shape[1], "scale": shape[-1] ** -0.5} | attrs,
        _ATTENTION_OUTPUTS if only is None else (only,),
        ("atten_mask",) if compressed else (),
        dict(symbolic),
    )


def _mask(*shape: int, dtype=np.bool_):
    def more(rng: Rng) -> Feeds:
        mask = rng.random(shape) < 0.4
        mask[..., 3, :] = True  # a row without keys
        return {"atten_mask": mask.astype(dtype)}

    return more


def _pse(dtype, *shape: int):
    return lambda rng: {"pse": _normal(rng, dtype, *shape)}


def _ends(queries, keys):
    feeds = {"actual_seq_qlen": queries, "actual_seq_kvlen": keys}
    return {name: np.cumsum(lengths).astype(np.int64) for name, lengths in feeds.items()}


def _speed_fusion() -> list[Mode]:
    a = _attention
    dtypes = (F16, BF16, F32)
    found = [a("full", (1, 2, 1, 70, 150, D), dtype) for D in (64, 128) for dtype in dtypes]
    found += [
        a("head size", (1, 2, 2, 19, 70, D), dtype)
        for dtype, sizes in ((F16, (1, 33, 144, 512)), (BF16, (40, 256)), (F32, (6,)))
        for D in sizes
    ]
    found += [
        a("layout", (2, 4, 2, 37, 90, 24), layout=layout) for layout in ("BSH", "SBH", "BSND")
    ]
    found += [
        a(f"{output} alone", (1, 2, 1, 37, 90, 32), only=output) for output in _ATTENTION_OUTPUTS
    ]
    long, tall = (1, 2, 1, 300, 517, 64), (1, 2, 1, 517, 300, 64)
    for shape, dtype in ((long, F16), (tall, BF16), ((1, 2, 1, 70, 150, 16), F32)):
        found += [
            a("left-up causal", shape, dtype, sparse_mode=2),
            a("right-down causal", shape, dtype, sparse_mode=3),
        ]
    for pre, post in ((40, 300), (-5, 300), (300, -5)):
        what = f"band {pre}, {post}"
        found.append(a(what, long, sparse_mode=4, pre_tokens=pre, next_tokens=post))
    for rows in ((2, 2), (2, 1), (1, 1), ()):
        mask = _mask(*rows, 37, 91)
        what = f"mask of {len(rows) + 2} dimensions {rows}"
        found.append(a(what, (2, 2, 1, 37, 91, 16), more=mask, sparse_mode=1))
    window = {"sparse_mode": 0, "pre_tokens": 30, "next_tokens": 20}
    odd, even = (2, 2, 1, 37, 91, 16), (2, 2, 1, 37, 90, 16)
    bytes_ = _mask(2, 1, 37, 90, dtype=np.uint8)
    found += [
        a("mask and window", odd, more=_mask(37, 91), **window),
        a("byte mask", even, BF16, more=bytes_, sparse_mode=1),
        a(
            "prefix",
            odd,
            more=lambda rng: {
                "atten_mask": rng.random((2, 1, 37, 91)) < 0.2,
                "prefix": np.array([54, 91], np.int64),
            },
            sparse_mode=5,
        ),
    ]  # fmt: skip
    for dtype, S2, kind in ((F16, 90, 0), (F16, 91, 1), (F32, 90, 1), (BF16, 91, 0)):
        pse = _pse(dtype, 2, 2, 37, S2)
        found.append(
            a(f"bias, pse_type {kind}", (2, 2, 1, 37, S2, 16), dtype, more=pse, pse_type=kind)
        )
    for kind in (2, 3):
        starts = {"pse_type": kind, "q_start_idx": [3], "kv_start_idx": [9]}
        found.append(
            a(f"slopes, pse_type {kind}", (2, 2, 1, 37, 91, 16), more=_pse(F32, 2, 2), **starts)
        )
    found += [
        a(
            "packed bias",
            (1, 1, 1, 1060, 1060, 16),
            more=_pse(F16, 1, 1, 1024, 1060),
            sparse_mode=3,
        ),
        a("dropout", (2, 2, 2, 21, 90, 16), keep_prob=0.7, seed=-5, offset=12),
        a("dropout", (2, 2, 2, 21, 91, 16), F32, keep_prob=0.7, seed=-5, offset=12),
    ]
    for queries, keys, attrs in (
        ([5, 0, 70, 130], [9, 3, 200, 31], {}),
        ([5, 0, 70, 130, 0], [9, 0, 200, 131, 0], {"sparse_mode": 3}),
        ([5, 0, 70, 30], [9, 0, 20, 31], {"sparse_mode": 2, "softmax_layout": "TND"}),
        ([1] * 40, [3] * 40, {"keep_prob": 0.6}),
    ):
        shape = (0, 2, 1, sum(queries), sum(keys), 32)
        ends = functools.partial(_ends, queries, keys)
        what = f"{len(queries)} sequences {attrs or ''}".strip()
        found.append(a(what, shape, layout="TND", more=lambda rng, ends=ends: ends(), **attrs))
    for S1, D, attrs in ((1, 64, {}), (1, 128, {}), (3, 33, {}), (3, 16, {"sparse_mode": 3})):
        found.append(a(f"few rows {attrs or ''}".strip(), (1, 8, 2, S1, 600, D), **attrs))
    names = {"query": {0: "b", 2: "s"}, "key": {0: "b", 2: "t"}, "value": {0: "b", 2: "t"}}
    found.append(a("symbolic sizes", (2, 2, 1, 37, 91, 16), symbolic=names, sparse_mode=3))
    fixed = {"query": {0: "b"}, "key": {0: "b", 2: "t"}, "value": {0: "b", 2: "t"}}
    found.append(a("symbolic keys", (1, 2, 1, 1, 600, 16), BF16, symbolic=fixed))
    return found


# -- QOrderedLongformerAttention -------------------------------------------------------------------


def _layer(
    what, batch, seq, heads, head_size, window, counts, orders=(ROW, COL, COL), symbolic=False
):
    hidden = heads * head_size

    def make(rng: Rng) -> Feeds:
        scale = np.float32(40 / (74 * 74 * np.sqrt(hidden)))
        flags = np.zeros((batch, seq), np.int32)
        for b in range(batch):
            flags[b, rng.permutation(seq)[: counts[b % len(counts)]]] = 1
        return {
            "input": _int8(rng, batch, seq, hidden),
            "scale_input": np.float32(0.03),
            "weight": _int8(rng, hidden, 3 * hidden),
            "scale_weight": scale,
            "bias": rng.normal(0, 3, 3 * hidden).astype(np.float32),
            "scale_bias": np.float32(1),
            "scale_qkv_gemm": np.float32(0.03),
            "mask": np.where(rng.random((batch, seq)) < 0.2, -10000, 0).astype(F16),
            "global_weight": _int8(rng, hidden, 3 * hidden),
            "scale_global_weight": np.float32(scale * 1.3),
            "global_bias": rng.normal(0, 3, 3 * hidden).astype(np.float32),
            "scale_global_gemm": np.float32(0.04),
            "global": flags,
            "scale_output": np.float32(0.02),
        }

    given = ("input", "mask", "global")
    names = ("order_input", "order_weight", "order_global_weight", "order_output")
    return Mode(
        "QOrderedLongformerAttention",
        f"{what}, {batch}x{seq}, {heads}x{head_size}, window {window}, orders {orders}",
        make,
        {"num_heads": heads, "window": window} | dict(zip(names, (*orders, orders[0]))),
        constant=tuple(name for name in make(np.random.default_rng(0)) if name not in given),
        symbolic={name: {0: "B", 1: "S"} for name in given} if symbolic else {},
    )


def _longformer() -> list[Mode]:
    return [
        _layer("tiny", 3, 4, 1, 2, 1, [1, 0, 4]),
        _layer("odd", 2, 42, 3, 5, 3, [0, 6]),
        _layer("heads of 64", 2, 512, 2, 64, 64, [1, 70]),
        _layer("no globals", 1, 256, 2, 64, 32, [0]),
        _layer("wide window", 1, 600, 1, 16, 300, [9]),
        _layer("tiled orders", 2, 128, 2, 32, 16, [3, 0], (COL32, COL4_4R2_8C, COL32_2R_4R4)),
        _layer("symbolic", 2, 256, 2, 64, 32, [5, 0], symbolic=True),
    ]


# -- NPUNsaCompressAttention -----------------------------------------------------------------------


def _compressed(
    what, queries, keys, heads, sizes, k, dtype, *, l=32, d=16, block=64, masks=True, **attrs
):
    (N1, N2), (D, Dv), ratio = heads, sizes, block // d
    blocks = [-(-count // ratio) for count in keys]

    def make(rng: Rng) -> Feeds:
        feeds = {
            "query": _normal(rng, dtype, sum(queries), N1, D),
            "key": _normal(rng, dtype, sum(keys), N2, D),
            "value": _normal(rng, dtype, sum(keys), N2, Dv),
        }
        if masks:
            feeds["atten_mask"] = rng.random((max(queries) + 1, max(keys) + 2)) < 0.5
            feeds["topk_mask"] = rng.random((max(queries) + 1, max(blocks) + 2)) < 0.2
        counts = {"qlen": queries, "cmp_seq_kvlen": keys, "sel_seq_kvlen": blocks}
        names = ("actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen")
        return feeds | {n: np.cumsum(c).astype(np.int64) for n, c in zip(names, counts.values())}

    return Mode(
        "NPUNsaCompressAttention",
        f"{what}, {queries} to {keys}, {N1}/{N2} heads of {D}/{Dv}, k {k}, {_SHORT[dtype]}",
        make,
        {
            "head_num": N1,
            "compress_block_size": l,
            "compress_stride": d,
            "select_block_size": block,
            "select_block_count": k,
            "scale_value": D**-0.5,
        }
        | attrs,
        _NSA_OUTPUTS,
    )


def _nsa() -> list[Mode]:
    c = _compressed
    found = [
        c("masks", [70, 33], [90, 61], (8, 2), (64, 64), 3, dtype) for dtype in (F16, BF16, F32)
    ]
    return found + [
        c("no masks", [19], [130], (4, 1), (128, 128), 8, BF16, masks=False),
        c("192 and 128", [40], [200], (16, 4), (192, 128), 16, F16),
        c("odd heads", [5, 3], [9, 6], (4, 2), (8, 7), 3, F32),
        c("more blocks than there are", [20], [40], (4, 2), (64, 32), 16, F16),
        c("other blocks", [33], [150], (4, 1), (64, 64), 4, BF16, l=64, d=32, block=128),
        c("no rows, no keys", [0, 40, 3], [5, 0, 70], (4, 2), (32, 32), 4, F16),
        c("shift", [33], [150], (4, 1), (64, 64), 4, F16, score_shift=1),
        c("zeros and layout", [33, 4], [50, 9], (4, 1), (64, 64), 4, F16, masked_rows="zero",
          softmax_out_layout="same_as_input"),
    ]  # fmt: skip
