"""Launch of a function: arguments bound, grid found, blocks run."""

import itertools

import numpy as np
import tvm
from tvm.tirx import ForKind, is_buffer_var
from tvm_ffi import structural_equal

from . import values
from .block import Block
from .races import SimtError
from .stmt import Statements, global_view

TAGS = [f"{kind}.{axis}" for kind in ("blockIdx", "threadIdx") for axis in "xyz"]
MOST_THREADS = 1024


def run(func, *args, blocks=None):
    """Run a PrimFunc on arrays and ints in the order of its parameters, in place.

    Arrays are C-contiguous, of the parameters' dtypes and shapes; symbolic extents take their
    values from them. The function may launch several kernels, one after the other. blocks: the
    (x, y, z) indices of the blocks of each to run, all by default. Raises SimtError for undefined
    behaviour, NotImplementedError for what the interpreter lacks.
    """
    if len(args) != len(func.params):
        raise TypeError(f"{len(func.params)} parameters, {len(args)} arguments")
    program = Program(None if blocks is None else list(blocks))
    bound = bind(program, func.params, args)
    body = program.statement(func.body)
    host = Block(1, {}, [None] * len(program.slots))
    for slot, value in bound.items():
        host.env[slot] = value
    with np.errstate(all="ignore"):
        body(host)


class Program(Statements):
    """Compiler of the host's part of a function: outermost bound loops are kernels."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
        self.in_kernel = False

    def bound(self, stmt, tag, slot):
        if self.in_kernel:
            return super().bound(stmt, tag, slot)
        extents = {tag: self.compile(extent) for tag, extent in thread_extents(stmt).items()}
        self.in_kernel = True
        body = super().bound(stmt, tag, slot)
        self.in_kernel = False

        def launch(host):
            size = {tag: int(extents[tag](host)) if tag in extents else 1 for tag in TAGS}
            threads = [size[tag] for tag in TAGS[3:]]
            if np.prod(threads) > MOST_THREADS:
                raise SimtError(f"{threads} threads in a block")
            z, y, x = np.indices(threads[::-1], dtype=np.int32).reshape(3, -1)
            grid = itertools.product(*(range(size[tag]) for tag in TAGS[:3]))
            for index in grid if self.blocks is None else self.blocks:
                block = Block(len(x), dict(zip(TAGS[:3], index)), list(host.env))
                block.thread_index = dict(zip(TAGS[3:], (x, y, z)))
                body(block)
                if block.copies.pending:
                    raise SimtError(f"cp.async still in flight at the end, {block.place()}")
                if block.barriers.in_flight():
                    raise SimtError(f"cp.async.bulk still in flight at the end, {block.place()}")
                if block.products.in_flight():
                    raise SimtError(f"wgmma still in flight at the end, {block.place()}")

        return launch


def bind(program, params, args):
    """Slots and values of the parameters and of the symbolic extents they determine."""
    bound = {}
    for param, value in zip(params, args):
        slot = program.slot(param)
        if not is_buffer_var(param):
            bound[slot] = values.scalar(value, values.numpy_dtype(param.ty.dtype))
            program.sources[slot] = frozenset([slot]) if isinstance(bound[slot], int) else None
            continue
        if not isinstance(value, np.ndarray) or not value.flags.c_contiguous:
            raise TypeError(f"{param.name}: a C-contiguous array is needed")
        dtype = values.numpy_dtype(param.ty.dtype)
        if value.dtype != dtype or value.ndim != len(param.ty.shape):
            raise TypeError(f"{param.name}: {value.dtype} {value.shape} for {param.ty}")
        bound[slot] = global_view(param.name, value)
        for extent, found in zip(param.ty.shape, value.shape):
            if isinstance(extent, tvm.tirx.Var):
                dim = program.slot(extent)
                program.sources[dim] = frozenset([dim])
                if bound.setdefault(dim, found) != found:
                    raise TypeError(f"{param.name}: {extent.name} is {bound[dim]} and {found}")
            elif isinstance(extent, tvm.tirx.IntImm) and int(extent) != found:
                raise TypeError(f"{param.name}: extent {found} where {int(extent)} is declared")
    return bound


def thread_extents(stmt):
    """Extents (expressions) by thread tag of all bound loops."""
    found, stack = {}, [stmt]
    while stack:
        node = stack.pop()
        tag, kind = None, type(node).__name__
        if kind == "For" and node.kind == ForKind.THREAD_BINDING:
            tag, extent = node.thread_binding.thread_tag, node.extent
        elif kind == "AttrStmt" and node.attr_key == "thread_extent":
            tag, extent = node.node.thread_tag, node.value
        if tag is not None:
            if tag in found and not structural_equal(found[tag], extent):
                raise SimtError(f"{tag} is bound with extents {found[tag]} and {extent}")
            found[tag] = extent
        for name in ("body", "seq", "block", "then_case", "else_case"):
            child = getattr(node, name, None)
            if name == "seq" and child is not None:
                stack.extend(child)
            elif child is not None:
                stack.append(child)
    return found
