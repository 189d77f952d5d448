"""The int8 dot products of x86 and the matmul built on them: meaning, instruction, registers."""

import ctypes
import itertools
import mmap
import os
import re
import struct

import numpy as np
import pytest
import tvm
from hosts import on
from tvm import relax, tirx
from tvm.runtime import tensor
from tvm.target import Target

from opferry.driver.build import pipeline
from opferry.driver.stack import code_generation
from opferry.driver.target import resolve
from opferry.relay_ops.int8_matmul import Left, int8_matmul
from opferry.relay_ops.int8_weight import pack_weight
from opferry.schedules.intrin import x86
from opferry.schedules.llvm.gemm import CONFIGS

TIERS = {
    "x86-amx": x86.AMX,
    "x86-avx512vnni": x86.VNNI_512,
    "x86-avxvnni": x86.VNNI_256,
    "x86-avx512": x86.AVX512BW,
    "x86-avx2": x86.AVX2,
    "x86-64": x86.PORTABLE,
}
AARCH64 = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}


def matmul(target, n, k, m=None, batch=1):
    """Executable of y int32 [batch, M, N] = a @ b, b [batch, N, K] packed at run time."""
    m = tirx.Var("m", "int64") if m is None else m
    bb = relax.BlockBuilder()
    a = relax.Var("a", relax.TensorType((batch, m, k), "int8"))
    b = relax.Var("b", relax.TensorType((batch, n, k), "int8"))
    with bb.function("main", [a, b]):
        with bb.dataflow():
            weight = pack_weight(bb, target, b, n=n, k=k, batch=batch)
            left = Left(a, m, batch)
            y = int8_matmul(bb, target, "qordered_matmul.gemm", left, weight, lambda acc, at: acc)
            y = bb.emit_output(y)
        bb.emit_func_output(y)
    lowering = code_generation(target)
    module = pipeline(target)(bb.get())
    return relax.build(module, target, relax_pipeline=None, tir_pipeline=lowering)


def assembly(executable):
    modules = [executable.mod, *executable.mod.imports]
    return "\n".join(m.inspect_source("asm") for m in modules if m.kind == "llvm")


@pytest.mark.parametrize(
    ("mcpu", "dot"),
    [
        ("znver5", x86.VNNI_512),
        ("sapphirerapids", x86.AMX),
        ("cascadelake", x86.VNNI_512),
        ("alderlake", x86.VNNI_256),
        ("skylake-avx512", x86.AVX512BW),
        ("haswell", x86.AVX2),
        ("x86-64", x86.PORTABLE),
    ],
)
def test_tier_of_a_cpu(mcpu, dot):
    assert x86.pick(Target({"kind": "llvm", "mcpu": mcpu})) is dot


def test_tiles_by_attribute():
    """What a hypervisor tells of a CPU need not fit LLVM's model of it."""
    record = {"kind": "llvm", "mcpu": "rocketlake"}
    assert x86.pick(Target(record)) is x86.VNNI_512
    assert x86.pick(Target(record | {"mattr": ["+amx-tile", "+amx-int8"]})) is x86.AMX
    elsewhere = {"kind": "llvm", "mcpu": "sapphirerapids", "mtriple": "x86_64-pc-windows-msvc"}
    assert x86.pick(Target(elsewhere)) is x86.VNNI_512  # only Linux is known to lend them


def test_other_architectures_take_the_portable_form():
    target = Target(AARCH64)
    assert x86.pick(target) is x86.PORTABLE
    vector_product = re.compile(r"\t(mul|mla|smull|smlal)2?\tv\d")
    assert vector_product.search(assembly(matmul(target, 40, 30)))


@pytest.mark.parametrize("target", TIERS)
def test_every_product_is_exact(target):
    """All 65536 pairs of int8 values."""
    values = np.arange(-128, 128, dtype=np.int8)
    vm = relax.VirtualMachine(matmul(resolve(on(target)), 256, 1), tvm.cpu())
    y = vm["main"](tensor(values.reshape(1, 256, 1)), tensor(values.reshape(1, 256, 1))).numpy()
    assert np.array_equal(y[0], np.outer(values.astype(int), values.astype(int)))


@pytest.mark.parametrize("target", TIERS)
def test_groups_do_not_saturate(target):
    """Sums of one group of k at its extremes, where 16-bit pair sums would saturate."""
    corners = np.array([-128, -127, 0, 127], np.int8)
    rows = np.array(list(itertools.product(corners, repeat=4)), np.int8)  # [256, 4]
    vm = relax.VirtualMachine(matmul(resolve(on(target)), 256, 4), tvm.cpu())
    y = vm["main"](tensor(rows[None]), tensor(rows[None])).numpy()
    assert np.array_equal(y[0], rows.astype(int) @ rows.astype(int).T)


