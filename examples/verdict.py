"""Judges one node's outputs by the NumPy reference, under the operator's tolerances."""

from opferry.reference.compare import compare


def judge(op_type: str, inputs: dict, attributes: dict, outputs: list) -> None:
    """Print a line per output; end the script with exit status 1 if one is wrong.

    `inputs` by the schema's names, `outputs` in the schema's order, None for one not computed.
    """
    comparisons = compare(op_type, inputs, attributes, outputs)
    for c in comparisons:
        verdict = "agrees with NumPy" if c.ok else f"DIFFERS from NumPy in {c.mismatches}: {c.note}"
        ties = f", {c.allowed_mismatches} at a rounding tie" if c.allowed_mismatches else ""
        print(f"  {c.name:16} {verdict}, largest difference {c.max_abs_error:.1e}{ties}")
    if not all(c.ok for c in comparisons):
        raise SystemExit(1)
