"""Mode "qat" with learned scales (learned step size, arXiv:1902.08153)."""

import copy
import functools

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk
from qkernels import QuantLinear, QuantScheme
from qkernels.kernels import ops

M, N, K = 24, 33, 130
SCHEMES = ["w8a8", "w8a8-g64", "w4a8", "w4a8-g32", "w4a8-g128-ag32", "w4a16-g32"]
GRAD_DTYPES = ["float", "int8"]


def layer_of(scheme: str, grad_dtype: str = "float", spread: float = 0.0, dtype=torch.float32) -> QuantLinear:
    """A layer whose scales are those of the weight's range, times exp(spread * noise), so that some values clamp."""
    torch.manual_seed(3)
    linear = nn.Linear(K, N, dtype=dtype)
    layer = QuantLinear.from_float(linear, scheme, mode="qat", grad_dtype=grad_dtype, weight_scale="learned")
    with torch.no_grad():
        layer.scales *= torch.exp(spread * torch.randn_like(layer.scales))
    return layer


def per_column(values: torch.Tensor, scheme: str) -> torch.Tensor:
    """[N, groups] -> [N, K]."""
    return values.repeat_interleave(QuantScheme.parse(scheme).group_size or K, dim=1)[:, :K]


def straight_through(weight, scales, rest, low, high):
    """The dequantized weight, where what rounding adds, `rest`, is a constant: its derivative is the one asked for.

    Values are clamped where they would be rounded to more than `high` or less than `low`.
    """
    return scales * (rest + (weight / scales).clamp(low - 0.5, high + 0.5))