VECTOR_TIERS = [name for name, dot in TIERS.items() if dot.intrin]


@pytest.mark.parametrize("target", VECTOR_TIERS)
@pytest.mark.parametrize("m", [None, 96], ids=["symbolic", "static"])
def test_inner_loop_keeps_its_tile_in_registers(target, m):
    """The loop over k holds one dot product for each accumulator and touches the stack for none."""
    dot = TIERS[target]
    config = CONFIGS[dot]
    text = assembly(matmul(resolve(target), 96, 512, m))
    blocks = re.split(r"\n(?=\.\w+:)", text)
    loop = max(blocks, key=lambda block: block.count(dot.mnemonic))
    jump = re.search(rf"\n\tj\w+\t{re.escape(loop.split(':')[0])}\n", loop)
    assert jump, "the dot products are not in a loop of their own"
    loop = loop[: jump.start()].splitlines()
    products = [line for line in loop if dot.mnemonic in line]
    register = "%zmm" if dot.lanes == 16 else "%ymm"
    assert all(register in line for line in products)
    assert len(products) % (config.rows * config.vectors) == 0
    stores = [line for line in loop if re.search(r"%[yz]mm\d+, [-\d]*\(", line)]
    assert not stores
    assert not [line for line in loop if "mm" in line and "%rsp" in line]


@pytest.mark.parametrize("target", [name for name in TIERS if name != "x86-64"])
@pytest.mark.parametrize("m", [None, 3, 17])
def test_few_rows_ask_for_large_weights_ahead(target, m):
    """Of 4 MiB and more, into the second-level cache; the last panel is not whole."""
    n, k = 2100, 2048
    executable = matmul(resolve(on(target)), n, k, m)
    assert ("prefetcht1" in assembly(executable)) is (m is not None or target == "x86-amx")
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, size, dtype=np.int8) for size in ((1, m or 5, k), (1, n, k)))
    y = relax.VirtualMachine(executable, tvm.cpu())["main"](tensor(a), tensor(b)).numpy()
    assert np.array_equal(y, a.astype("float64") @ b.transpose(0, 2, 1).astype("float64"))


@pytest.mark.parametrize("target", [name for name in TIERS if name != "x86-64"])
def test_many_rows_or_small_weights_are_not_asked_for_ahead(target):
    for m, n, k in ((512, 2100, 2048), (3, 96, 512)):
        assert "prefetcht1" not in assembly(matmul(resolve(target), n, k, m))


@pytest.mark.parametrize(
    ("m", "n", "loads", "products"),
    [(96, 96, 4, 4), (16, 96, 3, 2), (96, 16, 3, 2), (1, 16, 2, 1)],
    ids=["2x2", "1x2", "2x1", "1x1"],
)
def test_inner_loop_of_tiles(m, n, loads, products):
    """A tile of A or B is loaded once for its products; sums stay in tiles."""
    text = assembly(matmul(resolve("x86-amx"), n, 4096, m))
    assert text.count("tdpbssd") % products == 0
    assert text.count("tileloadd") == text.count("tdpbssd") // products * loads
    if (m, n) == (96, 96):  # smaller ones are unrolled
        blocks = re.split(r"\n(?=\.LBB\w+:)", text)
        for loop in (block for block in blocks if "tdpbssd" in block):
            assert loop.count("tdpbssd") == products
            assert "tilestored" not in loop


TILE_SIZES = [
    (1, 1, [1, 2, 17]),
    (33, 17, [1, 15, 16, 17, 33, 100]),
    (100, 100, [*range(1, 18), 31, 32, 33, 48, 49, 511]),
    (1000, 64, [1, 33]),
    (64, 4097, [1, 17, 33]),
    (50, 5, [1, 17, 33, 100]),
    (48, 3, [1, 16, 65]),
    (96, 192, [*range(1, 18), 33, 100, 511]),
]


