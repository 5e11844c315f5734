"""Gradients from integers, training of the weight, and what is saved for it."""

import copy
import functools

import op_samples
import pytest
import reference_ops
import torch
from helpers import assert_same_bits, assert_within_float_bound, gamma
from torch import nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels import QuantLinear, QuantScheme
from qkernels.autograd.frozen import quant_linear
from qkernels.autograd.int8_gradients import LinearWeight, int8_input_gradient, int8_weight_gradient
from qkernels.autograd.int8_weight import Int8Weight
from qkernels.autograd.trained import trained_linear
from qkernels.formats.storage import QuantizedWeight
from qkernels.kernels import ops

M, N, K = 24, 33, 130
# One of each class: weight bits x grouping x activations.
FROZEN = ["w8a8", "w8a16", "w8a8-g32", "w8a8-ag32", "w4a8", "w4a8-asym", "w4a8-g32-asym", "w4a16-g64", "w4a8-g64-ag32"]
QAT = FROZEN
FROZEN = [*QAT, "w8a8-min", "w4a8-g32-min"]
INT8 = ["w8a8", "w8a16", "w8a8-ag64"]


def float_layer(bias: bool = True, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(K, N, bias, dtype=dtype)


def layer_of(scheme: str, mode: str, grad_dtype: str = "float", dtype=torch.float32) -> QuantLinear:
    return QuantLinear.from_float(float_layer(dtype=dtype), scheme, mode=mode, grad_dtype=grad_dtype)


def layers(grad_dtype: str) -> list:
    """(scheme, mode) of layers that train a weight."""
    pairs = [(scheme, "qat") for scheme in QAT] + [(scheme, "int8") for scheme in INT8]
    return [pytest.param(*pair, grad_dtype, id="-".join((*pair, grad_dtype))) for pair in pairs]


TRAINED = layers("float") + layers("int8")


def multiplied_x(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """float64 [M, K]: x as the gradient of the weight reads it."""
    if not layer.scheme.int_activations:
        return x.detach().double()
    _, qx, scales = reference_ops.linear_with_saved_input(
        x.detach(), *layer.quantized_weight(), None, layer.scheme.name
    )
    return qx.double() * scales.double()[:, None]


def clip_mask(layer: QuantLinear) -> torch.Tensor:
    if layer.mode != "qat" or layer.scheme.weight_bits == 8:
        return torch.ones(N, K)
    return reference_ops.mask_clipped(torch.ones(N, K), layer.weight.detach(), layer.scheme.name)


def gradients(layer: QuantLinear, x: torch.Tensor, grad_out: torch.Tensor) -> list[torch.Tensor | None]:
    """Of x, the weight and the bias; a forward draws its seed from the default generator."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    layer(x).backward(grad_out)
    return [x.grad, layer.weight.grad, layer.bias.grad]


# The float64 references: with rounding taken out, what is left is differentiable, and its derivative is the
# straight-through gradient.


def exact_linear(x, weight, bias):
    return x @ weight.t() + bias


def exact_clamped_linear(x, weight, bias, low, high):
    return x @ torch.minimum(torch.maximum(weight, low), high).t() + bias


def test_references_pass_gradcheck():
    draw = op_samples.Draw("gradcheck")
    x, weight, bias = (draw.floats(*shape).double().requires_grad_() for shape in ((4, 5), (3, 5), (3,)))
    assert torch.autograd.gradcheck(exact_linear, (x, weight, bias))
    low, high = torch.full((3, 1), -0.6).double(), torch.full((3, 1), 0.7).double()
    assert ((weight < low) | (weight > high)).any() and (
        ((weight - low).abs() > 1e-3) & ((weight - high).abs() > 1e-3)
    ).all()
    assert torch.autograd.gradcheck(functools.partial(exact_clamped_linear, low=low, high=high), (x, weight, bias))


@pytest.mark.parametrize(("scheme", "mode", "grad"), TRAINED)
def test_outputs_are_those_of_the_frozen_layer(scheme, mode, grad):
    layer, frozen = layer_of(scheme, mode, grad), layer_of(scheme, "frozen")
    for rows in (0, 1, 5, 70):
        x = torch.randn(rows, K)
        expected = frozen(x)
        assert_same_bits(layer(x), expected)
        assert_same_bits(layer(x.requires_grad_()), expected)
        with torch.no_grad():
            assert_same_bits(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", QAT)
def test_float_gradients_against_the_float64_reference(scheme, dtype):
    """Autograd through the reference gives each gradient; the kernels' sums of floats are bounded."""
    layer = layer_of(scheme, "qat", dtype=dtype)
    x, grad_out = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    got_x, got_weight, got_bias = gradients(layer, x, grad_out)
    x64 = multiplied_x(layer, x).requires_grad_()
    weight64 = layer.dequantize().double().requires_grad_()
    exact_linear(x64, weight64, torch.zeros(N).double()).backward(grad_out.double())
    assert_within_float_bound(got_x, grad_out, layer.dequantize().double().t(), label=scheme, gradient=True)
    mask = clip_mask(layer)
    assert_same_bits(got_weight, torch.where(mask == 0, 0.0, got_weight))
    # Where nothing is clipped: the sum of M products, each factor of x rounded once more.
    expected, magnitude = weight64.grad, grad_out.double().abs().t() @ x64.detach().abs()
    roundoff = 2.0**-7 if dtype == torch.bfloat16 else 0.0
    bound = (gamma(M + 4) + roundoff) * magnitude + roundoff * expected.abs() + 1e-30
    assert (((got_weight.double() - expected).abs() <= bound) | (mask == 0)).all()
    assert got_weight.dtype == dtype and got_bias.dtype == dtype


@pytest.mark.parametrize(("scheme", "mode", "grad"), layers("int8"))
def test_int8_gradients_are_within_a_step_of_each_rounding(scheme, mode, grad):
    """A value of the gradient is rounded by less than a step, its scale: the bound is what steps can add up to."""
    layer, x, grad_out = layer_of(scheme, mode, grad), torch.randn(M, K), torch.randn(M, N)
    weight, x64 = layer.dequantize().double(), multiplied_x(layer, x)
    got_x, got_weight, _ = gradients(layer, x, grad_out)
    integers, scales, zeros = layer.quantized_weight()
    name = layer.scheme.name
    if layer.scheme.group_size is None:
        folded = grad_out.double() * scales.double().flatten()
        read = weight / scales.double()
        steps, requantized = folded.abs().amax(1, keepdim=True) / 127, 0.0
    else:
        columns = ops.column_scales(integers, scales, zeros, K, name).double()
        folded, read = grad_out.double(), weight
        steps = folded.abs().amax(1, keepdim=True) / 127
        # The weight is rounded to half a step of its column as well, of which the gradient sees each element.
        requantized = 0.5 * columns * (folded.abs().sum(1, keepdim=True) + N * steps)
    slack = 1 + 1e-5
    bound = steps * read.abs().sum(0) + requantized
    assert ((got_x.double() - grad_out.double() @ weight).abs() <= slack * bound).all()
    assert not torch.equal(got_x, layer_grad_float(layer, grad_out))

    exact = grad_out.double().t() @ x64
    if not layer.scheme.int_activations:
        bound = gamma(M + 4) * (grad_out.double().abs().t() @ x64.abs())
    else:
        _, qx, x_scales = reference_ops.linear_with_saved_input(x, integers, scales, zeros, None, name)
        steps = (grad_out.double() * x_scales.double()[:, None]).abs().amax(0) / 127
        bound = steps[:, None] * qx.double().abs().sum(0)
    mask = clip_mask(layer)
    assert (((got_weight.double() - exact).abs() <= slack * bound) | (mask == 0)).all()
    assert (got_weight[mask == 0] == 0).all()


def layer_grad_float(layer: QuantLinear, grad_out: torch.Tensor) -> torch.Tensor:
    return ops.linear_grad_input(grad_out, *layer.quantized_weight(), K, layer.scheme.name)


def assert_unbiased(sample, exact: torch.Tensor, seeds: int = 1024) -> None:
    """The mean of `sample(seed)` comes as close to `exact` as the variance says, for many seeds and for few."""
    drawn = torch.stack([sample(torch.tensor(seed)).double() for seed in range(seeds)])
    variance = drawn.var(dim=0)
    random = variance > 1e-4 * variance.mean()  # a value that is always rounded alike has none
    assert random.double().mean() > 0.5
    for count in (16, seeds):
        mean = drawn[:count].mean(dim=0)
        # Squared standard scores have mean 1; elements share roundings, so their mean spreads a little.
        scores = ((mean - exact) ** 2 / (variance / count))[random]
        assert 0.8 < scores.mean() < 1.25, (count, scores.mean())
        assert scores.max() < 36
    assert ((drawn.mean(dim=0) - exact).abs()[~random] <= 1e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8-asym", "w8a8-g32", "w4a8-g32-asym"])
def test_int8_gradient_of_x_is_unbiased(scheme):
    """For the weight as it is multiplied: under groups that is the requantized one."""
    weight = layer_of(scheme, "frozen").quantized_weight()
    grad_out = torch.randn(M, N)
    multiplied, exact = LinearWeight(weight, K, scheme), reference_ops.dequantize_weight(*weight, K, scheme).double()
    if QuantScheme.parse(scheme).group_size is not None:
        multiplied = multiplied._replace(column_scales=ops.column_scales(*weight, K, scheme))
        eye, ones = torch.eye(N, dtype=torch.int8), torch.ones(N)
        exact = ops.int_grad_input(eye, ones, *weight, *multiplied[1:]).double()
    assert_unbiased(
        lambda seed: int8_input_gradient(grad_out, multiplied, seed, torch.float32), grad_out.double() @ exact
    )


def test_int8_gradient_of_the_weight_is_unbiased():
    grad_out = torch.randn(M, N)
    qx, x_scales = ops.quantize_activation(torch.randn(M, K) * torch.exp2(torch.randn(M, 1)), "w8a8")
    x_scales = x_scales.flatten()
    exact = grad_out.double().t() @ (qx.double() * x_scales.double()[:, None])
    assert_unbiased(lambda seed: int8_weight_gradient(grad_out, qx, x_scales, seed, torch.float32), exact)


def test_streams_and_seeds_are_independent():
    x = torch.randn(64, 64)
    draws = [
        ops.quantize_rows_stochastic(x, None, torch.tensor(seed), rng_stream)[0]
        for seed in (1, 2)
        for rng_stream in (0, 1, 2)
    ]
    scaled = x * (127 / x.abs().amax(1, keepdim=True))
    errors = torch.stack([draw.float() - scaled for draw in draws]).flatten(1)
    correlation = torch.corrcoef(errors) - torch.eye(len(draws))
    # Without a common part the correlation of 4096 values is 1 / 64 in size. That of the fractions is not removed.
    assert correlation.abs().max() < 6 / 64


@pytest.mark.parametrize("depth", [65536, 65537, 140000])
def test_long_sums_are_added_block_by_block(depth):
    draw = op_samples.Draw(f"depth {depth}")
    grad_out, qx = draw.floats(depth, 3), torch.randint(-127, 128, (depth, 5), dtype=torch.int8)
    x_scales, seed = draw.floats(depth).abs() + 0.1, torch.tensor(11)
    got = int8_weight_gradient(grad_out, qx, x_scales, seed, torch.float32)
    q, scales = reference_ops.quantize_columns_stochastic(grad_out, x_scales, seed, 1)
    total = torch.zeros(3, 5)
    for start in range(0, depth, 65536):
        block = slice(start, start + 65536)
        total = total + (q[:, block].double() @ qx[block].double()).float()
    assert_same_bits(got, total * scales[:, None])


@pytest.mark.parametrize(("scheme", "mode", "grad"), TRAINED)
def test_only_asked_gradients_exist(scheme, mode, grad):
    layer = layer_of(scheme, mode, grad)
    for wants_x, wants_weight, wants_bias in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)):
        layer.zero_grad()
        x = torch.randn(6, K, requires_grad=bool(wants_x))
        layer.weight.requires_grad_(bool(wants_weight))
        layer.bias.requires_grad_(bool(wants_bias))
        layer(x).sum().backward()
        assert [t.grad is not None for t in (x, layer.weight, layer.bias)] == [
            *map(bool, (wants_x, wants_weight, wants_bias))
        ]


def saved_bytes(layer: QuantLinear, x: torch.Tensor) -> tuple[int, int]:
    """Bytes saved by a forward beyond the layer's own tensors: for the gradient of x, and of the weight."""
    stored = () if layer.mode == "qat" else layer.quantized_weight()
    own = {t.data_ptr() for t in (*stored, *layer.buffers(), layer.bias) if t is not None}
    if layer.mode == "qat":
        own.add(layer.weight.data_ptr())

    def measure(wants_x: bool) -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(x.detach().requires_grad_(wants_x))
        return sum(t.nbytes for t in saved if t.data_ptr() not in own and t.dim() > 0)

    whole = measure(True)
    without = measure(False)
    return whole - without, without


@pytest.mark.parametrize("grad", ["float", "int8"])
def test_saved_bytes_are_those_of_the_table(grad):
    """docs/gradients.md."""
    for scheme in FROZEN:
        x = torch.randn(M, K)
        parsed = QuantScheme.parse(scheme)
        assert saved_bytes(layer_of(scheme, "frozen", grad), x) == (0, 0)
        if parsed.has_min:
            continue
        activation = M * K + 4 * M if parsed.int_activations else 4 * M * K
        layer = layer_of(scheme, "qat", grad)
        assert saved_bytes(layer, x) == (layer_of(scheme, "frozen").storage_bytes(), activation)
    for scheme in INT8:
        activation = M * K + 4 * M if QuantScheme.parse(scheme).int_activations else 4 * M * K
        assert saved_bytes(layer_of(scheme, "int8", grad), x) == (0, activation)


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_seed_comes_from_the_default_generator(mode):
    layer, x, grad_out = layer_of("w8a8", mode, "int8"), torch.randn(M, K), torch.randn(M, N)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(gradients(layer, x, grad_out))
    for a, b, other in zip(*(result[:2] for result in results), strict=True):
        if a is not None:
            assert_same_bits(a, b)
            assert not torch.equal(a, other)


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_no_seed_is_drawn_where_none_is_needed(mode):
    layer, exact, x = layer_of("w8a8", mode, "int8"), layer_of("w8a8", mode, "float"), torch.randn(M, K)
    state = torch.get_rng_state()
    with torch.no_grad():
        layer(x)
    exact(x.requires_grad_())
    assert torch.equal(torch.get_rng_state(), state)
    layer(x)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_checkpointing_repeats_the_seed(mode, reentrant):
    layer, x, grad_out = layer_of("w8a8", mode, "int8"), torch.randn(M, K), torch.randn(M, N)
    model = nn.Sequential(layer, nn.GELU())
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).backward(grad_out)
        results.append([leaf.grad, layer.bias.grad, *([layer.weight.grad] if layer.mode != "frozen" else [])])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(("scheme", "mode"), [("w8a8", "frozen"), ("w4a8-g32", "frozen"), ("w4a8-g32-asym", "qat")])
