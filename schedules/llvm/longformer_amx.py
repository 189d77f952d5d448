"""Longformer attention on matrix tiles of bfloat16 (AMX).

A projection is a float16 number, which two terms of bfloat16 hold exactly, so a task is that of the
fused attention kernel for float16 (``attention_split``). Its keys are two lists: the positions that
its band covers, then the global tokens. A global token has no weight in the first list of a local
task, and so counts once; a task of global tokens has all positions in its first list and nothing in
the second.

Of each list a tile of rows is copied as int8 first. So both kinds of task, and both lists, share
what follows; the output leaves by way of rows of int8 too, of which those that are another task's
are not written. Few global tokens go row by row (``attention_row``), from where their keys and
values lie.

Buffers of a task beside those of ``attention_split``: queries, then outputs int8 [R][D]; keys and
values int8 [C][D]; the additive mask of the keys float32 [C]; where the rows go int32 [R].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import tvm.tirx as tir
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from ...relay_ops.attention import Interval, Sequence
from ...relay_ops.orders import COLS
from ...relay_ops.quant import int8_cast
from ..intrin import barrier, x86_amx
from . import matrix_tiles
from .attention_config import SPLIT_TASKS, AttentionConfig
from .attention_operands import BLOCK
from .attention_row import RowTile
from .attention_split import SplitTask
from .attention_task import Task, opaque
from .vector import float32, from_float32, load_lanes, to_float32, vector_unit

if TYPE_CHECKING:
    from ...relay_ops.qordered_longformer_attention import Problem

FEW_TOKENS = 2
"""Global tokens that take less time row by row than as a group of the tiles."""
_UNBOUNDED = 2**30  # more than the distance of any two tokens
_ROW_BYTES = 16  # of a row of int8 that are copied at once
_ELSEWHERE = -1  # where a row goes that another task computes


@dataclass(frozen=True)
class Head:
    """A head as a problem of the fused attention kernel: float16, one addend for each key."""

    D: int
    dtype: str = "float16"
    N1: int = 1
    N2: int = 1
    pse: str = "row"
    pse_type: int = 0
    mask: bool = False
    keep_prob: float = 1.0
    outputs: tuple[str, ...] = ("attention_out",)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.D)


def configure(problem: Problem) -> AttentionConfig:
    """As many rows a task as share keys and values well, fewer where tasks would be few."""
    config = AttentionConfig(
        lanes=x86_amx.LANES,
        vectors=2,
        unroll=4,
        groups=16 if problem.head_size <= 256 else 8,
        keys=64,
        repeats=4,
        few=FEW_TOKENS,
        row_sums=4,
    )
    if isinstance(problem.batch, int) and isinstance(problem.seq, int):
        rows = problem.batch * problem.num_heads * problem.seq
        groups = matrix_tiles.groups(config.groups, config.width, rows, SPLIT_TASKS)
        return replace(config, groups=groups)
    return config


@dataclass
class LayerTask(Task):
    """Rows i0, i0 + 1, ... of a head: positions, or with ``is_global`` global tokens."""

    longformer: Problem
    to_int8: Callable[[Expr], Expr]
    """float32 to the nearest int8, saturated."""

    def stand_at(self, other: LayerTask) -> None:
        super().stand_at(other)
        for name in ("length", "tokens", "is_global", "scale", "inverse_scale"):
            setattr(self, name, getattr(other, name))

    def describe(self, S: Expr, tokens: Expr, is_global: Expr) -> None:
        """``tokens``: global ones of the batch entry."""
        self.length, self.tokens, self.is_global = S, tokens, is_global
        of_local, of_global, of_output = (
            self.buffers[name][0]
            for name in ("scale_qkv_gemm", "scale_global_gemm", "scale_output")
        )
        self.scale, self.inverse_scale = opaque(
            "float32", [tir.Select(is_global, of_global, of_local), float32(1) / of_output]
        )

    def projected(self, x: Expr, lanes: int = 1) -> Expr:
        """int8 to the float16 number that it stands for, as float32."""
        scale = self.scale if lanes == 1 else tir.Broadcast(self.scale, lanes)
        x = x.astype(str(scale.ty)) * scale
        return to_float32(from_float32(x, "float16", self.unit), self.unit)

    def mask_of(self, s: Expr) -> Expr:
        return to_float32(self.buffers["mask"][self.at.b, s], self.unit)

    def quantised(self, value: Expr) -> Expr:
        rounded = to_float32(from_float32(value, "float16", self.unit), self.unit)
        return self.to_int8(rounded * self.inverse_scale)

    def output_index(self, s: Expr, d: Expr, v: Expr | int) -> list[Expr]:
        """Of elements d + v of row s; those of one d lie in one panel of 32 columns."""
        channel = self.n * self.problem.D + d
        if self.longformer.col32:
            return [self.at.b, channel // COLS, s, channel % COLS + v]
        return [self.at.b, s, channel + v]

    def column(self, part: int) -> Expr:
        """Where this head begins in part 0, 1, ... of H columns of the projections."""
        return part * self.longformer.hidden + self.n * self.problem.D


class GlobalRows(LayerTask, RowTile):
    """A few global tokens of a head, which see all positions."""

    def keys_of(self, i: Expr) -> Interval:
        return Interval(0, self.length.astype("int32") - 1)

    def kv(self, name: str, j: Expr, d: Expr) -> Expr:
        row = self.at.b * self.length + j.astype("int64")
        column = self.column(("key", "value").index(name))
        return self.projected(self.buffers["gkv"][0, row, column + d])

    def _query_element(self, i: Expr, d: Expr) -> Expr:
        row = self.buffers["offsets"][self.at.b] + i
        return self.projected(self.buffers["gq"][0, row, self.column(0) + d])

    def _row_bias(self, slope: None, i: Expr, j: Expr) -> Expr:
        return self.mask_of(j)

    def _ask_for(self, name: str, j: Expr, share: Expr | int = 0, shares: int = 1) -> None:
        """Nothing: the few bytes of a head come no sooner."""

    def _finish_row(self, h: Expr, r: Expr) -> None:
        self.position = T.Bind(self.buffers["positions"][self.at.b, self.i0 + r])
        with T.If(self.mask_of(self.position) < float32(0)), T.Then():
            T.buffer_store(self.state, float32(0), [h, 1])
        super()._finish_row(h, r)

    def put(self, r: Expr, d: Expr, value: Expr) -> None:
        index = self.output_index(self.position, d, 0)
        T.buffer_store(self.buffers["output"], self.quantised(value), index)


class TileRows(LayerTask, SplitTask):
    """Positions, or many global tokens. Keys count from the first of their list on."""

    # -- what the fused kernel asks ---------------------------------------------------------------

    def keys_of(self, i: Expr) -> Interval:
        return Interval(i + self.first_seen, i + self.last_seen)

    def _key_row(self, j: Expr) -> Expr:
        return (j - self.j0).astype("int64")

    def _elements(self, name: str, n: Expr, row: Expr, d: Expr, lanes: int = 1) -> Expr:
        rows = self.rows_of[name]
        found = rows[row, d] if lanes == 1 else load_lanes(rows, [row, d], lanes)
        return T.Bind(self.projected(found, lanes))

    def _common_bias(self, j: Expr, key: Expr) -> Expr:
        return T.Bind(self.shift[key])

    def put(self, r: Expr, d: Expr, value: Expr) -> None:
        T.buffer_store(self.rows_of["query"], self.quantised(value), [r, d])

    def _rows(self, group: Expr, *rest: Expr | Interval | None, none_dropped: None) -> None:
        with T.If(self.live[group] != 0), T.Then():
            super()._rows(group, *rest, none_dropped=none_dropped)

    # -- the task ---------------------------------------------------------------------------------

    def emit(self) -> None:
        c = self.config
        T.evaluate(x86_amx.configure(tir.const(x86_amx.ROWS, "int64")))
        self.groups = T.Bind((self.rows + (c.width - 1)) // c.width)
        self._allocate()
        self._take_rows()
        self._load_queries()
        self._clear()
        self._visit_keys()
        self._store()
        T.evaluate(x86_amx.release())

    def _allocate(self) -> None:
        super()._allocate()
        c, D = self.config, self.problem.D
        rows = {"query": c.rows, "key": c.keys, "value": c.keys}
        self.rows_of = {name: T.alloc_buffer((n, D), "int8") for name, n in rows.items()}
        self.shift = T.alloc_buffer((c.keys,))
        self.destination = T.alloc_buffer((c.rows,), "int32")
        self.attends = T.alloc_buffer((c.rows,), "int32")
        self.live = T.alloc_buffer((c.groups + 1,), "int32")  # groups, then the task

    def _take_rows(self) -> None:
        """Queries, where their outputs go, and which of them attend: not padding."""
        c, at, buffers = self.config, self.at, self.buffers
        with T.serial(c.groups + 1) as k:
            T.buffer_store(self.live, tir.const(0, "int32"), [k])
        with T.serial(self.rows) as r:
            token = T.Bind((self.i0 + r).astype("int64"))
            with T.If(self.is_global):
                with T.Then():
                    T.buffer_store(self.destination, buffers["positions"][at.b, token], [r])
                    row = buffers["offsets"][at.b].astype("int64") + token
                    self._copy(self.rows_of["query"], r, buffers["gq"], row, 0)
                with T.Else():
                    T.buffer_store(self.destination, token.astype("int32"), [r])
                    row = at.b * self.length + token
                    self._copy(self.rows_of["query"], r, buffers["qkv"], row, 0)
            s = T.Bind(self.destination[r].astype("int64"))
            attends = T.Bind(self.mask_of(s) >= float32(0))
            T.buffer_store(self.attends, attends.astype("int32"), [r])
            with T.If(tir.all(tir.Not(self.is_global), self._is_token_global(s))):
                with T.Then():
                    T.buffer_store(self.destination, tir.const(_ELSEWHERE, "int32"), [r])
                with T.Else(), T.If(attends), T.Then():
                    for k in (r // c.width, c.groups):
                        T.buffer_store(self.live, tir.const(1, "int32"), [k])

    def _visit_keys(self) -> None:
        c, W = self.config, self.longformer.window
        S = self.length.astype("int32")
        first, end, tokens = opaque(
            "int32",
            [
                tir.Select(self.is_global, 0, tir.max(self.i0 - W, 0)),
                tir.Select(self.is_global, S, tir.min(self.i0 + self.rows + W, S)),
                tir.Select(self.is_global, 0, self.tokens),
            ],
        )
        self.first_position = first
        near = T.Bind((end - first + (c.keys - 1)) // c.keys)
        far = (tokens + (c.keys - 1)) // c.keys
        with T.serial(tir.Select(self.live[c.groups] != 0, near + far, 0)) as tile:
            self.gathered = T.Bind(tile >= near)
            begin = tir.Select(self.gathered, tile - near, tile) * c.keys
            length = tir.Select(self.gathered, tokens, end - first)
            everywhere = tir.any(self.is_global, self.gathered)
            self.j0, count, self.first_seen, self.last_seen = opaque(
                "int32",
                [
                    begin,
                    tir.min(length - begin, c.keys),
                    tir.Select(everywhere, -_UNBOUNDED, -W - first),
                    tir.Select(everywhere, _UNBOUNDED, W - first),
                ],
            )
            self._take_keys(count)
            self._key_tile(self.j0, count)

    def _take_keys(self, count: Expr) -> None:
        """Keys and values of the tile and the mask of the keys; a last partial block repeats the
        last key without weight.
        """
        at, buffers = self.at, self.buffers
        with T.serial((count + (BLOCK - 1)) // BLOCK * BLOCK) as k:
            j = T.Bind((self.j0 + tir.min(k, count - 1)).astype("int64"))
            position = tir.if_then_else(
                self.gathered,
                buffers["positions"][at.b, j].astype("int64"),
                self.first_position.astype("int64") + j,
            )
            s = T.Bind(position)
            twice = tir.all(
                tir.Not(tir.any(self.is_global, self.gathered)), self._is_token_global(s)
            )
            beyond = tir.any(k >= count, twice)
            shift = tir.Select(beyond, float32(float("-inf")), self.mask_of(s))
            T.buffer_store(self.shift, shift, [k])
            row = T.Bind(at.b * self.length + s)
            with T.If(self.is_global):
                with T.Then():
                    for part, name in enumerate(("key", "value")):
                        self._copy(self.rows_of[name], k, buffers["gkv"], row, part)
                with T.Else():
                    for part, name in enumerate(("key", "value"), 1):
                        self._copy(self.rows_of[name], k, buffers["qkv"], row, part)

    def _copy(self, to: tir.Buffer, k: Expr, source: tir.Buffer, row: Expr, part: int) -> None:
        """to[k] = this head of part 0, 1, ... of H columns of a row of projections."""
        column = self.column(part)

        def copy(d: Expr, v: Expr | int) -> None:
            T.buffer_store(to, source[0, row, column + d + v], [k, d + v])

        self._each_strip(_ROW_BYTES, copy)

    def _each_strip(self, width: int, statement: Callable[[Expr, Expr | int], None]) -> None:
        """statement(d, v) for the elements d + v of a head, ``width`` of the same d at once."""
        D = self.problem.D
        with T.serial(D // width) as strip, T.vectorized(width) as v:
            statement(strip * width, v)
        with T.serial(D % width) as tail:
            statement(D // width * width + tail, 0)

    def _is_token_global(self, s: Expr) -> Expr:
        rank, b = self.buffers["rank"], self.at.b
        return rank[b, s + 1] != rank[b, s]

    def _store(self) -> None:
        """Rows that do not attend are zero."""
        with T.serial(self.rows) as r, T.If(self.attends[r] == 0), T.Then():
            T.buffer_store(self.sum, float32(0), [r])
        self._store_output()
        # A strip of channels must lie in one panel of 32 columns.
        width = math.gcd(self.problem.D, _ROW_BYTES) if self.longformer.col32 else _ROW_BYTES
        with T.serial(self.rows) as r, T.If(self.destination[r] != _ELSEWHERE), T.Then():
            s = T.Bind(self.destination[r].astype("int64"))

            def write(d: Expr, v: Expr | int, r: Expr = r, s: Expr = s) -> None:
                value = self.rows_of["query"][r, d + v]
                T.buffer_store(self.buffers["output"], value, self.output_index(s, d, v))

            self._each_strip(width, write)


def build_attention(problem: Problem, target: Target) -> tir.PrimFunc:
    """The kernel ``qordered_longformer_attention.attention`` (``longformer.attention``)."""
    config, H = configure(problem), problem.hidden
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name("longformer_attention")
            T.func_attr({"tirx.noalias": True})
            B, S, R, G, GR = (T.int64() for _ in range(5))
            output = (B, H // COLS, S, COLS) if problem.col32 else (B, S, H)
            arguments = {
                "qkv": ((1, R, 3 * H), "int8"),
                "gq": ((1, G, H), "int8"),
                "gkv": ((1, GR, 2 * H), "int8"),
                "mask": ((B, S), "float16"),
                "positions": ((B, S), "int32"),
                "rank": ((B, S + 1), "int32"),
                "offsets": ((B,), "int32"),
                "scale_qkv_gemm": ((1,), "float32"),
                "scale_global_gemm": ((1,), "float32"),
                "scale_output": ((1,), "float32"),
                "output": (output, "int8"),
            }
            buffers = {
                name: T.arg(name, T.buffer(shape, dtype))
                for name, (shape, dtype) in arguments.items()
            }
            head, unit = Head(problem.head_size), vector_unit(target)
            parts = (head, config, unit, buffers, {}, problem, int8_cast(target))
            tiles, rows = TileRows(*parts), GlobalRows(*parts)
            with T.attr(0, x86_amx.IMPORT, x86_amx.SOURCE + barrier.SOURCE):
                refused = f"QOrderedLongformerAttention: {x86_amx.REFUSED}"
                with T.Assert(x86_amx.permitted(), refused, "RuntimeError"):
                    T.evaluate(0)
                blocks = T.Bind((S + (config.rows - 1)) // config.rows)
                with T.parallel(B * problem.num_heads * (2 * blocks)) as index:
                    _emit(tiles, rows, index, blocks, S)
        return builder.get()


def _emit(tiles: TileRows, rows: GlobalRows, index: Expr, blocks: Expr, S: Expr) -> None:
    """Blocks of positions of a head, then blocks of its global tokens, of which many are empty."""
    heads, config = tiles.longformer.num_heads, tiles.config
    head, block = T.Bind(index // (2 * blocks)), T.Bind(index % (2 * blocks))
    b = T.Bind(head // heads)
    is_global = T.Bind(block >= blocks)
    (tokens,) = opaque("int32", [tiles.buffers["rank"][b, S]])
    queries, i0 = opaque(
        "int32",
        [
            tir.Select(is_global, tokens, S.astype("int32")),
            tir.Select(is_global, block - blocks, block) * config.rows,
        ],
    )
    with T.If(i0 < queries), T.Then():
        # The tiles' queries count from i0 on, as they are copied.
        tiles.place(Sequence(b, queries, S, -i0, 0, 0), head % heads, i0)
        tiles.describe(S, tokens, is_global)
        rows.stand_at(tiles)
        with T.If(tir.all(is_global, tiles.rows <= config.few)):
            with T.Then():
                rows.emit()
            with T.Else():
                tiles.emit()
