"""Shared settings: deterministic data, two threads, and one fixture that runs a test on every instruction set."""

import importlib.util
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The folder tests/triton must not pass for a package of that name where triton is not installed.
if importlib.util.find_spec("triton.language") is None:
    sys.modules["triton"] = None

import core_driver
import hypothesis
import pytest
import torch

from qkernels import isa

hypothesis.settings.register_profile("qkernels", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("qkernels")


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(params=isa.supported())
def each_isa(request):
    """Runs the test once per instruction set this CPU has; the value is its name."""
    with isa.force(request.param):
        yield request.param


@pytest.fixture(scope="session")
def core_check(tmp_path_factory):
    """The driver of the installed core, see core_driver.py."""
    return core_driver.build(tmp_path_factory.mktemp("core") / "core_check")


@pytest.fixture(scope="session")
def native_checksums(core_check):
    """What the best instruction set of this CPU computes."""
    return core_driver.run(core_check)[1]
