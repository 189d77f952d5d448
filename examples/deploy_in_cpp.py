"""A saved module in a C++ program: compiles the mixed model, builds deploy_cpp/, runs, compares."""

import subprocess
import sys
import tempfile
from pathlib import Path

import mixed_model
import numpy as np

import opferry

SHAPE = (2, 37, 64)  # of the mixed model's input, batch and length being symbolic


def main() -> int:
    module = opferry.compile(mixed_model.build())
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    want = module.run({"x": x})["y"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module.save(folder / "block")
        source = Path(__file__).parent / "deploy_cpp"
        subprocess.run(
            ["make", "--quiet", "-C", source, f"PYTHON={sys.executable}", f"BUILD={folder}"],
            check=True,
        )
        done = subprocess.run(
            [folder / "run_module", folder / "block" / "module.so", *map(str, SHAPE)],
            input=x.tobytes(),
            capture_output=True,
            check=False,
        )
    if done.returncode:
        print(done.stderr.decode())
        return 1
    got = np.frombuffer(done.stdout, np.float32).reshape(want.shape)
    difference = np.abs(got - want).max()
    print(f"C++ ran {module}: largest difference to Python {difference:.1e}")
    return 0 if difference == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
