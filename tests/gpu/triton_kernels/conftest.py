"""Settings of all tests here: small chunks of the vocabulary, and checks in processes of their own, on other cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qkernels.kernels import reference

CHUNK = 64  # of the vocabulary, so that a small one has many

_children: dict[str, subprocess.Popen] = {}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "LOSS_CHUNK", CHUNK)


def pytest_collection_finish(session):
    """Start the checks that selected tests wait for (test_processes.py), so that they run beside the tests before."""
    if session.config.option.collectonly:
        return
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for item in session.items:
        if item.path.name == "test_processes.py":
            file, environment = item.callspec.params["checks"]
            command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name(file)), "-q", "--disable-warnings"]
            _children[file] = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)


@pytest.fixture
def child(checks) -> subprocess.Popen:
    """The process of these checks."""
    return _children[checks[0]]


def pytest_sessionfinish():
    for child in _children.values():
        child.kill()
        child.wait()
