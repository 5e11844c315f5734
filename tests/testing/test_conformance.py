"""`qk.testing.conformance`: sound layers pass, and each deliberately broken one fails the check made for it."""

import copy
import json

import pytest
import torch
from helpers import layer_kinds
from torch import nn

import qkernels as qk
from qkernels.testing import FAILED, OK, SKIPPED, conformance

IN_FEATURES, OUT_FEATURES = 101, 87  # odd, and no multiple of a group


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(IN_FEATURES, OUT_FEATURES, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "mode", "grad"),
    layer_kinds("w8a8", "w8a8-g64-ag32", "w4a8", "w4a8-g32-asym", "w8a16", "w4a16-g32", "w4a8-g32-min"),
)
def test_quant_linear_conforms(scheme, mode, grad, dtype):
    layer = qk.QuantLinear.from_float(linear(dtype), scheme, mode=mode, grad_dtype=grad)
    report = conformance(layer)
    assert report.passed, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_scale", [0.02, 3e-5])
@pytest.mark.parametrize(
    ("scheme", "mode", "grad", "weight_scale"),
    [
        ("w8a8s", "frozen", "float", "absmax"),
        ("w4a8s-g32-asym", "frozen", "int8", "absmax"),
        ("w8a8s", "int8", "float", "absmax"),
        ("w4a8s-g32", "qat", "float", "learned"),
    ],
)
def test_static_activations_conform_in_their_range(scheme, mode, grad, weight_scale, x_scale, dtype):
    options = {"mode": mode, "grad_dtype": grad, "weight_scale": weight_scale, "x_scale": torch.tensor([x_scale])}
    report = conformance(qk.QuantLinear.from_float(linear(dtype), scheme, **options))
    assert report.passed, report
    assert report["saturation"].status == OK


class Static(qk.QuantLinear):
    """A layer of static activations; subclasses break one thing each."""


class WrongRange(Static):
    """The scale that it shows is not the one that it multiplies with."""

    x_scale = property(lambda self: 1.5 * super().x_scale)


class CoarseStatic(Static):
    """Seven steps where there should be 127."""

    def forward(self, x):
        step = 127 * self.x_scale / 7
        return super().forward(x + ((x / step).round() * step - x).detach())


class WrapsAround(Static):
    """What lies outside of the range comes back at its other end, as integers do that are not clamped."""

    def forward(self, x):
        size = 256 * self.x_scale
        return super().forward(x - (size * (x / size).round()).detach())


class Dynamic(Static):
    """Scales each row to the range."""

    def forward(self, x):
        largest = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-9) if x.numel() else 1.0
        factor = 127 * self.x_scale / largest
        return (super().forward(x * factor) - self.bias) / factor + self.bias


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Static, None),
        (WrongRange, "forward"),
        (WrongRange, "dequantized weight"),
        (CoarseStatic, "forward"),
        (WrapsAround, "saturation"),
        (Dynamic, "saturation"),
    ],
)
def test_broken_static_activations_are_flagged(broken, check):
    layer = qk.QuantLinear.from_float(linear(), "w8a8s", x_scale=torch.tensor([0.02])).requires_grad_(False)
    layer.__class__ = broken
    report = conformance(layer)
    assert report.passed if check is None else report[check].status == FAILED, report


def test_the_range_of_another_librarys_static_layer_is_an_argument():
    report = conformance(Clamped(), input_range=127 * 0.03)
    assert report.passed, report
    assert conformance(Clamped()).failed and conformance(Product(), input_range=1.0)["saturation"].status == FAILED
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="input_range must be positive and finite"):
            conformance(Clamped(), input_range=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_linear_conforms(dtype):
    # With an odd K, oneDNN's bfloat16 product on AMX lets a NaN reach the row before it: see "not finite".
    report = conformance(nn.Linear(96, 80, dtype=dtype))
    assert report.passed, report
    assert report["gradient of weight"].status == OK


def test_the_layer_is_left_as_it_was():
    layer = qk.QuantLinear.from_float(linear(), "w8a8").train()
    layer.bias.grad = torch.ones(OUT_FEATURES)
    before, random, threads = copy.deepcopy(layer.state_dict()), torch.get_rng_state(), torch.get_num_threads()
    conformance(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.training and torch.equal(layer.bias.grad, torch.ones(OUT_FEATURES))
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads


def test_report():
    layer = qk.QuantLinear.from_float(nn.Linear(40, 24, bias=False), "w8a8")
    report = conformance(layer, dtype=torch.bfloat16)
    text = str(report)
    assert "scheme=w8a8" in text and "inputs bfloat16" in text
    assert all(check.name in text for check in report.checks)
    assert report["gradient of bias"].status == SKIPPED
    assert 0 < report["forward"].error < report["forward"].bound
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_what_is_no_layer_is_refused():
    for wrong in (nn.ReLU(), torch.zeros(3), lambda x: x):
        with pytest.raises(TypeError, match="layer must be a module with in_features and out_features"):
            conformance(wrong)


class Product(nn.Module):
    """A layer of a library that `conformance` knows nothing about; subclasses break one thing each."""

    in_features, out_features = IN_FEATURES, OUT_FEATURES

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator))
        self.bias = nn.Parameter(torch.randn(OUT_FEATURES, generator=generator))

    def forward(self, x):
        return nn.functional.linear(x, self.w.to(x.dtype), self.bias.to(x.dtype))


def test_an_unknown_layer_conforms():
    report = conformance(Product())
    assert report.passed, report
    assert report["dequantized weight"].status == SKIPPED


class Clamped(Product):
    """Static activations of a library that calls its scale otherwise."""

    def forward(self, x):
        q = (x / 0.03).round().clamp(-127, 127) * 0.03
        return super().forward(x + (q - x).detach())