@pytest.mark.parametrize(("n", "k", "rows"), TILE_SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes_of_tiles(n, k, rows, batch):
    """Symbolic M, and static M for the first and last of ``rows``; no tile is short of memory."""
    rng = np.random.default_rng(n * k)
    target = resolve(on("x86-amx"))
    symbolic = relax.VirtualMachine(matmul(target, n, k, batch=batch), tvm.cpu())
    for m in rows:
        a, b = (rng.integers(-128, 128, (batch, r, k)).astype(np.int8) for r in (m, n))
        expected = a.astype(np.int64) @ b.astype(np.int64).swapaxes(1, 2)
        assert np.array_equal(symbolic["main"](tensor(a), tensor(b)).numpy(), expected), m
        if m in (rows[0], rows[-1]):
            static = relax.VirtualMachine(matmul(target, n, k, m, batch), tvm.cpu())
            assert np.array_equal(static["main"](tensor(a), tensor(b)).numpy(), expected), m


@pytest.mark.parametrize(("m", "k"), [(64, 17), (17, 1344), (48, 100), (64, 5), (100, 1008)])
def test_nothing_is_read_beyond_a(m, k):
    """A ends where the memory of the process does; tiles have 64 bytes of a row."""
    page, size = mmap.PAGESIZE, m * k
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(base + pages * page), ctypes.c_size_t(page), 0) == 0
    rng = np.random.default_rng(k)
    a = np.frombuffer(memory, np.int8, size, pages * page - size).reshape(1, m, k)
    a[:] = rng.integers(-128, 128, a.shape)
    b = rng.integers(-128, 128, (1, 20, k)).astype(np.int8)
    vm = relax.VirtualMachine(matmul(resolve(on("x86-amx")), 20, k, m), tvm.cpu())
    y = vm["main"](tvm.runtime.from_dlpack(a), tensor(b)).numpy()
    assert np.array_equal(y[0], a[0].astype(np.int64) @ b[0].astype(np.int64).T)


def test_no_rows():
    vm = relax.VirtualMachine(matmul(resolve(on("x86-amx")), 40, 100), tvm.cpu())
    empty = tensor(np.zeros((1, 0, 100), np.int8))
    assert vm["main"](empty, tensor(np.ones((1, 40, 100), np.int8))).numpy().shape == (1, 0, 40)


def refuse_arch_prctl():
    """Have Linux refuse this system call to the process from now on, as a sandbox may."""
    number, refused, allowed = 158, 0x00050001, 0x7FFF0000  # EPERM
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, refused), (0x06, 0, 0, allowed)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    code = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    no_new_privileges, set_filter = (38, 1, 0, 0, 0), (22, 2, program, 0, 0)
    for arguments in (no_new_privileges, set_filter):
        assert ctypes.CDLL(None).prctl(*arguments) == 0


def test_a_system_that_refuses_tiles_is_named():
    """In a child process, before any thread of the kernel starts."""
    vm = relax.VirtualMachine(matmul(resolve(on("x86-amx")), 16, 64, 16), tvm.cpu())
    a = tensor(np.ones((1, 16, 64), np.int8))
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            refuse_arch_prctl()
            vm["main"](a, a)
            message = "no error"
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writer, message.encode())
        os._exit(0)
    os.wait()
    message = os.read(reader, 4096).decode()
    assert "the operating system does not permit AMX" in message


@pytest.mark.parametrize("dot", CONFIGS, ids=lambda dot: dot.intrin or "portable")
def test_register_tile_fits(dot):
    config = CONFIGS[dot]
    if dot.intrin:
        assert config.rows * config.vectors + config.vectors + 1 <= dot.registers


@pytest.mark.parametrize("target", ["x86-64", "x86-avx2", "x86-avx512vnni", "x86-amx"])
def test_packing_now_or_at_run_time_gives_the_same_bytes(target):
    rng = np.random.default_rng(0)
    resolved = resolve(on(target))
    b = rng.integers(-128, 128, (2, 100, 70)).astype(np.int8)
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(b.shape, "int8"))
    with bb.function("main", [x]):
        with bb.dataflow():
            late = pack_weight(bb, resolved, x, n=100, k=70, batch=2)
            now = pack_weight(bb, resolved, b, n=100, k=70, batch=2)
            parts = [late.data, now.data]
            parts += [] if now.excess is None else [late.excess, now.excess]
            result = bb.emit_output(relax.Tuple(parts))
        bb.emit_func_output(result)
    executable = relax.build(pipeline(resolved)(bb.get()), resolved, relax_pipeline=None)
    vm = relax.VirtualMachine(executable, tvm.cpu())
    parts = [part.numpy() for part in vm["main"](tensor(b))]
    for at_run_time, at_compile_time in zip(parts[::2], parts[1::2]):
        assert np.array_equal(at_run_time, at_compile_time)
    if now.excess is not None:
        assert np.array_equal(parts[2][:, :100], 128 * b.sum(axis=2, dtype=np.int64))


def test_an_offset_needs_unsigned_a():
    with pytest.raises(ValueError, match="needs unsigned A"):
        x86.DotProduct("avx2", "wrong", "vpmaddwd", 8, 2, "int16", 128, 16)
