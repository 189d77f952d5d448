"""Shared by all tests."""

import gc
from pathlib import Path

import pytest
from small_model import SUM_AND_NEGATIVE, model

import opferry

LONGEST = [
    "test_cuda_longformer",
    "test_nsa_compress_attention",
    "test_nsa_instruction_sets",
    "test_cuda_attention_code",
    "test_speed_fusion_masks",
    "test_speed_fusion_products",
    "test_examples",
    "test_qordered_longformer_attention",
    "test_cuda_nsa",
    "test_speed_fusion_attention",
    "test_cuda_gemm_code",
    "test_nsa_lengths",
    "test_cuda_attention",
    "test_linear_a8w8_quant",
    "test_cuda_int8_matmul",
    "test_cuda_attention_warpgroups",
]
"""Files that take longest. Workers take whole files: one of these begun last would run alone."""


def pytest_collection_modifyitems(items):
    """Files of `LONGEST` first."""
    missing = [name for name in LONGEST if not Path(__file__).with_name(f"{name}.py").exists()]
    assert not missing, f"LONGEST names {missing}"
    place = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish():
    """What thousands of tests consist of stays: the garbage collector need not walk it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def module():
    """`SUM_AND_NEGATIVE` compiled for this machine."""
    return opferry.compile(model(SUM_AND_NEGATIVE))


@pytest.fixture(scope="module")
def saved(module, tmp_path_factory):
    """The folder it is saved to."""
    folder = tmp_path_factory.mktemp("saved") / "module"
    module.save(folder)
    return folder
