"""`LazyLogits`: whatever is done to them, values and gradients are those of the head's own logits."""

import copy
import warnings

import pytest
import torch
from helpers import assert_same_bits
from torch import nn
from torch.nn import functional as F

import qkernels as qk
from qkernels.integrations.lazy_logits import LazyLogits

N, K = 64, 24
IDS = torch.randint(0, N, (2, 12), generator=torch.Generator().manual_seed(1))
FLAT = IDS.flatten()


class Square(torch.autograd.Function):
    """Sees the tensor itself, not its operations."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x / x.numel()


def loss_of(logits, ids=FLAT, **options):
    return F.cross_entropy(logits.flatten(0, -2), ids, **options)


def write(change):
    """A cross entropy after a write."""

    def use(logits):
        change(logits)
        return loss_of(logits)

    return use


def set_columns(logits):
    logits[:, :, 3:5] = -10.0


def set_transposed(logits):
    logits.transpose(1, 2)[:, 3] = 5.0


FUSED = {
    "all": loss_of,
    "shifted": lambda y: loss_of(y[..., :-1, :].contiguous(), IDS[:, 1:].flatten()),
    "mask": lambda y: loss_of(y[IDS > 20], IDS[IDS > 20]),
    "token": lambda y: F.cross_entropy(y[0, 3], IDS[0, 3]),
    "tokens": lambda y: loss_of(y[torch.tensor([1, 0]), 2:4], IDS[[1, 0], 2:4].flatten()),
    "new dimension": lambda y: loss_of(y[None].squeeze(0).unsqueeze(1)),
    "view": lambda y: F.cross_entropy(y.view(-1, y.size(-1)), FLAT),
    "weight": lambda y: loss_of(y, weight=torch.linspace(0, 1, N)),
    "smoothing": lambda y: loss_of(y, label_smoothing=0.1, reduction="sum"),
    "ignored": lambda y: loss_of(y, ignore_index=int(FLAT[0])),
    "each": lambda y: loss_of(y, reduction="none").square().mean(),
    "module": lambda y: nn.CrossEntropyLoss()(y.view(-1, N), FLAT),
    "scaled": lambda y: loss_of(y * 3.3 / 1.7),
    "negative": lambda y: loss_of(-2.0 * y),
    "capped": lambda y: loss_of(torch.tanh(y / 3) * 3),
    "capped otherwise": lambda y: loss_of(torch.tanh(y * 7) * 3),
    "biased": lambda y: loss_of(y + torch.linspace(-3, 3, N)),
    "biased, then scaled and capped": lambda y: loss_of(((y * 2 + torch.linspace(-3, 3, N)) / 5).tanh() * 4),
    "cast": lambda y: loss_of(y.float().to(torch.float32)),
    "checkpoint": lambda y: torch.utils.checkpoint.checkpoint(loss_of, y, use_reentrant=False),
    "and another": lambda y: loss_of(y) + y.softmax(-1).square().sum(),
}
MADE = {
    "a Function": Square.apply,
    "classes in dimension 1": lambda y: F.cross_entropy(y.transpose(1, 2), IDS),
    "log_softmax": lambda y: F.nll_loss(y.log_softmax(-1).flatten(0, 1), FLAT),
    "probabilities": lambda y: loss_of(y, F.one_hot(FLAT, N).float()),
    "a list": lambda y: loss_of(y[[0, 1]]),
    "some classes": lambda y: F.cross_entropy(y[..., :60].flatten(0, 1), FLAT.clamp(max=59)),
    "a class": lambda y: y[..., 3].sum(),
    "reshaped across classes": lambda y: y.view(2, 12, 8, 8).amax(-1).sum(),
    "difference": lambda y: loss_of(y - torch.linspace(-3, 3, N)),
    "tanh twice": lambda y: loss_of(y.tanh().tanh()),
    "tensor times": lambda y: loss_of(y * torch.linspace(0.5, 1, N)),
    "split": lambda y: loss_of(y.split(6, 1)[1], IDS[:, 6:].flatten()),
    "concatenated": lambda y: loss_of(torch.cat([y, y]), torch.cat([FLAT, FLAT])),
    "float64": lambda y: loss_of(y.double()),
    "multiplied in place": write(lambda y: y.mul_(2)),
    "divided in place": write(lambda y: y.__itruediv__(2)),
    "columns set": write(set_columns),
    "set through a view": write(set_transposed),
    "set through .data": write(lambda y: y.data.mul_(2)),
    "set through detach": write(lambda y: y.detach().mul_(2)),
}


class Model(nn.Module):
    """A body and a head that `patch_loss` finds."""

    def __init__(self, bias: bool, quantized: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(N, K), nn.Linear(K, N, bias=bias)
        if quantized:
            self.head = qk.QuantLinear.from_float(self.head, "w8a8")

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.embed(ids))


def step(model, use):
    model.zero_grad()
    logits = model(IDS)
    loss = use(logits)
    loss.backward()
    return logits, loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*FUSED, *MADE])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_any_use(name, quantized, bias):
    model = Model(bias, quantized)
    use = {**FUSED, **MADE}[name]
    _, expected, grads = step(model, use)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in MADE or name == "and another" else "error")
        with qk.patch_loss(model):
            logits, loss, patched = step(model, use)
    assert isinstance(logits, LazyLogits) and logits.call.fused == (name in FUSED)
    torch.testing.assert_close(loss, expected, rtol=1e-4 if quantized else 1e-5, atol=1e-5)
    assert patched.keys() == grads.keys()
    for key, grad in grads.items():
        assert (patched[key] - grad).norm() <= (0.03 if quantized and name in FUSED else 1e-5) * grad.norm(), key


def test_no_write_is_lost():
    model = Model(False, False)
    with qk.patch_loss(model):
        logits = model(IDS)
        part = logits[:, :-1]
        for tensor in (logits, part):
            with pytest.raises(RuntimeError, match="cannot write into the logits of a head patched by patch_loss"):
                tensor.mul_(2)


def test_logits_can_be_looked_at():
    model = Model(True, True)
    expected = model(IDS)
    with qk.patch_loss(model):
        logits = model(IDS)
        assert logits.shape == (2, 12, N) and logits.dtype == torch.float32 and logits.requires_grad
        assert len(logits) == 2 and logits.size(-1) == N and logits.grad_fn is not None
        for detached in (logits.detach(), logits.data, logits.clone().detach(), copy.deepcopy(logits.detach())):
            assert_same_bits(detached, expected.detach())
        assert logits.detach().numpy().tolist() == logits.tolist() == expected.tolist()
        assert logits[0, 0, 0].item() == expected[0, 0, 0].item()
        assert "LazyLogits" in repr(logits)
        with torch.no_grad():
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
            assert type(model(IDS)) is torch.Tensor
        assert_same_bits(logits.view(torch.int32), expected.detach().view(torch.int32))


def test_a_gradient_through_made_logits_is_told_once():
    model = Model(False, False)
    with qk.patch_loss(model, z_loss=0.1), pytest.warns(UserWarning, match="made in full .* are not in it") as caught:
        for _ in range(2):
            model(IDS).square().sum().backward()
    assert len(caught) == 1
    with qk.patch_loss(model, z_loss=0.1), pytest.raises(ValueError, match="need a cross entropy of class indices"):
        loss_of(model(IDS), F.one_hot(FLAT, N).float())


@pytest.mark.parametrize("quantized", [False, True])
def test_autocast_of_the_head_holds_for_the_loss(quantized):
    """Also where the loss is computed, and its gradient, outside of it."""
    model = Model(False, quantized)

    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(IDS)
        loss = loss_of(logits.float())
        (loss + logits.float().square().mean()).backward()
        return logits, loss.detach(), model.embed.weight.grad.clone()

    logits, loss, grad = run()
    with qk.patch_loss(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy, fused, patched = run()
    assert lazy.dtype == logits.dtype == torch.bfloat16
    assert_same_bits(lazy, logits)
    torch.testing.assert_close(fused, loss, rtol=1e-2, atol=1e-2)
    assert (patched - grad).norm() <= 0.03 * grad.norm()
