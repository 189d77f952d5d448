"""What is computed: Relax lowerings, TE and TIR.

The folder carries the name of Relay, TVM's former graph level. ``OPS``, the one list of operators,
is in ``table`` and imported when it is first asked for.
"""


def __getattr__(name: str):
    if name != "OPS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .table import OPS

    return OPS
