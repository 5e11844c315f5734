"""Whole training runs: same seed, data and thread count give the same bits, and the loss falls as in float."""

import op_samples
import pytest
import torch
from helpers import assert_same_bits, layer_kinds
from op_samples import OP_SCHEMES, SAMPLERS
from torch import nn

import qkernels as qk

STEPS = 12
# One of each class: per row, groups on both sides, 4 bits in groups with zero points, float activations.
SCHEMES = ["w8a8", "w8a8-g64-ag32", "w4a8-g32-asym", "w4a16-g32"]


class Tiny(nn.Module):
    """Two residual blocks over an embedding, with a head: the operations of a language model, in little."""

    def __init__(self, width: int = 48, vocabulary: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(3 * width, width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.embedding(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(norm(x))))
        return self.head(x)


def run(scheme: str | None, mode: str, grad_dtype: str, seed: int = 0):
    """Losses of a run that learns a permutation of the tokens, and the state it ends with; scheme None: in float."""
    torch.manual_seed(seed)
    model = Tiny()
    if scheme is not None:
        qk.quantize_(model, scheme, mode, grad_dtype=grad_dtype, skip=["head"])
    elif mode == "frozen":
        for layer in (*model.up, *model.down):
            layer.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    target = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(64, (4, 16))
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), target[ids].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), model.state_dict()


@pytest.mark.parametrize(("scheme", "mode", "grad"), layer_kinds(*SCHEMES))
def test_two_runs_are_bit_identical(scheme, mode, grad):
    (losses, state), (losses_again, state_again) = (run(scheme, mode, grad) for _ in range(2))
    assert_same_bits(losses_again, losses, f"losses of {scheme} {mode} {grad}")
    for name, tensor in state.items():
        assert_same_bits(state_again[name], tensor, f"{name} of {scheme} {mode} {grad}")
    assert not torch.equal(run(scheme, mode, grad, seed=1)[0], losses)


@pytest.mark.parametrize(("scheme", "mode", "grad"), layer_kinds("w8a8", "w4a8-g32-asym"))
def test_the_loss_falls_as_in_float(scheme, mode, grad):
    expected, losses = run(None, mode, grad)[0], run(scheme, mode, grad)[0]
    fallen = (expected[0] - expected[-1]).item()
    assert fallen > 0.5
    assert (losses[0] - losses[-1]).item() == pytest.approx(fallen, rel=0.2)


@pytest.mark.parametrize("op", sorted(SAMPLERS.keys() - {"grouped_outer"}))
def test_ops_do_not_depend_on_the_number_of_threads(op):
    """Every op, outputs and gradients alike: products of floats too, each sum being one thread's.

    `grouped_outer` is a product of torch's, which may depend on them.
    """
    for scheme in OP_SCHEMES[op]:
        for args, label in op_samples.samples(op, scheme, 3):
            results = []
            for threads in (1, 2, 4, 16):
                torch.set_num_threads(threads)
                results.append(op_samples.results(op, args))
            for one, *others in zip(*results, strict=True):
                for other in others:
                    assert_same_bits(other, one, label)