def exact_gradients(layer: QuantLinear, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, by autograd: of the weight and of the scales, for a gradient [N, K] of the dequantized weight."""
    scheme = layer.scheme.name
    weight, scales = (tensor.detach().double().requires_grad_() for tensor in (layer.weight, layer.scales))
    low, high = layer.scheme.weight_format.least, layer.scheme.weight_format.greatest
    columns = per_column(scales, scheme)
    quotient = (weight / columns).detach()
    rest = quotient.round().clamp(low, high) - quotient.clamp(low - 0.5, high + 0.5)
    straight_through(weight, columns, rest, low, high).backward(grad.double())
    counts = per_column(torch.ones_like(scales), scheme).new_zeros(scales.shape)
    counts.scatter_add_(1, per_column(torch.arange(scales.shape[1]).expand(N, -1), scheme), torch.ones(N, K).double())
    return weight.grad, scales.grad / (counts * high).sqrt()


def test_reference_passes_gradcheck():
    torch.manual_seed(0)
    weight = torch.tensor([[-3.3, -0.4, 0.2, 1.7, 5.1]]).double().requires_grad_()
    scales = torch.tensor([[0.5]]).double().requires_grad_()
    rest = torch.tensor([[0.0, -0.2, 0.6, 0.4, 0.0]]).double()
    assert torch.autograd.gradcheck(functools.partial(straight_through, rest=rest, low=-6, high=5), (weight, scales))


@pytest.mark.parametrize("spread", [0.0, 0.7])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_float64_reference(scheme, spread):
    layer, grad = layer_of(scheme, spread=spread), torch.randn(N, K)
    got_weight, got_scales = ops.scale_gradient(grad, layer.weight.detach(), layer.scales.detach(), scheme)
    exact_weight, exact_scales = exact_gradients(layer, grad)
    # A quotient within its rounding error of a half may be rounded to either side; its group is left out.
    quotient = layer.weight.detach().double() / per_column(layer.scales.detach().double(), scheme)
    tie = (quotient - quotient.floor() - 0.5).abs() < 1e-4
    torch.testing.assert_close(got_weight.double()[~tie], exact_weight[~tie], rtol=0, atol=0)
    groups = per_column(torch.arange(got_scales.shape[1]).expand(N, -1), scheme)
    clear = torch.zeros_like(got_scales).scatter_add(1, groups, tie.float()) == 0
    assert clear.double().mean() > 0.8
    scale = exact_scales.abs().max()
    torch.testing.assert_close(got_scales.double()[clear], exact_scales[clear], rtol=1e-4, atol=1e-4 * scale)
    if spread:
        assert (got_weight == 0).any()


@pytest.mark.parametrize("grad", GRAD_DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layer_hands_its_gradient_to_both(scheme, grad):
    """The gradient of the weight, before clamping is taken into account, is that of the frozen scales' layer."""
    layer, x, grad_out = layer_of(scheme, grad, spread=0.7), torch.randn(M, K), torch.randn(M, N)
    torch.manual_seed(7)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(grad_out)
    if grad == "float":
        x64 = x.double()
        if layer.scheme.int_activations:
            _, qx, scales = ops.linear_with_saved_input(x, *layer.quantized_weight(), None, scheme)
            x64 = qx.double() * scales.double()[:, None]
        whole = (grad_out.double().t() @ x64).float()
        masked, of_scales = ops.scale_gradient(whole, layer.weight.detach(), layer.scales.detach(), scheme)
        torch.testing.assert_close(layer.weight.grad, masked, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.scales.grad, of_scales, rtol=1e-3, atol=1e-3)
    assert layer.scales.grad.shape == layer.scales.shape and layer.scales.grad.isfinite().all()
    assert leaf.grad.isfinite().all()
    for wants_weight, wants_scales in ((True, False), (False, True), (False, False)):
        layer.zero_grad()
        layer.weight.requires_grad_(wants_weight)
        layer.scales.requires_grad_(wants_scales)
        layer(x).sum().backward()
        assert [t.grad is not None for t in (layer.weight, layer.scales)] == [wants_weight, wants_scales]


@pytest.mark.parametrize("grad", GRAD_DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_moves_the_scales_and_freezing_keeps_the_outputs(scheme, grad):
    layer = layer_of(scheme, grad)
    start = layer.scales.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    x = torch.randn(128, K)
    target = nn.Linear(K, N)(x).detach()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (layer(x) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(layer.scales.detach(), start)
    out, learned = layer(x).detach(), layer.scales.detach().clone()
    twin = copy.deepcopy(layer)
    assert_same_bits(layer.freeze_()(x).detach(), out)
    assert layer.mode == "frozen" and not layer.scales.requires_grad
    assert_same_bits(layer.scales.detach(), learned)
    restored = QuantLinear(K, N, True, scheme, mode="qat", weight_scale="learned")
    restored.load_state_dict(twin.state_dict())
    assert_same_bits(restored(x).detach(), out)


def test_scales_begin_with_those_of_the_range():
    for scheme in SCHEMES:
        layer = layer_of(scheme)
        assert_same_bits(layer.scales.detach(), ops.quantize_weight(layer.weight.detach(), scheme)[1])
        fresh = QuantLinear(K, N, True, scheme, mode="qat", weight_scale="learned")
        assert_same_bits(fresh.scales.detach(), ops.quantize_weight(fresh.weight.detach(), scheme)[1])


def test_state_and_casts():
    layer = layer_of("w4a8-g32", dtype=torch.float32)
    assert list(layer.state_dict()) == ["scales", "weight", "bias"]
    assert layer.storage_bytes() == 4 * N * K + 4 * layer.scales.numel()
    assert "weight_scale=learned" in repr(layer)
    layer(torch.randn(2, K)).sum().backward()
    before = layer.scales.detach().clone()
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer.scales.dtype == torch.float32
    assert_same_bits(layer.scales.detach(), before)
    layer(torch.randn(2, K).bfloat16()).sum().backward()
    assert layer.scales.grad.dtype == torch.float32 and layer.weight.grad.dtype == torch.bfloat16


def test_two_runs_are_bit_identical_whatever_the_threads():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        layer = layer_of("w4a8-g32", "int8", spread=0.3)
        torch.manual_seed(1)
        layer(torch.randn(M, K)).backward(torch.randn(M, N))
        results.append((layer.weight.grad, layer.scales.grad))
    for one, two in zip(*results, strict=True):
        assert_same_bits(two, one)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scheme": "w8a8", "mode": "frozen"},
        {"scheme": "w8a8", "mode": "int8"},
        {"scheme": "w4a8-asym", "mode": "qat"},
        {"scheme": "w8a8", "mode": "qat", "weight_scale": "lsq"},
    ],
)
def test_what_does_not_exist_is_refused(arguments):
    arguments = {"weight_scale": "learned", **arguments}
    with pytest.raises(ValueError, match="weight_scale"):
        QuantLinear(K, N, **arguments)
    model = nn.Sequential(nn.Linear(K, N))
    scheme = arguments.pop("scheme")
    with pytest.raises(ValueError, match="weight_scale"):
        qk.quantize_(model, scheme, **arguments)
    assert type(model[0]) is nn.Linear


def test_quantize_passes_it_on():
    model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, N))
    report = qk.quantize_(model, "w4a8-g32", "qat", grad_dtype="int8", weight_scale="learned")
    assert report.weight_scale == "learned"
    assert all(layer.weight_scale == "learned" for layer in model if isinstance(layer, QuantLinear))
    x = torch.randn(5, K)
    out = model(x).detach()
    qk.freeze_(model)
    assert_same_bits(model(x).detach(), out)


