"""Head and loss, forward and backward to the hidden states, beside torch; run as test_linear.py is.

`--benchmark-disable` only verifies: loss and gradient against float32 cross entropy of the same quantized head.
"""

import pytest
import torch
from torch.nn import functional

import qkernels as qk

TOKENS, FEATURES, CLASSES = 512, 640, 262144  # Gemma-3-270M
SCHEMES = ["w8a8", "w8a8-ag128", "w4a8-g128"]


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(CLASSES, FEATURES).mul_(0.03).bfloat16()


def quantized(weight: torch.Tensor, scheme: str) -> qk.QuantLinear:
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return qk.QuantLinear.from_float(linear, scheme)


@pytest.mark.parametrize("name", ["linear + cross_entropy", "F.linear_cross_entropy", *SCHEMES])
def test_head_and_loss(benchmark, weight, name):
    hidden = torch.randn(TOKENS, FEATURES).bfloat16().requires_grad_()
    target = torch.randint(0, CLASSES, (TOKENS,))
    if name in SCHEMES:
        head = quantized(weight, name)
        verify(head, hidden[:32].detach(), target[:32])

    def step() -> None:
        hidden.grad = None
        if name in SCHEMES:
            loss = qk.linear_cross_entropy(hidden, head, target)
        elif name == "F.linear_cross_entropy":
            loss = functional.linear_cross_entropy(hidden, weight, target)
        else:
            loss = functional.cross_entropy(functional.linear(hidden, weight).float(), target)
        loss.backward()

    benchmark.group = f"head and loss {TOKENS}x{FEATURES}x{CLASSES}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def verify(head: qk.QuantLinear, hidden: torch.Tensor, target: torch.Tensor) -> None:
    results = []
    for fused in (True, False):
        x = hidden.float().requires_grad_()
        loss = qk.linear_cross_entropy(x, head, target) if fused else functional.cross_entropy(head(x), target)
        loss.backward()
        results.append((loss, x.grad))
    (loss, grad), (expected, exact) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert (grad - exact).norm() < 0.03 * exact.norm()
