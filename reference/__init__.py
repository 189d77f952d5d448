"""What the operators mean, in NumPy: one function per operator, apart from all that is compiled.

`numerics` holds the shared rounding, layouts and random stream, `compare` the tolerances,
`whole_model` the same functions as operators of ``onnx.reference.ReferenceEvaluator``; its
``evaluator(model)`` is public here too. Nothing here imports TVM.
"""


def __getattr__(name: str):
    if name != "evaluator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .whole_model import evaluator

    return evaluator