def test_compiled_gradients_are_the_same(scheme, mode):
    torch._dynamo.reset()
    layer, x, grad_out = layer_of(scheme, mode, "int8"), torch.randn(M, K), torch.randn(M, N)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        torch.manual_seed(4)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        function(leaf).backward(grad_out)
        results.append([leaf.grad, layer.bias.grad, *([layer.weight.grad] if layer.mode != "frozen" else [])])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(("scheme", "mode", "grad"), TRAINED)
def test_training_lowers_the_loss_and_freezing_keeps_the_outputs(scheme, mode, grad):
    layer = layer_of(scheme, mode, grad)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-3, weight_decay=0.01)
    x = torch.randn(128, K)
    target = nn.Linear(K, N)(x).detach()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).pow(2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    out = layer(x).detach()
    assert layer.freeze_() is layer and layer.mode == "frozen" and "weight" not in layer._parameters
    assert_same_bits(layer(x).detach(), out)
    assert layer.dequantize().shape == (N, K)
    restored = QuantLinear(K, N, True, scheme, grad_dtype=grad)
    restored.load_state_dict(layer.state_dict())
    assert_same_bits(restored(x).detach(), out)
    leaf = x[:4].clone().requires_grad_()
    restored(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


def test_repeated_runs_are_bit_identical():
    results = []
    for threads in (1, 2, 2):
        torch.manual_seed(8)
        torch.set_num_threads(threads)
        layer = layer_of("w8a8", "int8", "int8")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            layer(torch.randn(M, K)).pow(2).sum().backward()
            optimizer.step()
        results.append(layer.state_dict())
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert_same_bits(other[name], tensor, name)


class TestInt8Weight:
    def test_passes_for_a_float_tensor(self):
        layer = layer_of("w8a8", "int8", dtype=torch.bfloat16)
        weight = layer.weight
        assert isinstance(weight, nn.Parameter) and isinstance(weight, Int8Weight) and weight.requires_grad
        assert (weight.dtype, weight.shape, weight.is_floating_point()) == (torch.bfloat16, (N, K), True)
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
        assert_same_bits(weight.dequantize(), layer.dequantize().bfloat16())
        assert layer.storage_bytes() == N * K + 4 * N
        plain = weight.detach() * 2
        assert type(plain) is torch.Tensor
        assert_same_bits(plain, layer.dequantize().bfloat16() * 2)
        assert type(torch.zeros_like(weight)) is torch.Tensor
        assert "Int8Weight" in repr(weight)

    def test_gradient_is_a_plain_tensor_of_that_dtype(self):
        layer = layer_of("w8a8", "int8", dtype=torch.bfloat16)
        layer(torch.randn(4, K).bfloat16()).sum().backward()
        assert type(layer.weight.grad) is torch.Tensor and layer.weight.grad.dtype == torch.bfloat16

    def test_updates_below_a_step_are_kept_in_the_mean(self):
        """A change of a fifth of a step, stored many times from the same start, moves the mean by as much."""
        start = layer_of("w8a8", "int8").weight.detach()
        change = 0.2 * start.scales * torch.ones(N, K)
        change[start.dequantize().abs() > 126.5 * start.scales] = 0  # the largest value keeps the scale as it is
        total, count = torch.zeros(N, K), 400
        for _ in range(count):
            weight = start.clone()
            weight.add_(change)
            total += weight.dequantize() - start.dequantize()
        moved = (total / count / start.scales)[change > 0]
        assert abs(moved.mean() - 0.2) < 5 * 0.4 / (count * len(moved)) ** 0.5
        assert (moved - 0.2).abs().max() < 6 * 0.4 / count**0.5

    @pytest.mark.parametrize("scale", [1.0, 0.999])
    def test_unchanged_values_stay(self, scale):
        weight = layer_of("w8a8", "int8").weight.detach()
        before = weight.clone()
        weight.mul_(scale)
        assert (weight.qweight != before.qweight).double().mean() < 1e-3
        torch.testing.assert_close(weight.scales, before.scales * scale, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(
        "optimizer",
        [
            functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
            functools.partial(torch.optim.AdamW, lr=1e-2, foreach=True),
            functools.partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1, amsgrad=True),
            functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
            functools.partial(torch.optim.SGD, lr=0.1, foreach=True, weight_decay=0.01),
            functools.partial(torch.optim.RMSprop, lr=1e-3),
        ],
    )
    def test_optimizers_stay_close_to_a_float_weight(self, optimizer):
        layer = layer_of("w8a8", "int8")
        twin = nn.Linear(K, N)
        twin.weight.data, twin.bias.data = layer.dequantize(), layer.bias.detach().clone()
        optimizers = optimizer(layer.parameters()), optimizer(twin.parameters())
        for _ in range(3):
            gradient = torch.randn(N, K)
            layer.weight.grad, twin.weight.grad = gradient, gradient.clone()
            for each in optimizers:
                each.step()
        state = optimizers[0].state[layer.weight]
        assert all(type(value) is torch.Tensor for value in state.values() if isinstance(value, torch.Tensor))
        # Up to four roundings a step, each of less than a step of the grid.
        steps = (layer.dequantize() - twin.weight.detach()).abs() / layer.weight.scales
        assert 0 < steps.max() < 12 and steps.mean() < 2

    def test_copies_share_nothing(self):
        layer = layer_of("w8a8", "int8")
        twin = copy.deepcopy(layer)
        assert isinstance(twin.weight, Int8Weight) and twin.weight.requires_grad
        with torch.no_grad():
            twin.weight.zero_()
        assert layer.weight.qweight.any() and not twin.weight.qweight.any()

    def test_state_dict_is_that_of_a_frozen_layer(self, tmp_path):
        from safetensors.torch import load_file, save_file

        layer, frozen = layer_of("w8a8", "int8"), layer_of("w8a8", "frozen")
        state = layer.state_dict()
        assert sorted(state) == ["bias", "qweight", "scales"]
        assert all(type(tensor.data) is torch.Tensor for tensor in state.values())
        for name, tensor in frozen.state_dict().items():
            assert_same_bits(state[name], tensor, name)
        save_file(state, tmp_path / "layer.safetensors")
        other = QuantLinear(K, N, True, "w8a8", mode="int8")
        assert not other.weight.qweight.any()
        assert other.load_state_dict(load_file(tmp_path / "layer.safetensors")) == ([], [])
        assert_same_bits(other.dequantize(), layer.dequantize())
        with pytest.raises(RuntimeError, match=r'Missing key.*"qweight"'):
            other.load_state_dict({"bias": state["bias"]})
        with pytest.raises(RuntimeError, match=r"qweight must be torch\.int8 of shape"):
            other.load_state_dict({**state, "qweight": state["qweight"][:, :5]})

    def test_dtype_and_device_moves_keep_the_integers(self):
        layer = layer_of("w8a8", "int8")
        before = layer.quantized_weight()
        before = QuantizedWeight(before.qweight.clone(), before.scales.clone(), None)
        layer.bfloat16()
        assert layer.weight.dtype == layer.compute_dtype == layer.bias.dtype == torch.bfloat16
        assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
        for a, b in zip(layer.quantized_weight()[:2], before[:2], strict=True):
            assert_same_bits(a, b)
        assert layer(torch.randn(3, K).bfloat16()).dtype == torch.bfloat16

    def test_scales_are_float32_whatever_the_default_dtype(self):
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = QuantLinear(K, N, scheme="w8a8", mode="int8")
        finally:
            torch.set_default_dtype(torch.float32)
        assert layer.weight.dtype == torch.bfloat16 and layer.weight.scales.dtype == torch.float32

    @pytest.mark.parametrize("scheme", ["w8a8-g32", "w4a8", "w4a16-g32-asym", "w8a8-min"])
    def test_other_formats_are_refused(self, scheme):
        with pytest.raises(ValueError, match="scheme must have 8-bit weights with one scale a row for mode='int8'"):
            QuantLinear(K, N, True, scheme, mode="int8")


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_models_are_quantized_trained_and_frozen(mode):
    model = nn.Sequential(nn.Linear(K, 40), nn.GELU(), nn.Linear(40, K))
    report = qk.quantize_(model, "w8a8", mode=mode, grad_dtype="int8")
    assert len(report.quantized) == 2 and report.mode == mode and all(row.weight_error < 0.02 for row in report.rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(3, 5, K)
    for _ in range(2):
        model(x).pow(2).sum().backward()
        optimizer.step()
    out = model(x).detach()
    assert qk.freeze_(model) is model
    assert_same_bits(model(x).detach(), out)
    assert [name for name in model.state_dict() if "weight" in name] == ["0.qweight", "2.qweight"]
    assert qk.freeze_(model) is model  # once more changes nothing


@pytest.mark.parametrize("scheme", ["w4a8-g32-asym", "w8a8-g64"])
def test_column_scales_follow_the_weight(scheme):
    layer, other = layer_of(scheme, "frozen", "int8"), layer_of(scheme, "frozen", "int8")
    assert "column_scales" not in layer.state_dict()
    weight = qk.quantize_weight(torch.randn(N, K), scheme)
    other.set_weight(weight)
    layer.load_state_dict(other.state_dict())
    for each in (layer, other, copy.deepcopy(other), copy.deepcopy(other).bfloat16()):
        assert_same_bits(each.column_scales, ops.column_scales(*weight, K, scheme))
    grad_out, seed = torch.randn(M, N), torch.tensor(3)
    q, scales = ops.quantize_rows_stochastic(grad_out, None, seed, 0)
    expected = ops.int_grad_input(q, scales, *weight, K, scheme, layer.column_scales)
    assert_same_bits(
        int8_input_gradient(grad_out, LinearWeight(weight, K, scheme, layer.column_scales), seed, torch.float32),
        expected,
    )


def test_non_finite_gradients_stay_in_their_rows_and_columns():
    layer, grad_out = layer_of("w8a8", "qat", "int8"), torch.randn(M, N)
    grad_out[4, 7] = torch.inf
    got_x, got_weight, _ = gradients(layer, torch.randn(M, K), grad_out)
    assert got_x[4].isnan().all() and got_x[:4].isfinite().all() and got_x[5:].isfinite().all()
    assert got_weight[7].isnan().all() and got_weight[:7].isfinite().all() and got_weight[8:].isfinite().all()


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_autocast(mode):
    layer = layer_of("w8a8", mode, "int8")
    x = torch.randn(M, K, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and layer.bias.grad.dtype == torch.float32
    assert layer.mode == "frozen" or layer.weight.grad.dtype == torch.float32


def test_a_row_of_zeros_takes_no_part_in_the_gradient_of_x():
    weight, grad_out = float_layer().weight.detach(), torch.randn(M, N)
    weight[-1] = 0.0  # quantized, its scale is 1
    seed = torch.tensor(5)
    whole, rest = (qk.quantize_weight(part, "w8a8") for part in (weight, weight[:-1]))
    weights = [LinearWeight(stored, K, "w8a8") for stored in (whole, rest)]
    grads = [int8_input_gradient(grad_out[:, : len(w.stored[0])], w, seed, torch.float32) for w in weights]
    assert_same_bits(*grads)


def test_functions_take_leading_dimensions():
    layer = layer_of("w8a8", "qat")
    x = torch.randn(2, 3, K)
    whole = trained_linear(x, layer.weight, layer.bias, layer.scheme)
    assert whole.shape == (2, 3, N)
    assert_same_bits(whole.detach(), quant_linear(x, layer.quantized_weight(), layer.bias, "w8a8").detach())
