"""The int8 matmul on a GPU without its matrix instructions: one thread for each entry of y.

Right for every problem, so it stands behind the kernels that want aligned rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

if TYPE_CHECKING:
    from ...relay_ops.int8_matmul import Problem

THREADS = 256
"""Of a block; neighbours compute neighbouring columns of y."""


def build(problem: Problem, _: Target) -> tirx.PrimFunc:
    """The kernel ``int8_matmul``: buffers a, b, the operands and y."""
    types = {"a": problem.a, "b": problem.b}
    types |= {f"operand{i}": type_ for i, type_ in enumerate(problem.operands)}
    types["y"] = problem.y
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("int8_matmul")
            T.func_attr({"tirx.noalias": True})
            a, b, *operands, y = (
                T.arg(name, T.buffer([*type_.shape], str(type_.dtype)))
                for name, type_ in types.items()
            )
            entries = problem.batch * problem.m * problem.n
            blocks = tirx.floordiv(_int64(entries) + (THREADS - 1), THREADS)
            with (
                T.thread_binding(blocks, thread="blockIdx.x") as block,
                T.thread_binding(THREADS, thread="threadIdx.x") as thread,
                T.sblock("root"),
            ):
                T.reads()
                T.writes()
                acc = T.alloc_buffer((1,), "int32", scope="local")
                index = T.Bind(block * THREADS + thread.astype("int64"))
                n = T.Bind(tirx.truncmod(index, problem.n))
                row = T.Bind(tirx.truncmod(tirx.truncdiv(index, problem.n), _int64(problem.m)))
                z = T.Bind(tirx.truncdiv(index, _int64(problem.m) * problem.n))
                with T.If(index < entries), T.Then():
                    T.buffer_store(acc, tirx.const(0, "int32"), [0])
                    with T.serial(_int64(problem.k)) as k:
                        left = problem.a_entry(a, problem.a_batch(z), row, k).astype("int32")
                        right = problem.b_entry(b, problem.b_batch(z), n, k).astype("int32")
                        T.buffer_store(acc, acc[0] + left * right, [0])
                    value = problem.epilogue(acc[0], problem.at(z, row, n), *operands)
                    T.buffer_store(y, value, problem.y_index(z, row, n))
        return builder.get()


def _int64(dim: int | Expr) -> Expr:
    return tirx.const(dim, "int64") if isinstance(dim, int) else dim
