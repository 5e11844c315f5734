"""Chunks of the vocabulary are small, so that a small one has many."""

import pytest

from qkernels import reference

CHUNK = 128


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "LOSS_CHUNK", CHUNK)
