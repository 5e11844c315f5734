"""Settings of all tests here: small chunks of the vocabulary."""

import pytest

from qkernels.kernels import reference

CHUNK = 64  # of the vocabulary, so that a small one has many


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "LOSS_CHUNK", CHUNK)
