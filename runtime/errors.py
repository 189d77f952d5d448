"""The error family. Every message names the node, the input or attribute, what was found, what is
allowed.
"""


class OpferryError(ValueError):
    """Root of everything that opferry raises on purpose."""


class InvalidNodeError(OpferryError):
    """A node breaks a rule of its operator: shape, attribute, arity, constant value."""


class InvalidTypeError(OpferryError, TypeError):
    """An element type or attribute type is not one that the operator takes."""


class InvalidModelError(OpferryError):
    """A file or graph is not a valid ONNX model."""


class InvalidInputError(OpferryError):
    """An array given to a compiled module does not fit it; raised before any kernel starts."""


class InvalidInputTypeError(InvalidInputError, TypeError):
    """The element type of an array given to a compiled module is not the declared one."""


class UnsupportedError(OpferryError, NotImplementedError):
    """Valid, but not supported here; the message says what is."""


class ArtifactError(OpferryError):
    """A saved module is damaged, incomplete, of another version or for another machine."""


def message(node: str, subject: str, found: object, allowed: object, code: str = "") -> str:
    """The form of every refusal: ``<node>: <subject>: found <found>, allowed <allowed>``.

    `node` is a label such as ``NPUQuantMatmul node "fc1"``, `subject` such as ``input "x1"``;
    `code` is the error class of the operator's specification (``E-SHAPE``), appended in brackets.
    """
    return f"{node}: {subject}: found {found}, allowed {allowed}" + (f" [{code}]" if code else "")
