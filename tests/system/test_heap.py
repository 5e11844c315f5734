"""The heap is trimmed now and then in trainings of all weights (NOTE [heap])."""

import ctypes

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.system import heap


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_gradients_of_weights_count(monkeypatch, mode):
    trims = []
    monkeypatch.setattr(heap, "trim", lambda: trims.append(True))
    monkeypatch.setattr(heap, "GRADIENTS_PER_TRIM", 3 * 4 * 33 * 64)
    layer = qk.QuantLinear.from_float(nn.Linear(64, 33), "w8a8", mode=mode)
    counts, trimmer = [], heap.Trimmer()
    for _ in range(7):
        layer(torch.randn(5, 64)).sum().backward()
        assert len(trims) == (counts[-1] if counts else 0)  # the backward itself trims nothing
        trimmer.step(layer.parameters())
        counts.append(len(trims))
    assert counts == [0, 0, 1, 1, 1, 2, 2]
    trimmer.step(layer.requires_grad_(False).parameters())
    assert trimmer.since_trim == 4 * 33 * 64


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_trimming_gives_memory_back():
    process = pytest.importorskip("psutil").Process()
    # 100 KB each: small enough for the heap. With a used one between each two, none is at its end.
    blocks = [torch.ones(25_000) for _ in range(1600)]
    del blocks[::2]
    before = process.memory_info().rss
    heap.trim()
    assert process.memory_info().rss < before - 40e6
