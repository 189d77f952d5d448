"""opferry: vendor-locked fused ONNX operators, compiled for open targets with Apache TVM.

Public names are imported when they are first used, so that `import opferry` alone needs neither
TVM nor time. It does tell onnx.defs about the operators, so that onnx.checker and
onnx.shape_inference accept models that contain them.
"""

import importlib
import importlib.util
import warnings

__version__ = "0.1.0"

_HOMES = {
    "compile": "opferry.driver.build",
    "load": "opferry.runtime.module",
    "validate": "opferry.driver.validate",
    "Module": "opferry.runtime.module",
    "OPS": "opferry.relay_ops",
    "OpferryError": "opferry.runtime.errors",
    "linear_a8w8_quant": "opferry.frontend.builders",
    "node_model": "opferry.frontend.builders",
    "npu_trans_quant_param": "opferry.frontend.quant_param",
    "speed_fusion_attention": "opferry.frontend.builders",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys())


def _require_compatible_ffi() -> None:
    from opferry.runtime.ffi_version import require_compatible_ffi

    require_compatible_ffi()


def _register_schemas() -> None:
    """Warn where another library has taken a name; compiling a model then refuses it."""
    from opferry.frontend.schemas import register
    from opferry.runtime.errors import OpferryError

    try:
        register()
    except OpferryError as error:
        warnings.warn(str(error), stacklevel=2)


_require_compatible_ffi()

# pytest executes this file a second time under the name of the checkout's folder. Absolute names
# keep every other module single, and registering twice does nothing. A machine that only runs
# saved modules may have no onnx.
if importlib.util.find_spec("onnx") is not None:
    _register_schemas()
