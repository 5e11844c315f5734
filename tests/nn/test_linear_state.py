"""State of a `QuantLinear`: copies, casts, devices, state dicts, and corrupted state dicts."""

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

from qkernels import QuantizedWeight, QuantLinear, QuantScheme, quantize_weight
from qkernels.formats.weight_format import INT4

K, N = 70, 19
CLASSES = ["w8a8", "w8a16-g32", "w4a8", "w4a8-g32-asym", "w4a16-asym", "w8a8-g64-ag32", "w4a8-g32-min"]


def layer_of(scheme: str, seed: int = 1, **options) -> QuantLinear:
    torch.manual_seed(seed)
    return QuantLinear.from_float(nn.Linear(K, N, **options), scheme)


def assert_same_state(actual: nn.Module, expected: dict) -> None:
    state = actual.state_dict() if isinstance(actual, nn.Module) else actual
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert_same_bits(state[name], tensor, name)


def assert_same_layer(actual: QuantLinear, expected: QuantLinear) -> None:
    assert_same_state(actual, expected.state_dict())
    assert actual.scheme == expected.scheme and repr(actual) == repr(expected)
    for name in ("qweight", "scales", "zeros"):
        tensor = getattr(actual, name)
        assert tensor is None or not tensor.requires_grad
    x = torch.randn(3, K)
    assert_same_bits(actual(x), expected(x))


def via_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("scheme", CLASSES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), via_torch_save])
@pytest.mark.parametrize("used", [False, True])
def test_copies(scheme, duplicate, used):
    layer = layer_of(scheme).eval()
    if used:
        layer(torch.randn(2, K, requires_grad=True)).sum().backward()
    twin = duplicate(layer)
    assert_same_layer(twin, layer)
    assert not twin.training and twin.bias.requires_grad
    assert twin.qweight.data_ptr() != layer.qweight.data_ptr()


