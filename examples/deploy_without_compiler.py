"""A saved module in a process that loads TVM's runtime and not its compiler.

The first process compiles and saves. The second one runs with TVM_USE_RUNTIME_LIB=1, which makes
TVM behave as where only libtvm_runtime is installed, and must give the same numbers.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SHAPE = (2, 37, 64)  # of the mixed model's input, batch and length being symbolic
COMPILER = "libtvm_compiler"


def main() -> int:
    import mixed_model

    import opferry

    module = opferry.compile(mixed_model.build())
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        module.save(Path(folder) / "block")
        np.save(Path(folder) / "x.npy", x)
        subprocess.run(
            [sys.executable, __file__, folder],
            env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},
            check=True,
        )
        same = np.array_equal(module.run({"x": x})["y"], np.load(Path(folder) / "y.npy"))
    print(f"the process that compiled gets {'the same' if same else 'OTHER'} numbers")
    return 0 if same else 1


def run(folder: Path) -> int:
    """The deployed side."""
    import opferry

    module = opferry.load(folder / "block")
    y = module.run({"x": np.load(folder / "x.npy")})["y"]
    np.save(folder / "y.npy", y)

    mapped = Path("/proc/self/maps").read_text().split()
    libraries = sorted({Path(name).name for name in mapped if "/libtvm" in name})
    print(f"ran {module} with {', '.join(libraries)}")
    return 1 if any(COMPILER in name for name in libraries) else 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])) if len(sys.argv) > 1 else main())
