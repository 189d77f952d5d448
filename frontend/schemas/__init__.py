"""ONNX schemas of the operators: what onnx.defs is told, so that checker and inference know them.

Needs onnx and NumPy only. `import opferry` registers them; `register` may be called again.
"""

import onnx.defs
from onnx.defs import OpSchema

from ...runtime.errors import UnsupportedError
from . import (
    linear_a8w8_quant,
    nsa_compress_attention,
    qordered_longformer_attention,
    qordered_matmul,
    speed_fusion_attention,
)

SCHEMAS: tuple[OpSchema, ...] = (
    qordered_matmul.SCHEMA,
    qordered_longformer_attention.SCHEMA,
    speed_fusion_attention.SCHEMA,
    nsa_compress_attention.SCHEMA,
    linear_a8w8_quant.SCHEMA,
    linear_a8w8_quant.QUANT_BATCH_MATMUL,
    linear_a8w8_quant.TRANS_QUANT_PARAM,
)

_BY_NAME = {(s.domain, s.name): s for s in SCHEMAS}


def schema(domain: str, op_type: str) -> OpSchema | None:
    """Our schema of `domain::op_type`, None when the operator is not ours ("ai.onnx" is "")."""
    return _BY_NAME.get(("" if domain == "ai.onnx" else domain, op_type))


def register() -> None:
    """Tell onnx.defs about every schema it lacks; calling it again does nothing.

    Raises:
        UnsupportedError: another library has registered an operator of the same domain and name
            with other inputs, outputs, attributes or version.
    """
    for ours in SCHEMAS:
        if not onnx.defs.has(ours.name, ours.domain):
            onnx.defs.register_schema(ours)
            continue
        theirs = onnx.defs.get_schema(ours.name, ours.domain)
        differing = [
            part
            for part, signature in _signature(ours).items()
            if _signature(theirs)[part] != signature
        ]
        if differing:
            raise UnsupportedError(
                f'operator "{ours.domain or "ai.onnx"}::{ours.name}" is already registered with '
                f"onnx.defs by another library: found other {', '.join(differing)} than ours, "
                "allowed the same schema or none"
            )


def _signature(found: OpSchema) -> dict[str, object]:
    """What makes two registrations the same operator; documentation does not."""
    return {
        "since_version": found.since_version,
        "inputs": [(p.name, p.option, frozenset(p.types)) for p in found.inputs],
        "outputs": [(p.name, p.option, frozenset(p.types)) for p in found.outputs],
        "attributes": {
            name: (a.type, a.required, a.default_value.SerializeToString())
            for name, a in found.attributes.items()
        },
    }