def test_transformers_folder_keeps_learned_scales(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    qk.quantize_(model, "w4a8-g32", "qat", weight_scale="learned")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, QuantLinear):
                layer.scales *= 1.25
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert again.config.quantization_config.weight_scale == "learned"
    ids = torch.arange(12)[None]
    assert_same_bits(again(ids).logits.detach(), model(ids).logits.detach())


@pytest.mark.parametrize("grad_x", [True, False])
def test_a_learned_scale_of_activations_follows_autograd(grad_x):
    """Against a fake quantization of the activations in float64, times 1 / sqrt(K * 127)."""
    torch.manual_seed(5)
    x_scale, grad_out = torch.tensor([0.011]), torch.randn(M, N)
    options = {"mode": "qat", "weight_scale": "learned", "x_scale": x_scale}
    layer = QuantLinear.from_float(nn.Linear(K, N), "w8a8s", **options)
    x = torch.randn(M, K, requires_grad=grad_x)
    layer(x).backward(grad_out)
    values, scale = x.detach().double().requires_grad_(), x_scale.double().requires_grad_()
    quotient = (values / scale).detach()
    rest = quotient.round().clamp(-127, 127) - quotient.clamp(-127.5, 127.5)
    clamped = (quotient.round().abs() > 127).float().mean()
    assert 0.05 < clamped < 0.5
    (straight_through(values, scale, rest, -127, 127) @ layer.dequantize().double().t()).backward(grad_out.double())
    expected = scale.grad / (K * 127) ** 0.5
    assert layer.x_scale.grad.item() == pytest.approx(expected.item(), rel=1e-4)
    if grad_x:
        torch.testing.assert_close(x.grad.double(), values.grad, rtol=1e-4, atol=1e-5)
        assert not x.grad[quotient.round().abs() > 127].any()


def test_a_fixed_scale_of_activations_passes_gradients_through_the_clamp():
    torch.manual_seed(6)
    layer = QuantLinear.from_float(nn.Linear(K, N), "w8a8s", mode="qat", x_scale=torch.tensor([0.001]))
    x = torch.randn(M, K, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.ones(M, N) @ layer.dequantize()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    assert not layer.x_scale.requires_grad and layer.weight.grad.any()


def test_a_learned_scale_of_activations_can_be_held():
    options = {"mode": "qat", "weight_scale": "learned", "x_scale": torch.tensor([0.01])}
    layer = QuantLinear.from_float(nn.Linear(K, N), "w8a8s", **options)
    layer.x_scale.requires_grad_(False)
    layer(torch.randn(M, K)).sum().backward()
    assert layer.x_scale.grad is None and layer.scales.grad.any()
