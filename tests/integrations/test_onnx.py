"""ONNX files of quantized models: onnxruntime computes what the model computes."""

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from tiers import QUICK_SCHEMES
from torch import nn

import qkernels as qk
from qkernels import QuantScheme

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.thorough
BATCH = ({0: torch.export.Dim("batch")},)
# Of the sums of a16 products, which both sides order as they like, relative to the largest output.
FLOAT_TOLERANCE = 1e-6


def export(model, args, path, **options):
    program = torch.onnx.export(model, args, dynamo=True, verbose=False, **options)
    program.save(path)
    return program


def run(path, *inputs):
    ort.set_default_logger_severity(3)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])


def two_layers(scheme, mode="frozen", features=72, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 24), nn.ReLU(), nn.Linear(24, 8, bias=False)).eval()
    return quantized(model, scheme, torch.randn(4, features), mode=mode, **options)


def quantized(model, scheme, x, **options):
    qk.quantize_(model, scheme, calibration=[x] if QuantScheme.parse(scheme).static_activations else None, **options)
    return model


def rows(features=72):
    x = torch.randn(7, features, generator=torch.Generator().manual_seed(1))
    x[0], x[1], x[2] = 0, x[1] * 1e-35, x[2] * 1e30
    return x


def assert_equal_results(model, x, path):
    with torch.no_grad():
        expected = model(x)
    got = run(path, x)
    if QuantScheme.parse(model[0].scheme).int_activations:
        assert_same_bits(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT_TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(name, marks=() if name in QUICK_SCHEMES else pytest.mark.slow)
        for name in QuantScheme.names()
        if "-min" not in name
    ],
)
def test_every_scheme(scheme, tmp_path):
    model, path = two_layers(scheme), tmp_path / "model.onnx"
    export(model, (torch.randn(2, 72),), path, dynamic_shapes=BATCH)
    assert_equal_results(model, rows(), path)
    assert run(path, torch.empty(0, 72)).shape == (0, 8)


CONVOLUTIONS = {
    "strided": lambda: nn.Conv2d(6, 8, (3, 2), padding=(1, 2), stride=(2, 1), dilation=(1, 2)),
    "groups": lambda: nn.Conv2d(8, 8, 3, groups=2, bias=False),
    "1d": lambda: nn.Conv1d(4, 6, 5, padding=2),
}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-asym", "w8a8s", "w4a16-g32-asym"])
@pytest.mark.parametrize(
    "kind", ["strided", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("groups", "1d"))]
)
def test_convolutions(kind, scheme, tmp_path):
    torch.manual_seed(0)
    model, path = nn.Sequential(CONVOLUTIONS[kind]()).eval(), tmp_path / "model.onnx"
    x = torch.randn(3, model[0].in_channels, 9, 11)[(...,) if kind != "1d" else (..., 0, slice(None))]
    export(quantized(model, scheme, x), (x,), path)
    assert_equal_results(model, x, path)


def test_what_has_no_translation_is_refused(tmp_path):
    x = torch.randn(1, 8, 5, 5)
    model = quantized(nn.Sequential(nn.Conv2d(8, 8, 3)).eval(), "w8a8-g32", x)
    with pytest.raises(Exception, match=r"a layer of scheme w4a8-g32-min cannot be exported to ONNX"):
        export(two_layers("w4a8-g32-min"), (torch.randn(2, 72),), tmp_path / "model.onnx")
    with pytest.raises(Exception, match=r"a convolution of scheme w8a8-g32 has no translation to ONNX"):
        export(model, (x,), tmp_path / "model.onnx")


@pytest.mark.parametrize("mode, options", [("qat", {}), ("qat", {"weight_scale": "learned"}), ("int8", {})])
def test_every_mode(mode, options, tmp_path):
    model, path = two_layers("w8a8", mode, **options), tmp_path / "model.onnx"
    export(model, (torch.randn(2, 72),), path, dynamic_shapes=BATCH)
    assert_equal_results(model, rows(), path)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_values_that_are_not_finite(tmp_path):
    path = tmp_path / "model.onnx"
    x = rows()
    x[3, 5], x[4, 6] = torch.inf, torch.nan
    for scheme in ("w8a8", "w8a8-ag32", "w4a8-g32-asym"):
        model = two_layers(scheme)
        export(model, (x,), path)
        got, expected = run(path, x), model(x).detach()
        assert torch.equal(got.isnan(), expected.isnan()) and got[[3, 4]].isnan().all()
        assert_same_bits(got[expected.isfinite()], expected[expected.isfinite()])


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("scheme", ["w4a8-g32-asym", "w4a16-g32"])
def test_four_bits_are_stored_as_such_from_opset_21_on(scheme, opset, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128)).eval()
    qk.quantize_(model, scheme)
    path = tmp_path / "model.onnx"
    program = export(model, (torch.randn(2, 256),), path, opset_version=opset)
    stored = {value.name: str(value.dtype) for value in program.model.graph.initializers.values()}
    assert stored["0.weight"] == ("UINT4" if opset >= 21 else "UINT8")
    assert "0.qweight" not in stored and "0.scales" not in stored
    assert_equal_results(model, torch.randn(2, 256), path)


def test_float16_model(tmp_path):
    model, path = two_layers("w8a8").to(torch.float16)[:1], tmp_path / "model.onnx"
    x = torch.randn(5, 72).half()
    export(model, (x,), path)
    assert_same_bits(run(path, x), model(x).detach())


def test_tiny_transformer_with_quantized_tied_embeddings(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForMaskedLM(config).eval()
    report = qk.quantize_(model, "w8a8", embeddings="w4a8-g32-asym")
    assert any(row.bytes_after == 0 for row in report.quantized)  # the head shares the storage
    ids, path = torch.randint(0, 60, (2, 9)), tmp_path / "model.onnx"
    export(model, (ids,), path, dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},))
    for shape in ((2, 9), (3, 5)):
        ids = torch.randint(0, 60, shape)
        with torch.no_grad():
            expected = model(ids).logits
        # Softmax and layer norm of another library may move an activation over a rounding edge.
        torch.testing.assert_close(run(path, ids), expected, rtol=0, atol=2e-2 * expected.abs().max().item())


def test_branches_and_the_old_exporter_are_refused(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: self.layer(-x), (x,))

    model = Branch().eval()
    qk.quantize_(model, "w8a8")
    with pytest.raises(Exception, match=r"not be computed or belong to a branch"):
        export(model, (torch.randn(2, 8),), tmp_path / "model.onnx")
    with pytest.raises(RuntimeError, match=r"dynamo=True"):
        torch.onnx.export(two_layers("w8a8"), (torch.randn(2, 72),), tmp_path / "model.onnx", dynamo=False)


def test_float_models_and_exported_programs(tmp_path):
    path, x = tmp_path / "model.onnx", torch.randn(3, 8)
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    export(model, (x,), path)
    np.testing.assert_allclose(run(path, x), model(x).detach(), rtol=1e-5, atol=1e-6)
    quantized = two_layers("w8a8", "int8")
    program = torch.export.export(quantized, (rows(),))
    export(program, (), path)
    assert_equal_results(quantized, rows(), path)
    assert program.state_dict["0.weight"].requires_grad
