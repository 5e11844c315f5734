"""What is compiled for the tests here is compiled once for all workers."""

from pathlib import Path

import core_driver
import pytest
from gpu_emulation.project import emulated


@pytest.fixture(scope="session", autouse=True)
def shared_objects(tmp_path_factory):
    emulated.FOLDER = Path(core_driver.shared_folder(tmp_path_factory, "cuda_emulator"))
