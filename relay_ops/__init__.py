"""What is computed. The folder carries the name of Relay, TVM's former graph level; it holds Relax
lowerings and TE/TIR.

``OPS`` is the one list of operators.
"""

from .op import Op

OPS: tuple[Op, ...] = ()
