"""What the operators mean, in NumPy: one function per operator, apart from all that is compiled.

`numerics` holds the shared rounding, layouts and random stream, `compare` the tolerances,
`evaluator` the same functions as operators of ``onnx.reference.ReferenceEvaluator``. Nothing here
imports TVM.
"""