@pytest.mark.parametrize("scheme", CLASSES)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(scheme, assign):
    layer, other = layer_of(scheme), layer_of(scheme, seed=2)
    state = layer.state_dict()
    names = {*layer.scheme.storage_shapes(K, N), "bias"}
    assert set(state) == names and all(type(tensor) is torch.Tensor for tensor in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    result = other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_layer(other, layer)


@pytest.mark.parametrize("scheme", CLASSES)
def test_meta_device_then_load(scheme):
    layer = layer_of(scheme)
    with torch.device("meta"):
        empty = QuantLinear(K, N, scheme=scheme)
    assert empty.qweight.is_meta and empty(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert_same_layer(assigned, layer)
    empty.to_empty(device="cpu")
    assert empty.scales.dtype == torch.float32
    empty.load_state_dict(layer.state_dict())
    assert_same_layer(empty, layer)


def test_assigned_views_of_a_larger_file_work():
    """`assign=True` keeps the tensors as they come, also when they are not contiguous or not aligned."""
    layer = layer_of("w4a8-g32-asym")
    state = {name: torch.stack((tensor, tensor), dim=-1)[..., 1] for name, tensor in layer.state_dict().items()}
    other = layer_of("w4a8-g32-asym", seed=2)
    other.load_state_dict(state, assign=True)
    assert not other.qweight.is_contiguous()
    x = torch.randn(3, K, requires_grad=True)
    assert_same_bits(other(x), layer(x))
    (gradient,) = torch.autograd.grad(other(x).sum(), x)
    assert_same_bits(gradient, torch.autograd.grad(layer(x).sum(), x)[0])


CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "float": (lambda m: m.bfloat16().float(), torch.float32),
    "to dtype": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to both": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "to device": (lambda m: m.to("cpu"), torch.float32),
    "to like": (lambda m: m.to(torch.empty(1, dtype=torch.bfloat16)), torch.bfloat16),
    "share_memory": (lambda m: m.share_memory(), torch.float32),
}


@pytest.mark.parametrize("scheme", CLASSES)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("nested", [False, True])
def test_casts_keep_the_weight(scheme, cast, nested):
    layer = layer_of(scheme)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    parameters = dict(layer.named_parameters())
    function, dtype = CASTS[cast]
    function(nn.Sequential(layer) if nested else layer)
    assert layer.compute_dtype == layer.bias.dtype == dtype
    assert_same_bits(layer.bias, before["bias"].to(torch.bfloat16 if cast == "float" else dtype).to(dtype))
    for name in layer.scheme.storage_shapes(K, N):
        assert_same_bits(getattr(layer, name), before[name], name)
    for name, parameter in layer.named_parameters():
        assert parameter is parameters[name], f"{name}: optimizers and ties hold the parameter itself"
    x = torch.randn(3, K, dtype=dtype)
    assert layer(x).dtype == dtype


def test_double_is_refused_by_the_kernels():
    layer = layer_of("w8a8").double()
    assert layer.scales.dtype == torch.float32
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, got"):
        layer(torch.randn(2, K, dtype=torch.float64))


def replaced(name, change):
    def corrupt(state):
        state[name] = change(state[name])

    return corrupt


def removed(name):
    return lambda state: state.pop(name)


def set_first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[0, 0] = value
        return tensor

    return change


def as_float(state):
    state["weight"] = torch.randn(N, K)
    for name in ("qweight", "scales", "zeros"):
        state.pop(name, None)


CORRUPTIONS = [
    ("w8a8", replaced("qweight", lambda t: t.to(torch.uint8)), r"qweight must be torch\.int8 of shape \[19, 70\]"),
    ("w8a8", replaced("qweight", lambda t: t.float()), r"qweight must be torch\.int8 .* got torch\.float32"),
    ("w8a8", replaced("qweight", lambda t: t[1:]), r"qweight must be .* got torch\.int8 of shape \[18, 70\]"),
    ("w8a8", replaced("qweight", lambda t: t.t()), r"qweight must be .* got torch\.int8 of shape \[70, 19\]"),
    ("w4a8", replaced("qweight", lambda t: t[:, :-1]), r"qweight must be torch\.uint8 of shape \[19, 35\]"),
    ("w4a8-g32", replaced("scales", set_first(torch.nan)), "scales must be finite"),
    ("w4a8-g32", replaced("scales", set_first(-torch.inf)), "scales must be finite"),
    ("w4a8-g32", replaced("scales", lambda t: t.half()), r"scales must be torch\.float32 .* got torch\.float16"),
    ("w4a8-g32", replaced("scales", lambda t: t[:, :1]), r"scales must be .* of shape \[19, 3\] for w4a8-g32, got"),
    ("w4a8-g32", removed("scales"), "scales"),
    ("w4a8-g32", removed("qweight"), "qweight"),
    ("w4a8-g32-asym", replaced("zeros", set_first(16)), "zeros must be at most 15, got 16"),
    ("w4a8-g32-asym", replaced("zeros", lambda t: t.float()), r"zeros must be torch\.uint8 .* got torch\.float32"),
    ("w4a8-g32-asym", removed("zeros"), "zeros"),
    ("w4a8-g32-min", replaced("zeros", set_first(torch.inf)), "zeros must be finite"),
    ("w4a8-g32-min", replaced("zeros", lambda t: t.byte()), r"zeros must be torch\.float32 .* got torch\.uint8"),
    ("w8a8-min", removed("zeros"), "zeros"),
    ("w4a8-g32", lambda s: s.update(zeros=torch.zeros(N, 3, dtype=torch.uint8)), "zeros .*w4a8-g32 has no zero points"),
    (
        "w8a8",
        replaced("bias", lambda t: t[1:]),
        r"bias must be a float vector of 19, got torch\.float32 of shape \[18\]",
    ),
    ("w8a8", replaced("bias", lambda t: t.long()), r"bias must be a float vector of 19, got torch\.int64"),
    ("w8a8", as_float, "weight is a float weight, but the layer is quantized"),
    ("w4a8-g32-asym", as_float, "weight is a float weight, but the layer is quantized"),
]


@pytest.mark.parametrize("prefix", ["", "block.0."])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("scheme", "corrupt", "message"), CORRUPTIONS)
def test_corrupted_state_leaves_the_layer_as_it_was(scheme, corrupt, message, strict, assign, prefix):
    state = layer_of(scheme, seed=2).state_dict()
    corrupt(state)
    layer = layer_of(scheme)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    model = layer if not prefix else nn.ModuleDict({"block": nn.ModuleList([layer])})
    with pytest.raises(RuntimeError, match=prefix.replace(".", r"\.") + message):
        model.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=strict, assign=assign)
    assert_same_state(layer, before)


