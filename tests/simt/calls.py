"""Decoding of PTX and CUDA calls: operands to values, results to destinations."""

import numpy as np
from tvm.backend.cuda.ptx.table import TABLE, mods, operand_layout
from tvm.ir import StringImm

from . import cuda, ptx, values
from .memory import Pointer


def compile_call(compiler, expr, name, args):
    """The closure of a call that is neither arithmetic nor memory: PTX or CUDA."""
    if name.startswith("tirx.ptx."):
        if name == "tirx.ptx.addr":
            base, offset = (compiler.compile(arg) for arg in args)
            return lambda block: block.pointer(base(block)) + offset(block)
        return ptx_call(compiler, name.removeprefix("tirx.ptx."), args)
    function = cuda.CALLS.get(name.removeprefix("tirx."))
    if function is None:
        raise NotImplementedError(f"call {name}: {expr}")
    operands = [constant(arg.value) if isinstance(arg, StringImm) else compiler.compile(arg)
                for arg in args]  # fmt: skip
    dtype = None if str(expr.ty.dtype) in ("", "void", "handle") else compiler.dtype(expr)
    return lambda block: function(block, dtype, *(operand(block) for operand in operands))


def constant(value):
    return lambda block: value


def ptx_call(compiler, name, args):
    """Operands by the instruction table's own layout; destinations are stored after all reads."""
    entry, function = TABLE[name], ptx.CALLS.get(name)
    if function is None:
        raise NotImplementedError(f"PTX instruction {name} ({entry.family}): add it to ptx.CALLS")
    tokens = [arg.value for arg in args[len(args) - len(entry.slots) - 1 : -1]]
    flags = args[-1].value.split(",")
    if any(flag.startswith("s") for flag in flags):
        raise NotImplementedError(f"PTX instruction {name} with a sunk destination")
    modifiers = mods(entry, tokens)
    reads, writes, used = [], [], 0
    for slot, first, lanes in operand_layout(entry, modifiers):
        operands = args[first : first + lanes]
        used = first + lanes
        if function is ptx.WGMMA and slot.name in ("d", "a"):
            reads.append((slot.name, "reg", [place(compiler, arg) for arg in operands]))
            continue
        if slot.rw in ("w", "rw"):
            writes += [
                (compiler.lvalue(arg.source, arg.indices), compiler.dtype(arg)) for arg in operands
            ]
        if slot.rw != "w" and lanes:
            reads.append((slot.name, slot.kind, [reader(compiler, slot, arg) for arg in operands]))
    guard = compiler.compile(args[used]) if "pred" in flags else None

    def execute(block):
        operands = {}
        for operand, kind, readers in reads:
            found = [read(block) for read in readers]
            operands[operand] = found if kind == "reg" else found[0]
        results = function(block, modifiers, **operands)
        for (store, dtype), result in zip(writes, results or ()):
            store(block, bits_as(result, dtype))

    def guarded(block):
        test = guard(block)
        saved, active = block.mask, block.lanes_of(test).astype(bool) & block.active()
        if active.any():
            block.mask = active
            execute(block)
            block.mask = saved

    return execute if guard is None else guarded


def reader(compiler, slot, arg):
    """Addresses as pointers, immediates as ints, registers as arrays [threads] of their dtype."""
    if slot.kind in ("addr", "ptr"):
        address = compiler.compile(arg)
        return lambda block: block.pointer(address(block))
    if slot.kind == "imm":
        immediate = compiler.compile(arg)
        return lambda block: immediate(block)
    register, dtype = compiler.compile(arg), compiler.dtype(arg)
    return lambda block: block.array(register(block), dtype)


def place(compiler, arg):
    """The closure of (storage.Local, index) of a register."""
    buffer, (index,) = compiler.element(arg.source, arg.indices)
    return lambda block: (block.env[buffer], index(block))


def bits_as(result, dtype):
    """A result in a destination register: registers hold bits, not types; integers extend."""
    if isinstance(result, Pointer) or result.dtype == dtype:
        return result
    if result.dtype.itemsize != dtype.itemsize:
        if result.dtype.kind in "iu" and dtype.kind in "iu":
            return result.astype(dtype)
        raise TypeError(f"a result of {result.dtype} for a register of {dtype}")
    return values.reinterpret(np.ascontiguousarray(result), result.dtype, dtype)
