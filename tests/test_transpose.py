"""Square blocks are transposed in registers of every width that CPU kernels use."""

import numpy as np
import pytest
import tvm
from numpy.testing import assert_array_equal
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import BufferLoad
from tvm.tirx.script.builder import ir as T

from opferry.schedules.llvm.transpose import transpose_square
from opferry.schedules.llvm.vector import ramp


def transposing(lanes):
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name("main")
            source, result = (T.arg(x, T.buffer((lanes, lanes), "float32")) for x in "xy")
            block = T.alloc_buffer((lanes, lanes), scope="local")
            for r in range(lanes):
                index = [r, ramp(0, lanes)]
                T.buffer_store(block, BufferLoad(source, index), index)
            transpose_square(block, lanes)
            for r in range(lanes):
                index = [r, ramp(0, lanes)]
                T.buffer_store(result, BufferLoad(block, index), index)
        return builder.get()


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_square_block(lanes):
    function = tvm.compile(transposing(lanes), target="llvm")
    x = np.arange(lanes * lanes, dtype=np.float32).reshape(lanes, lanes)
    y = tvm.runtime.tensor(np.zeros_like(x))
    function(tvm.runtime.tensor(x), y)
    assert_array_equal(y.numpy(), x.T)
