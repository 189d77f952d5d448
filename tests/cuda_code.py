"""What a CUDA kernel becomes: its C++, what TVM's verifiers say of it, what ptxas makes of it."""

import functools
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest
import tvm
from tvm import tirx
from tvm.s_tir.analysis import verify_gpu_code
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm_ffi import structural_map

from opferry.driver import target as targets
from opferry.schedules.cuda.arch import ARCHS, BLOCK_THREADS

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

_VECTOR_BYTES = 16
_TWINS = ("sm_86", "sm_89")


def swept(archs, cases):
    """(architecture, *case) of every pair: of sm_86 and sm_89, which have the instructions of
    sm_80, all cases but the first are left to the sweep.
    """
    return [
        pytest.param(
            arch,
            *(case if isinstance(case, tuple) else (case,)),
            marks=pytest.mark.slow if arch in _TWINS and case != cases[0] else (),
        )
        for arch in archs
        for case in cases
    ]


class Resources(NamedTuple):
    """Of one kernel; registers are those of a thread, the rest bytes."""

    registers: int
    spilled: int
    shared: int
    """Static: what the kernel asks for at launch does not count."""


@functools.lru_cache(maxsize=64)
def source(func, arch):
    """CUDA C++ of a PrimFunc's kernels; made once for the same object."""
    built = tvm.compile(_module(func), targets.resolve(f"cuda-{arch}"))
    return built.mod.imports[0].inspect_source()


def verify(func, arch):
    """Assert what TVM's verifiers judge: no memory of the GPU is touched outside of kernels, and
    threads, shared memory and vectors of each keep the limits of the architecture.
    """
    record = ARCHS[arch]
    limits = {
        "max_threads_per_block": BLOCK_THREADS,
        "max_shared_memory_per_block": record.shared_per_block,
        "max_vector_bytes": _VECTOR_BYTES,
    }
    module = tirx.transform.BindTarget(targets.resolve(f"cuda-{arch}"))(_module(func))
    lowered = default_s_tir_pipeline()[0](module)
    kernels = [f for f in lowered.functions.values() if f.attrs["target"].kind.name == "cuda"]
    assert kernels
    for kernel in kernels:
        assert tirx.analysis.verify_memory(kernel)
        fixed = kernel.with_body(structural_map(kernel.body, (tirx.AttrStmt, _one_block)))
        assert verify_gpu_code(fixed, limits)


def _one_block(statement):
    """A grid whose size is known at the call only, which the verifier does not take."""
    if statement.attr_key != "thread_extent" or isinstance(statement.value, tirx.IntImm):
        return statement
    assert statement.node.thread_tag.startswith("blockIdx")
    one = tirx.const(1, statement.value.ty.dtype)
    return tirx.AttrStmt(statement.node, statement.attr_key, one, statement.body)


def resources(text, arch, folder):
    """What each kernel of a CUDA C++ text takes, as ptxas says."""
    (folder / "kernel.cu").write_text(text)
    command = ["nvcc", "-cubin", "-arch", arch, "-Xptxas", "-v", "-o", folder / "kernel.cubin"]
    command.append(folder / "kernel.cu")
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "(C75" not in told  # products of warpgroups that ptxas makes wait for something
    kernels = re.findall(r"(\d+) bytes spill stores.*\n.*Used (\d+) registers(.*)", told)
    assert kernels
    return [
        Resources(int(registers), int(spilled), _sum(r"(\d+) bytes smem", rest))
        for spilled, registers, rest in kernels
    ]


def _sum(pattern, text):
    return sum(map(int, re.findall(pattern, text)))


def _module(func):
    return tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
