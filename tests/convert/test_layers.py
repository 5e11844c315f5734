"""Layer adapters: what is asked about layers is answered by class, and another library's class can be registered."""

import io

import pytest
import torch
import transformers
from helpers import assert_same_bits
from torch import nn

import qkernels as qk
from qkernels.convert.layers import Layer
from qkernels.diagnostics.explain import explain
from qkernels.nn.adapters import _ADAPTERS, adapter_of, find_adapter, float_twin, is_frozen
from qkernels.nn.layer_adapters import EmbeddingAdapter, QuantizedAdapter

N, K = 24, 64


class Projection(nn.Module):
    """Somebody's linear layer: x @ kernel + bias, with a kernel [K, N]."""

    def __init__(self, rows: int, columns: int, bias: bool = True) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(rows, columns) / rows**0.5)
        self.bias = nn.Parameter(torch.randn(columns)) if bias else None
        self.label = "mine"

    def forward(self, x):
        out = x @ self.kernel
        return out if self.bias is None else out + self.bias


class Upright(nn.Module):
    """Somebody's linear layer that holds the weight as [N, K]."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(columns, rows) / rows**0.5)

    def forward(self, x):
        return x @ self.matrix.T


class ProjectionAdapter(qk.LinearAdapter):
    key, transposed = "kernel", True


class UprightAdapter(qk.LinearAdapter):
    key = "matrix"


@pytest.fixture(autouse=True)
def registered():
    """The two classes are known for a test, and nothing of it is left afterwards."""
    before = dict(_ADAPTERS)
    qk.register_adapter(Projection, ProjectionAdapter())
    qk.register_adapter(f"{Upright.__module__}.{Upright.__qualname__}", UprightAdapter())
    yield
    _ADAPTERS.clear()
    _ADAPTERS.update(before)


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Projection(K, N), nn.ReLU(), Upright(N, K), nn.Linear(K, 8))


def test_a_class_without_an_adapter_stays_in_float_as_a_parameter():
    _ADAPTERS.pop(Projection)
    report = qk.quantize_(model_of(), "w8a8")
    assert {row.name: row.reason for row in report.left} == {
        "0.kernel": "parameter of Projection: only linear layers, convolutions of one or two dimensions, "
        "and embeddings are quantized"
    }


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_a_registered_class_is_quantized_like_a_linear_layer(mode):
    model, linear = model_of(), model_of()
    for at, weight in ((0, linear[0].kernel.detach().t()), (2, linear[2].matrix.detach())):
        twin = nn.Linear(weight.shape[1], weight.shape[0], bias=at == 0)
        twin.weight.data, twin.bias = weight.contiguous(), getattr(linear[at], "bias", None)
        linear[at] = twin
    report, expected = (qk.quantize_(each, "w8a8", mode, strict=True) for each in (model, linear))
    assert [row.kind for row in report.rows] == ["Projection", "Upright", "Linear"]
    for row, other in zip(report.rows, expected.rows, strict=True):
        assert (row.shape, row.bytes_before, row.bytes_after) == (other.shape, other.bytes_before, other.bytes_after)
        assert row.weight_error == pytest.approx(other.weight_error)
    x = torch.randn(5, K)
    assert_same_bits(model(x), linear(x))
    assert type(model[0]) is qk.QuantLinear and model[0].label == "mine"


def test_the_float_weight_of_qat_is_the_layers_own_if_it_is_stored_as_n_k():
    model = model_of()
    matrix, kernel = model[2].matrix, model[0].kernel
    qk.quantize_(model, "w8a8", "qat")
    assert model[2].weight is matrix and torch.equal(model[0].weight, kernel.t())


def test_it_is_saved_loaded_and_dequantized():
    model, x = model_of(), torch.randn(5, K)
    floats = model(x)
    qk.quantize_(model, "w4a16-g32")
    quantized, file = model(x), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = model_of()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    qk.quantize_(other, "w4a16-g32")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(other(x), quantized)
    qk.dequantize_(other)
    assert [type(layer) for layer in other] == [Projection, nn.ReLU, Upright, nn.Linear]
    assert other[0].kernel.shape == (K, N) and other[0].label == "mine" and "label" in vars(other[0])
    assert other[2].matrix.shape == (K, N) and dict(other[2].named_parameters()).keys() == {"matrix"}
    torch.testing.assert_close(other(x), quantized, rtol=1e-4, atol=1e-4)
    assert (quantized - floats).norm() < 0.2 * floats.norm()


def test_patterns_calibration_and_explain_know_it():
    model = model_of()
    assert [timing.layers for timing in explain(model, "w8a8", (1,), seconds=0.001).timings] == [("0",), ("2",), ("3",)]
    inputs = [torch.randn(64, K) @ torch.randn(K, K)]
    report = qk.quantize_(model, "w4a16-g32", include=["0"], calibration=inputs, strict=True)
    nearest = qk.quantize_weight(model_of()[0].kernel.detach().t(), "w4a16-g32")
    assert [row.name for row in report.quantized] == ["0"] and not torch.equal(model[0].qweight, nearest.qweight)


def test_it_is_quantized_as_transformers_loads_it_and_loads_again(tmp_path):
    class Config(transformers.PreTrainedConfig):
        model_type = "projections"

    class Model(transformers.PreTrainedModel):
        config_class, base_model_prefix = Config, ""

        def __init__(self, config):
            super().__init__(config)
            self.first, self.second = Projection(K, N), Upright(N, K)
            self.post_init()

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

        def _init_weights(self, module):
            pass

    x, float_model = torch.randn(4, K), Model(Config())
    float_model.save_pretrained(tmp_path / "float")
    loaded = Model.from_pretrained(tmp_path / "float", quantization_config=qk.QKernelsConfig("w8a8"))
    assert [row.reason for row in loaded.quantization_report.rows] == [None, None]
    qk.quantize_(float_model, "w8a8")
    assert_same_bits(loaded(x), float_model(x))
    loaded.save_pretrained(tmp_path / "quantized")
    again = Model.from_pretrained(tmp_path / "quantized")
    assert is_frozen(again.first) and is_frozen(again.second)
    assert_same_bits(again(x), float_model(x))
    assert type(qk.dequantize_(again).first) is Projection


def test_a_subclass_is_known_only_if_it_computes_the_same():
    class Named(Projection):
        def __init__(self) -> None:
            super().__init__(K, N)

    class Scaled(Projection):
        def forward(self, x):
            return 2 * super().forward(x)

    report = qk.quantize_(nn.Sequential(Named(), Scaled(K, N)), "w8a8")
    assert [row.reason for row in report.rows] == [
        None,
        "Scaled is a subclass of Projection: its forward may compute something else",
    ]


def test_layers_that_share_a_transposed_weight_stay():
    first, second = Projection(K, K), Projection(K, K)
    second.kernel = first.kernel
    with pytest.warns(UserWarning, match="nothing was quantized"):
        report = qk.quantize_(nn.Sequential(first, second), "w8a8")
    assert [row.reason for row in report.rows] == ["tied to 1", "tied to 0"]


def test_answers_for_the_layers_that_are_known():
    conv1d = transformers.pytorch_utils.Conv1D(N, K)
    layers = [nn.Linear(K, N), conv1d, nn.Embedding(N, K)]
    layers += [qk.QuantLinear(K, N), qk.QuantEmbedding(N, K)]
    for layer in layers:
        adapter = adapter_of(layer)
        assert adapter.shape(layer) == tuple(adapter.weight(layer).shape) == (N, K)
        assert adapter.dtype(layer) == torch.float32
        assert adapter.lookup == isinstance(layer, nn.Embedding)
        quantized = isinstance(adapter, QuantizedAdapter)
        assert adapter.weight_bytes(layer) == (N * K + 4 * N if quantized else 4 * N * K)
        assert str(adapter.scheme(layer)) == ("w8a8" if quantized else "None")
        assert Layer([""], layer, []).is_quantized == quantized
        if quantized:
            with pytest.raises(TypeError, match="quantized already"):
                adapter.quantize(layer, "w8a8")
            with pytest.raises(TypeError, match="quantized already"):
                adapter.empty(layer, "w8a8")
    assert find_adapter(nn.ReLU()) is None and find_adapter(nn.Conv3d(2, 2, 1)) is None
    with pytest.raises(TypeError, match="no layer adapter knows ReLU"):
        adapter_of(nn.ReLU())


@pytest.mark.parametrize("bias", [True, False])
def test_an_empty_twin_has_shape_dtype_and_bias(bias):
    layer = nn.Linear(K, N, bias, dtype=torch.bfloat16)
    for dtype, wanted in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        twin = adapter_of(layer).empty(layer, "w8a8", dtype=dtype, mode="qat")
        assert (twin.in_features, twin.out_features, twin.mode, twin.compute_dtype) == (K, N, "qat", wanted)
        assert all(parameter.is_meta for parameter in twin.parameters()) and (twin.bias is not None) == bias


def test_float_twins_are_what_was_quantized_or_plain():
    conv1d = transformers.pytorch_utils.Conv1D(N, K)
    quantized = qk.QuantLinear.from_float(conv1d, "w8a8")
    weight = nn.Parameter(quantized.dequantize())
    twin, plain = float_twin(quantized, weight), float_twin(quantized, weight, plain=True)
    assert (type(twin), twin.nf, twin.nx, twin.weight.shape) == (type(conv1d), N, K, (K, N))
    assert type(plain) is nn.Linear and plain.weight is weight and plain.bias is twin.bias is conv1d.bias
    x = torch.randn(3, K)
    torch.testing.assert_close(twin(x), plain(x))
    assert str(plain) == "Linear(in_features=64, out_features=24, bias=True)"


def test_float_twins_of_an_embedding_that_is_scaled():
    scaled = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(N, K, 0, 8.0)
    quantized = qk.QuantEmbedding.from_float(scaled, "w8a8")
    weight = nn.Parameter(quantized.dequantize())
    twin, plain = float_twin(quantized, weight), float_twin(quantized, weight, plain=True)
    ids = torch.arange(N)
    assert type(twin) is type(scaled) and type(plain) is nn.Embedding and plain.max_norm is None
    assert plain.padding_idx == twin.padding_idx == 0
    torch.testing.assert_close(twin(ids), quantized(ids))
    torch.testing.assert_close(8.0 * plain(ids), quantized(ids))


def test_a_single_layer_is_refused_with_what_to_call():
    for layer, name in ((nn.Linear(4, 4), "QuantLinear"), (nn.Embedding(4, 4), "QuantEmbedding")):
        with pytest.raises(TypeError, match=rf"use {name}\.from_float"):
            qk.quantize_(layer, "w8a8", embeddings=True)


def test_misuse_of_register_adapter_is_explained():
    with pytest.raises(TypeError, match=r"layer_type must be a class of nn\.Module or its full name, got .*int"):
        qk.register_adapter(int, ProjectionAdapter())
    with pytest.raises(TypeError, match="adapter must be an instance of a LayerAdapter"):
        qk.register_adapter(Projection, ProjectionAdapter)
    with pytest.raises(TypeError, match="abstract"):
        qk.LayerAdapter()
    assert isinstance(find_adapter(nn.Embedding(2, 2)), EmbeddingAdapter)


def test_a_class_that_is_no_longer_known_cannot_come_back():
    model = nn.Sequential(Projection(K, N))
    qk.quantize_(model, "w8a8")
    _ADAPTERS.pop(Projection)
    with pytest.raises(TypeError, match=r"no layer adapter knows Projection, which QuantLinear"):
        qk.dequantize_(model)


class Listed(nn.Module):
    """A module that calls its layers from a plain list, as some of transformers do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(K, K), nn.LSTM(K, K)
        self.steps = [self.first, torch.relu, self.second]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x[0]


def test_layers_in_a_plain_list_are_swapped_too():
    model, x = nn.Sequential(Listed()), torch.randn(3, 2, K)
    expected = model(x)
    qk.quantize_(model, "w8a8")
    listed = model[0]
    assert listed.steps[0] is listed.first and listed.steps[2] is listed.second
    assert isinstance(listed.first, qk.QuantLinear) and not torch.equal(model(x), expected)
    qk.dequantize_(model)
    assert listed.steps[0] is listed.first and type(listed.first) is nn.Linear
