"""Statements of TIR compiled once to closures that run a block in lock step."""

import numpy as np
from tvm.ir import Call
from tvm.tirx import ForKind

from . import values
from .expr import Expressions, held
from .memory import POISON, Region, Shared
from .races import SimtError
from .storage import Local, View
from .vector import lane, lanes

WHILE_LIMIT = 1 << 20  # iterations after which a while loop is said to hang


class Statements(Expressions):
    """Compiler of the statements of a kernel."""

    def statement(self, stmt):
        kind = type(stmt).__name__
        method = getattr(self, "run_" + kind, None)
        if method is None:
            raise NotImplementedError(f"statement {kind}: {stmt}")
        return method(stmt)

    def run_SeqStmt(self, stmt):
        steps = [self.statement(step) for step in stmt.seq]

        def run(block):
            for step in steps:
                step(block)

        return run

    def run_SBlockRealize(self, stmt):
        block_ = stmt.block
        if len(block_.iter_vars) or len(block_.match_buffers) or block_.init is not None:
            raise NotImplementedError(f"block {block_.name_hint} with iterators: not a CUDA kernel")
        allocations = [self.allocate(buffer) for buffer in block_.alloc_buffers]
        body = self.statement(block_.body)

        def run(block):
            for allocation in allocations:
                allocation(block)
            body(block)

        return run

    def run_AllocBuffer(self, stmt):
        return self.allocate(stmt.buffer)

    def allocate(self, buffer):
        """Registers and global memory are poison at each entry of their scope, a shared buffer
        once for the block."""
        slot, dtype, scope = self.slot(buffer), self.buffer_dtype(buffer), buffer.scope()
        shape, strides = self.shape(buffer)
        if scope.startswith("shared"):
            alignment = int(buffer.ty.data_alignment)

            def run(block):
                if block.env[slot] is None:
                    extents = evaluated(shape, block)
                    base = block.shared_address(alignment)
                    region = Shared(buffer.name, nbytes(extents, dtype), base)
                    block.regions.append(region)
                    block.env[slot] = View(
                        buffer.name, region, dtype, extents, evaluated(strides, block)
                    )

            return run
        if scope == "global":

            def run(block):
                extents = evaluated(shape, block)
                data = np.full(nbytes(extents, dtype), POISON, np.uint8)
                view = global_view(buffer.name, data.view(dtype).reshape(extents))
                block.env[slot] = view

            return run
        if scope != "local":
            raise NotImplementedError(f"buffer {buffer.name} of scope {scope}")

        def run(block):
            extents = evaluated(shape, block)
            data = np.full((block.threads, nbytes(extents, dtype)), POISON, np.uint8)
            data = data.view(dtype).T if dtype != np.bool_ else np.zeros(data.shape, bool).T
            block.env[slot] = Local(buffer.name, dtype, extents, evaluated(strides, block), data)

        return run

    def run_DeclBuffer(self, stmt):
        source = stmt.data.args[0] if isinstance(stmt.data, Call) else stmt.data
        if source is None or source not in self.slots:
            raise NotImplementedError(f"buffer {stmt.buffer.name} over {stmt.data}")
        buffer, origin, slot = stmt.buffer, self.slots[source], self.slot(stmt.buffer)
        dtype, (shape, strides) = self.buffer_dtype(buffer), self.shape(buffer)
        offset = buffer.ty.elem_offset
        offset = constant(0) if offset is None else self.compile(offset)

        def run(block):
            block.env[slot] = block.env[origin].alias(
                buffer.name, dtype, evaluated(shape, block), evaluated(strides, block),
                offset(block),
            )  # fmt: skip

        return run

    def buffer_dtype(self, buffer):
        if lanes(buffer) > 1:
            raise NotImplementedError(f"buffer {buffer.name} of vectors ({buffer.ty.dtype})")
        return values.numpy_dtype(buffer.ty.dtype)

    def shape(self, buffer):
        strides = buffer.ty.strides
        return (
            [self.compile(extent) for extent in buffer.ty.shape],
            [self.compile(stride) for stride in strides] if strides else [],
        )

    def run_Bind(self, stmt):
        sources = self.pure_sources(stmt.value)
        value, slot = self.compile(stmt.value), self.slot(stmt.var)
        self.sources[slot] = sources

        def run(block):
            block.env[slot] = held(value(block))

        return run

    def run_Evaluate(self, stmt):
        value = self.compile(stmt.value)

        def run(block):
            value(block)

        return run

    def run_BufferStore(self, stmt):
        width = max(lanes(index) for index in stmt.indices)
        if width > 1:
            columns = self.columns(stmt.value)
            stores = [
                self.lvalue(stmt.buffer, [lane(index, i) for index in stmt.indices])
                for i in range(width)
            ]

            def run(block):
                for store, value in zip(stores, columns(block)):
                    store(block, held(value))

            return run
        value = self.compile(stmt.value)
        store = self.lvalue(stmt.buffer, stmt.indices)
        return lambda block: store(block, value(block))

    def run_IfThenElse(self, stmt):
        condition, then_case = self.compile(stmt.condition), self.statement(stmt.then_case)
        else_case = None if stmt.else_case is None else self.statement(stmt.else_case)

        def run(block):
            test = condition(block)
            if not isinstance(test, np.ndarray):
                if test:
                    then_case(block)
                elif else_case is not None:
                    else_case(block)
                return
            under(block, test, then_case)
            if else_case is not None:
                under(block, ~test, else_case)

        return run

    def run_While(self, stmt):
        condition, body = self.compile(stmt.condition), self.statement(stmt.body)

        def run(block):
            saved = block.mask
            for _ in range(WHILE_LIMIT):
                test = condition(block)
                if isinstance(test, np.ndarray):
                    test = test & block.active()
                    if not test.any():
                        break
                    block.mask = None if test.all() else test
                elif not test:
                    break
                body(block)
            else:
                raise SimtError(f"a while loop still runs after {WHILE_LIMIT} iterations")
            block.mask = saved

        return run

    def run_For(self, stmt):
        slot = self.slot(stmt.loop_var)
        if stmt.kind == ForKind.THREAD_BINDING:
            return self.bound(stmt, stmt.thread_binding.thread_tag, slot)
        if stmt.kind == ForKind.PARALLEL or stmt.step is not None:
            raise NotImplementedError(f"loop over {stmt.loop_var.name}: parallel, or with a step")
        first = self.pure_sources(stmt.min)
        uniform = first is not None and "thread" not in first
        self.sources[slot] = frozenset([slot]) if uniform else None
        start, extent = self.compile(stmt.min), self.compile(stmt.extent)
        body = self.statement(stmt.body)

        def run(block):
            first, count, env = start(block), extent(block), block.env
            if isinstance(first, np.ndarray) or isinstance(count, np.ndarray):
                return divergent(block, first, count)
            for value in range(first, first + count):
                env[slot] = value
                body(block)
            return None

        def divergent(block, first, count):
            saved, counts = block.mask, block.lanes_of(count)
            for step in range(int(counts[block.active()].max(initial=0))):
                block.env[slot] = first + step
                under(block, step < counts, body)
            block.mask = saved

        return run

    def run_AssertStmt(self, stmt):
        condition = self.compile(stmt.condition)
        message = "".join(str(part.value) for part in stmt.message_parts)

        def run(block):
            failed = ~block.lanes_of(condition(block)).astype(bool) & block.active()
            if failed.any():
                raise SimtError(f"assertion: {message}, {block.place(int(failed.argmax()))}")

        return run

    def run_AttrStmt(self, stmt):
        if stmt.attr_key == "thread_extent":
            return self.bound(stmt, stmt.node.thread_tag, self.slot(stmt.node.var))
        return self.statement(stmt.body)

    def bound(self, stmt, tag, slot):
        if tag.startswith("blockIdx"):
            self.sources[slot] = frozenset([slot])
            read = lambda block: block.index.get(tag, 0)  # noqa: E731
        elif tag.startswith("threadIdx"):
            self.sources[slot] = frozenset(["thread"])
            read = lambda block: block.thread_index[tag]  # noqa: E731
        else:
            raise NotImplementedError(f"loop bound to {tag}")
        body = self.statement(stmt.body)

        def run(block):
            block.env[slot] = read(block)
            body(block)

        return run


def constant(value):
    return lambda block: value


def under(block, test, body):
    """Run for the active threads of a condition [threads]."""
    saved = block.mask
    mask = test if saved is None else test & saved
    if not mask.any():
        return
    block.mask = None if mask.all() else mask
    body(block)
    block.mask = saved


def evaluated(closures, block):
    return tuple(int(closure(block)) for closure in closures)


def nbytes(shape, dtype):
    return int(np.prod(shape)) * dtype.itemsize


def global_view(name, array):
    """A view of an argument array."""
    data = array.reshape(-1).view(np.uint8)
    return View(name, Region(name, data), array.dtype, array.shape, ())