@pytest.mark.parametrize(("other", "key"), [("w4a8-g32-asym", "zeros"), ("w8a8", "qweight"), ("w4a8-g64", "scales")])
def test_state_of_another_scheme_is_refused(other, key):
    layer = layer_of("w4a8-g32")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"{key} .*w4a8-g32"):
        layer.load_state_dict(layer_of(other).state_dict(), strict=False)
    assert_same_state(layer, before)


def test_missing_and_unexpected_keys_are_reported_by_torch():
    layer = layer_of("w8a8")
    with pytest.raises(RuntimeError, match=r"Missing key.*(qweight|scales)"):
        layer.load_state_dict({"bias": torch.zeros(N)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        layer.load_state_dict({**layer.state_dict(), "extra": torch.zeros(1)})
    assert layer.load_state_dict({}, strict=False).missing_keys == ["bias", "qweight", "scales"]


def test_set_weight():
    layer = layer_of("w4a8-g32-asym")
    weight = torch.randn(N, K)
    layer.set_weight(quantize_weight(weight, layer.scheme))
    assert_same_layer(layer, QuantLinear.from_float(linear_with(weight, layer.bias), layer.scheme))


def linear_with(weight, bias):
    linear = nn.Linear(K, N)
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qweight", torch.zeros(N, K, dtype=torch.int8)),
        ("qweight", torch.zeros(N + 1, K // 2, dtype=torch.uint8)),
        ("qweight", torch.zeros((), dtype=torch.uint8)),
        ("scales", torch.ones(N, 2)),
        ("scales", torch.ones(N, 3, dtype=torch.bfloat16)),
        ("scales", None),
        ("zeros", None),
        ("zeros", torch.zeros(N, 3)),
        ("zeros", torch.zeros(N, 3, dtype=torch.uint8, device="meta")),
    ],
)
def test_set_weight_refuses_what_does_not_fit(field, value):
    layer = layer_of("w4a8-g32-asym")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = quantize_weight(torch.randn(N, K), layer.scheme)._replace(**{field: value})
    with pytest.raises(ValueError, match=f"^{field} (must|is)"):
        layer.set_weight(weight)
    assert_same_state(layer, before)


def test_int4_storage_can_be_read_by_hand():
    """The format is a contract with other programs: nibbles, even k low, w = (nibble - zero) * scale."""
    nibbles = torch.tensor([[1, 15, 8]], dtype=torch.uint8)
    layer = QuantLinear(3, 1, scheme="w4a16-asym", bias=False)
    layer.set_weight(QuantizedWeight(INT4.pack(nibbles), torch.tensor([[0.5]]), torch.tensor([[3]], dtype=torch.uint8)))
    assert layer.state_dict()["qweight"].tolist() == [[0xF1, 0x08]]
    assert layer.dequantize().tolist() == [[-1.0, 6.0, 2.5]]
    assert QuantScheme.parse("w4a16-asym") == layer.scheme


@pytest.mark.parametrize("scheme", CLASSES)
def test_storage_bytes(scheme):
    layer = layer_of(scheme)
    shapes = layer.scheme.storage_shapes(K, N)
    sizes = {"qweight": 1, "scales": 4, "zeros": 4 if layer.scheme.has_min else 1}
    assert layer.storage_bytes() == sum(rows * columns * sizes[name] for name, (rows, columns) in shapes.items())
