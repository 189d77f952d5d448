"""A barrier for the compiler: what lies in memory before it is read from there again after it.

LLVM keeps arrays in registers across loops whose places it knows, more than there are registers;
what it then spills lies in the innermost loops. A barrier between two blocks of work ends the lives
of such values where the author wants. It emits no instruction. A kernel that uses it has
``T.attr(0, "pragma_import_llvm", SOURCE)`` around its body.
"""

from __future__ import annotations

import tvm.tirx as tir
from tvm.ir import Expr

SOURCE = """
define internal i32 @opferry_barrier() alwaysinline {
  call void asm sideeffect "", "~{memory}"()
  ret i32 0
}
"""


def barrier() -> Expr:
    """To be evaluated as a statement."""
    return tir.call_extern("int32", "opferry_barrier")