class WrongGradient(torch.autograd.Function):
    """x @ w.T, and what the subclass makes of its gradient."""

    @staticmethod
    def forward(ctx, x, w, change):
        ctx.save_for_backward(x, w)
        ctx.change = change
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad_out):
        x, w = ctx.saved_tensors
        return ctx.change(grad_out @ w), grad_out.t() @ x, None


def scaled_gradient(grad):
    return 1.01 * grad


def clobbering_gradient(grad):
    return grad + torch.rand(()) * 1e-3


def biased_noise(grad):
    return 1.05 * grad + 0.1 * torch.randn_like(grad)


def unbiased_noise(grad):
    return grad + 0.1 * torch.randn_like(grad)


class Changed(Product):
    change = staticmethod(scaled_gradient)

    def forward(self, x):
        flat = WrongGradient.apply(x.reshape(-1, x.shape[-1]), self.w.to(x.dtype), self.change) + self.bias.to(x.dtype)
        return flat.reshape(*x.shape[:-1], OUT_FEATURES)


class Biased(Changed):
    change = staticmethod(biased_noise)


class Unbiased(Changed):
    change = staticmethod(unbiased_noise)


class WrongWeight(Product):
    def dequantize(self):
        return self.w * 1.001


class Coarse(Product):
    """One scale for the whole batch, 4 bits."""

    def forward(self, x):
        scale = x.detach().abs().max().clamp(min=1e-9) / 7 if x.numel() else 1.0
        return super().forward(x + ((x / scale).round() * scale - x).detach())


class BatchMean(Product):
    def forward(self, x):
        return super().forward(x) + (0.1 * x.mean() if x.numel() else 0)


class Flat(Product):
    """Forgets the leading dimensions, and takes every input for contiguous."""

    def forward(self, x):
        return super().forward(x.as_strided((x.numel() // IN_FEATURES, IN_FEATURES), (IN_FEATURES, 1)))


class AlwaysFloat32(Product):
    def forward(self, x):
        return super().forward(x.to(torch.float32))


class IgnoresAutocast(Product):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class HidesNan(Product):
    def forward(self, x):
        return super().forward(x.nan_to_num())


class NeedsRows(Product):
    def forward(self, x):
        return super().forward(x / x.abs().max().clamp(min=1e-9)) * 1.0 if x.numel() else x.max()


class InPlace(Product):
    def forward(self, x):
        x.data.mul_(1.0 + 1e-6)
        return super().forward(x)


class Noisy(Product):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x) + 1e-6 * (self.calls % 7)


class Frozen(Product):
    def forward(self, x):
        return super().forward(x.detach() + 0 * x) if x.requires_grad else super().forward(x)


class Unsaved(Product):
    """Part of what it computes with is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.w.requires_grad_(False)
        self.register_buffer("scales", torch.full((OUT_FEATURES,), 2.0), persistent=False)

    def load_state_dict(self, state_dict, *args, **kwargs):
        self.scales.fill_(1.0)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def forward(self, x):
        return nn.functional.linear(x, self.w.to(x.dtype)) * self.scales.to(x.dtype) + self.bias.to(x.dtype)


class Shared(Product):
    """A copy that works on the tensors of the original."""

    def __deepcopy__(self, memo):
        other = Product()
        other.w, other.bias = self.w, self.bias
        return other


class EvaluatesDifferently(Product):
    def forward(self, x):
        out = super().forward(x)
        return out if self.training else 1.001 * out


class Wrapped(torch.Tensor):
    """A tensor subclass, as quantized weights of other libraries are."""


class HoldsSubclass(Product):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("extra", torch.zeros(3).as_subclass(Wrapped))


class PrintsInForward(Product):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Changed, "gradient of x"),
        (Biased, "gradient of x"),
        (Biased, "backward twice"),
        (WrongWeight, "dequantized weight"),
        (Coarse, "forward"),
        (Coarse, "batch invariance"),
        (BatchMean, "batch invariance"),
        (Flat, "shapes"),
        (Flat, "strided inputs"),
        (AlwaysFloat32, "dtypes"),
        (IgnoresAutocast, "autocast"),
        (HidesNan, "not finite"),
        (BatchMean, "not finite"),
        (NeedsRows, "empty batch"),
        (InPlace, "inputs kept"),
        (Noisy, "repeatable"),
        (Noisy, "zero row"),
        (Frozen, "gradient of x"),
        (Unsaved, "state dict"),
        (Shared, "deepcopy"),
        (EvaluatesDifferently, "evaluation"),
        (HoldsSubclass, "plain tensors"),
        (PrintsInForward, "compile"),
    ],
)
def test_broken_layers_are_flagged(broken, check):
    report = conformance(broken())
    assert report[check].status == FAILED, report


def test_unbiased_noise_is_told_from_a_bias():
    noisy, biased = (conformance(kind())["gradient of x"] for kind in (Unbiased, Biased))
    assert noisy.status == OK and "stochastic: relative standard deviation 0.01 " in noisy.detail, noisy
    assert biased.error > noisy.bound, biased


def test_an_integer_layer_must_be_equal_bit_for_bit():
    class Reordered(qk.QuantLinear):
        def forward(self, x):
            out = super().forward(x)
            return out if x.dim() < 2 or len(x) < 40 else torch.nextafter(out, out + 1)

    layer = qk.QuantLinear.from_float(linear(), "w8a8").requires_grad_(False)
    layer.__class__ = Reordered
    failed = {check.name for check in conformance(layer).failed}
    assert "batch invariance" in failed, failed
    assert conformance(layer)["batch invariance"].bound == 0
