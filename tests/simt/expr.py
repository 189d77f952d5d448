"""Expressions of TIR compiled once to closures `block -> value`.

A subexpression of thread indices and uniform integers alone (the bulk: addresses) remembers its
value for each combination of those integers.
"""

import numpy as np
from tvm.ir import Call

from . import calls, values
from .memory import Pointer
from .races import SimtError
from .storage import Local
from .vector import lane, lanes, scalar_dtype

REMEMBERED = 4096  # values kept by one address expression


class Expressions:
    """Compiler of the expressions of one function; variables become slots of `block.env`."""

    def __init__(self):
        self.slots = {}
        self.sources = {}  # slot -> slots it is computed from, when purely from uniform integers
        self.compiled = {}  # hash of an expression, its address -> (the expression, its closure)

    def slot(self, var):
        return self.slots.setdefault(var, len(self.slots))

    def dtype(self, expr):
        if lanes(expr) > 1:
            raise NotImplementedError(f"vector value {expr} of dtype {expr.ty.dtype}")
        return values.numpy_dtype(expr.ty.dtype)

    def compile(self, expr):
        """The closure of a scalar expression; one that stands in several places has one closure."""
        address = hash(expr)
        if address not in self.compiled:
            self.compiled[address] = (expr, self.closure(expr))
        return self.compiled[address][1]

    def closure(self, expr):
        kind = type(expr).__name__
        sources = self.pure_sources(expr)
        if sources is not None and kind not in ("Var", "IntImm") and "thread" in sources:
            return self.remembered(self.build(kind, expr), sources - {"thread"})
        return self.build(kind, expr)

    def build(self, kind, expr):
        if isinstance(expr, Call):
            return self.call(expr)
        if kind in values.BINARY:
            function = values.BINARY[kind]
            if values.is_float(self.dtype(expr.a)):
                function = values.OF_FLOATS.get(kind, function)
            return self.binary(expr.a, expr.b, function, kind in values.COMPARISONS)
        method = getattr(self, "build_" + kind, None)
        if method is None:
            raise NotImplementedError(f"expression {kind}: {expr}")
        return method(expr)

    def remembered(self, function, sources):
        slots, cache = sorted(sources), {}

        def value(block):
            env = block.env
            key = tuple([env[slot] for slot in slots])
            found = cache.get(key)
            if found is None:
                if len(cache) >= REMEMBERED:
                    cache.clear()
                found = cache[key] = function(block)
            return found

        return value

    def pure_sources(self, expr):
        """Slots (and "thread") an integer expression depends on; None: on memory or lanes."""
        kind = type(expr).__name__
        if kind == "IntImm":
            return frozenset()
        if kind == "Var":
            return self.sources.get(self.slots.get(expr))
        if kind in values.BINARY or kind in ("And", "Or"):
            parts = (expr.a, expr.b)
        elif kind in ("Cast", "Not"):
            parts = (expr.value,) if kind == "Cast" else (expr.a,)
        elif isinstance(expr, Call) and values.operator_name(expr) in values.BINARY_CALLS:
            parts = tuple(expr.args)
        else:
            return None
        found = frozenset()
        for part in parts:
            sources = self.pure_sources(part)
            if sources is None:
                return None
            found |= sources
        return found

    def build_IntImm(self, expr):
        value = bool(expr.value) if str(expr.ty.dtype) == "bool" else int(expr.value)
        return lambda block: value

    def build_FloatImm(self, expr):
        value = self.dtype(expr).type(expr.value)
        return lambda block: value

    def build_Var(self, expr):
        if expr not in self.slots:
            raise SimtError(f"variable {expr.name} is used before it is bound")
        slot = self.slots[expr]
        return lambda block: block.env[slot]

    def binary(self, a, b, operation, compares=False):
        dtype = self.dtype(a)
        a, b = self.compile(a), self.compile(b)
        if compares:

            def value(block):
                result = operation(a(block), b(block))
                return result if isinstance(result, np.ndarray) else bool(result)

            return value
        if dtype.kind not in "iu":
            return lambda block: operation(a(block), b(block))
        limits = np.iinfo(dtype)
        low, high = limits.min, limits.max

        def value(block):
            result = operation(a(block), b(block))
            if type(result) is int and not low <= result <= high:
                return values.wrap(result, dtype)
            return result

        return value

    def build_And(self, expr):
        a, b = self.compile(expr.a), self.compile(expr.b)

        def value(block):
            left = a(block)
            if not isinstance(left, np.ndarray):
                return left and b(block)
            return masked(block, left, b) & left

        return value

    def build_Or(self, expr):
        a, b = self.compile(expr.a), self.compile(expr.b)

        def value(block):
            left = a(block)
            if not isinstance(left, np.ndarray):
                return left or b(block)
            return masked(block, ~left, b) | left

        return value

    def build_Not(self, expr):
        a = self.compile(expr.a)

        def value(block):
            operand = a(block)
            return ~operand if isinstance(operand, np.ndarray) else not operand

        return value

    def build_BitwiseNot(self, expr):
        return self.math(np.invert, [expr.a], self.dtype(expr))

    def build_Cast(self, expr):
        source, target = self.dtype(expr.value), self.dtype(expr)
        operand = self.compile(expr.value)
        if source.kind not in "iu" or target.kind not in "iu":
            return lambda block: values.cast(operand(block), source, target)
        low, high = np.iinfo(target).min, np.iinfo(target).max

        def value(block):
            found = operand(block)
            if isinstance(found, np.ndarray):
                return found.astype(target)
            if type(found) is int and low <= found <= high:
                return found
            return values.wrap(found, target)

        return value

    def build_Select(self, expr):
        return self.choice(expr.condition, expr.true_value, expr.false_value, self.dtype(expr))

    def choice(self, condition, true_value, false_value, dtype):
        """Each branch runs for its own threads only, as the ?: of CUDA C."""
        condition = self.compile(condition)
        true_value, false_value = self.compile(true_value), self.compile(false_value)

        def value(block):
            test = condition(block)
            if not isinstance(test, np.ndarray):
                return true_value(block) if test else false_value(block)
            active = block.active()
            if not (test & active).any():
                return false_value(block)
            if not (~test & active).any():
                return true_value(block)
            yes, no = masked(block, test, true_value), masked(block, ~test, false_value)
            if isinstance(yes, Pointer) or isinstance(no, Pointer):
                return choose_pointer(block, test, yes, no)
            return np.where(test, np.asarray(yes, dtype), np.asarray(no, dtype))

        return value

    def build_Let(self, expr):
        bound = self.compile(expr.value)
        slot = self.slot(expr.var)
        self.sources[slot] = None
        body = self.compile(expr.body)

        def value(block):
            block.env[slot] = held(bound(block))
            return body(block)

        return value

    def build_TensorLoad(self, expr):
        buffer, indices = self.element(expr.source, expr.indices)
        if len(indices) != 1:
            return lambda block: block.env[buffer].load(block, [index(block) for index in indices])
        index = indices[0]

        def value(block):
            at, view = index(block), block.env[buffer]
            if type(at) is int and type(view) is Local and 0 <= at < len(view.data):
                return view.data[at]
            return view.load(block, [at])

        return value

    def element(self, buffer, indices):
        """(slot of the buffer, closures of the indices) of a scalar element."""
        if buffer not in self.slots:
            raise SimtError(f"buffer {buffer.name} is used before it is declared")
        return self.slots[buffer], [self.compile(index) for index in indices]

    def lvalue(self, buffer, indices):
        """A closure (block, value) that stores into a scalar element."""
        buffer, indices = self.element(buffer, indices)
        return lambda block, value: block.env[buffer].store(
            block, [index(block) for index in indices], value
        )

    def call(self, expr):
        name, args = values.operator_name(expr), list(expr.args)
        if name in ("tirx.likely",):
            return self.compile(args[0])
        if name == "tirx.if_then_else":
            return self.choice(*args, self.dtype(expr))
        if name == "tirx.reinterpret":
            if lanes(args[-1]) > 1:
                columns, target = self.columns(args[-1]), self.dtype(expr)
                return lambda block: joined(block, columns(block), target)
            source, target = self.dtype(args[-1]), self.dtype(expr)
            operand = self.compile(args[-1])
            return lambda block: values.reinterpret(operand(block), source, target)
        if name == "tirx.dp4a":
            return self.dp4a(*args)
        if name == "tirx.address_of":
            return self.address_of(args[0])
        if name == "tirx.buffer_data":
            slot = self.slot(args[0])
            return lambda block: block.env[slot].pointer(block, 0)
        if name == "tirx.tvm_access_ptr":
            slot = self.slot(args[1].args[0] if isinstance(args[1], Call) else args[1])
            size, offset = values.numpy_dtype(args[0].ty.dtype).itemsize, self.compile(args[2])
            return lambda block: block.env[slot].pointer(block, offset(block) * size)
        if name in values.BINARY_CALLS:
            return self.binary(*args, values.BINARY_CALLS[name])
        if name in values.MATH_CALLS:
            return self.math(values.MATH_CALLS[name], args, self.dtype(expr))
        return calls.compile_call(self, expr, name, args)

    def math(self, function, args, dtype):
        operands = [(self.compile(arg), self.dtype(arg)) for arg in args]

        def value(block):
            found = [operand(block) for operand, _ in operands]
            uniform = not any(isinstance(v, np.ndarray) for v in found)
            arrays = [
                v if isinstance(v, np.ndarray) else np.full(1 if uniform else block.threads, v, d)
                for v, (_, d) in zip(found, operands)
            ]
            result = function(*arrays)
            return values.scalar(result[0], dtype) if uniform else result

        return value

    def columns(self, expr):
        """The closure of a vector expression: a list of arrays [threads], one by lane."""
        dtype = values.numpy_dtype(scalar_dtype(expr))
        if isinstance(expr, Call) and values.operator_name(expr) == "tirx.reinterpret":
            operand, source = self.columns(expr.args[-1]), expr.args[-1]
            source = values.numpy_dtype(scalar_dtype(source))

            def parts(block):
                raw = np.stack([block.array(v, source) for v in operand(block)], axis=1)
                return list(raw.view(dtype).T)

            return parts
        closures = [self.compile(lane(expr, i)) for i in range(lanes(expr))]
        return lambda block: [block.array(closure(block), dtype) for closure in closures]

    def dp4a(self, a, b, c):
        """c plus the products of four bytes."""
        a, b, c, dtype = self.columns(a), self.columns(b), self.compile(c), self.dtype(c)

        def value(block):
            products = [x.astype(dtype) * y.astype(dtype) for x, y in zip(a(block), b(block))]
            return sum(products, block.array(c(block), dtype))

        return value

    def address_of(self, target):
        buffer, indices = self.element(target.source, target.indices)

        def value(block):
            view = block.env[buffer]
            if isinstance(view, Local):
                raise NotImplementedError(f"address of local buffer {view.name}")
            return view.address(block, [index(block) for index in indices])

        return value


def masked(block, condition, closure):
    """The value of a closure that only the active threads of a condition evaluate."""
    saved = block.mask
    block.mask = condition if saved is None else condition & saved
    try:
        return closure(block)
    finally:
        block.mask = saved


def held(value):
    """The value as it is now: a view of a local buffer would follow later stores."""
    if isinstance(value, np.ndarray) and value.base is not None:
        return value.copy()
    return value


def joined(block, columns, dtype):
    """Lanes as one wider element."""
    return np.stack(columns, axis=1).view(dtype).reshape(-1)


def choose_pointer(block, test, yes, no):
    yes, no = block.pointer(yes), block.pointer(no)
    if yes.region is not no.region:
        raise NotImplementedError(
            f"a choice between pointers into {yes.region.name} and {no.region.name}"
        )
    return Pointer(yes.region, np.where(test, yes.offset, no.offset))
