"""Refuses versions of apache-tvm-ffi that install beside our TVM and then crash it."""

from importlib.metadata import PackageNotFoundError, version

# 0.1.15 changed the binary interface of structural equality: with it Schedule.tensorize dies with
# a segmentation fault. apache-tvm's own requirement lets pip choose it.
COMPATIBLE = ("0.1.14.post1", "0.1.14.post0")


def require_compatible_ffi() -> None:
    """Raise ImportError unless apache-tvm-ffi is known to work; a bare runtime without package
    metadata passes.
    """
    try:
        found = version("apache-tvm-ffi")
    except PackageNotFoundError:
        return
    if found not in COMPATIBLE:
        raise ImportError(
            f"apache-tvm-ffi {found} crashes the TVM that opferry uses; "
            f"run: pip install apache-tvm-ffi=={COMPATIBLE[0]}"
        )
