"""Shared by all tests."""

import pytest
from small_model import SUM_AND_NEGATIVE, model

import opferry


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
