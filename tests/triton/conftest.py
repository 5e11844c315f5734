"""Settings of all tests here: small chunks of the vocabulary, and a process that interprets kernels meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qkernels import reference

CHUNK = 64  # of the vocabulary, so that a small one has many
INTERPRETED = "test_interpreted.py"
CHECKS = Path(__file__).with_name("interpreted_checks.py")

_child: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "LOSS_CHUNK", CHUNK)


def pytest_collection_finish(session):
    """Start the checks under the interpreter, which need a process of their own, beside the tests before theirs."""
    if any(item.path.name == INTERPRETED for item in session.items) and not session.config.option.collectonly:
        command = [sys.executable, "-m", "pytest", str(CHECKS), "-q", "-x", "--disable-warnings"]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        _child.append(subprocess.Popen(command, env=environment, **pipes))


@pytest.fixture
def interpreting() -> subprocess.Popen:
    """That process."""
    return _child[0]


def pytest_sessionfinish():
    for child in _child:
        child.kill()
        child.wait()
