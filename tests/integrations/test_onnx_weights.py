"""Forms of weights in exported ONNX files: onnxruntime computes with the very integers, and they are read back."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.checkpoints.registry import open_checkpoint

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

QUICK = ("w4a16-g32-asym", "w8a16")
SCHEMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in qk.QuantScheme.names()
    if "a16" in name and "-min" not in name
]
pytestmark = pytest.mark.thorough
BATCH = ({0: torch.export.Dim("batch")},)
# Of the sums of float products, which both sides order as they like, relative to the largest output.
FLOAT_TOLERANCE = 1e-6


def export(model, args, path, form, accuracy_level=0, **options):
    with qk.onnx_weights(form, accuracy_level):
        torch.onnx.export(model, args, path, dynamo=True, verbose=False, opset_version=21, **options)
    return path


def session_of(path):
    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, *inputs):
    session = session_of(path)
    names = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])


def layer(scheme, in_features=72, out_features=24):
    torch.manual_seed(0)
    return nn.Sequential(qk.QuantLinear.from_float(nn.Linear(in_features, out_features), scheme)).eval()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", ["matmul_nbits", "qdq"])
def test_every_scheme_is_computed_and_read_back(tmp_path, form, scheme):
    model, x = layer(scheme), torch.randn(5, 72)
    path = export(model, (torch.randn(2, 72),), tmp_path / "x.onnx", form, dynamic_shapes=BATCH)
    expected = model(x).detach()
    got = run(path, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT_TOLERANCE * expected.abs().max().item())
    found = open_checkpoint(path).layers["0"]
    weight, values = model[0].quantized_weight(), found.read().weight
    if form == "qdq" or model[0].scheme.group_size:
        assert found.scheme == model[0].scheme and found.in_features == 72
        for ours, theirs in zip(weight, values, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    else:  # one scale a row is repeated in blocks of 128, of which a row of 72 has one
        assert found.scheme.group_size == 128 and torch.equal(values.scales, weight.scales)
        assert torch.equal(values.qweight, weight.qweight)


def test_the_form_without_a_fused_operator_is_read_back_too(tmp_path):
    for scheme in ("w4a16-g32-asym", "w8a16"):
        model = layer(scheme, in_features=128)
        path = export(model, (torch.randn(2, 128),), tmp_path / f"{scheme}.onnx", "dequantize")
        found = open_checkpoint(path).layers["0"]
        assert found.scheme == model[0].scheme
        for ours, theirs in zip(model[0].quantized_weight(), found.read().weight, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("scheme", ["w4a16-g32-min", "w8a16-min"])
def test_minima_are_added(tmp_path, scheme):
    model, x = layer(scheme), torch.randn(5, 72)
    path = export(model, (x,), tmp_path / "x.onnx", "dequantize")
    expected = model(x).detach()
    torch.testing.assert_close(run(path, x), expected, rtol=0, atol=FLOAT_TOLERANCE * expected.abs().max().item())
    for form, words in (("matmul_nbits", "cannot hold minima of"), ("qdq", "has no minima of")):
        with pytest.raises(Exception, match=f"{words} {scheme}"):
            export(model, (x,), tmp_path / "y.onnx", form)


def test_minima_that_are_products_are_zero_points(tmp_path):
    model, x = layer("w4a16-g32-min"), torch.randn(5, 72)
    weight = model[0].quantized_weight()
    scales = weight.scales.to(torch.float16).float()
    weight = weight._replace(scales=scales, zeros=-2.25 * scales)
    model[0].set_weight(weight)
    path = export(model, (x,), tmp_path / "x.onnx", "matmul_nbits")
    expected = model(x).detach()
    torch.testing.assert_close(run(path, x), expected, rtol=0, atol=FLOAT_TOLERANCE * expected.abs().max().item())
    found = open_checkpoint(path).layers["0"]
    assert found.scheme == model[0].scheme
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weight, found.read().weight, strict=True))


@pytest.mark.parametrize(("in_features", "scheme"), [(1, "w4a16"), (15, "w8a16"), (300, "w4a16-asym")])
def test_rows_of_any_length(tmp_path, in_features, scheme):
    model, x = layer(scheme, in_features), torch.randn(3, in_features)
    path = export(model, (x,), tmp_path / "x.onnx", "matmul_nbits")
    expected = model(x).detach()
    torch.testing.assert_close(run(path, x), expected, rtol=0, atol=FLOAT_TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize(
    ("family", "form"), [("gpt2", "matmul_nbits"), ("llama", "matmul_nbits"), ("llama", "qdq"), ("llama", "dequantize")]
)
def test_tiny_transformers_with_any_batch_and_length(tmp_path, family, form):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=60, max_position_embeddings=32, **sizes)
    config.use_cache = False
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    qk.quantize_(model, "w4a16-g32-asym")
    dynamic = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    ids, path = torch.randint(0, 60, (2, 9)), tmp_path / "model.onnx"
    with qk.onnx_weights(form):
        torch.onnx.export(
            model,
            (),
            path,
            kwargs={"input_ids": ids},
            dynamo=True,
            verbose=False,
            opset_version=21,
            dynamic_shapes=dynamic,
        )
    for shape in ((2, 9), (3, 5)):
        ids = torch.randint(0, 60, shape)
        with torch.no_grad():
            expected = model(ids).logits
        # Float products, softmax and norms in another order.
        torch.testing.assert_close(run(path, ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    quantized = {name for name, module in model.named_modules() if isinstance(module, qk.QuantLinear)}
    assert open_checkpoint(path).layers.keys() >= quantized - {"lm_head"}


def test_int8_activations_are_near(tmp_path):
    model, x = layer("w4a16-g32", 128), torch.randn(5, 128)
    path = export(model, (x,), tmp_path / "x.onnx", "matmul_nbits", 4)
    (node,) = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4
    assert "accuracy_level 4" in open_checkpoint(path).layers["0"].details
    expected = model(x).detach()
    assert float((run(path, x) - expected).norm() / expected.norm()) < 0.02


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="form must be one of 'dequantize', 'matmul_nbits', 'qdq', got 'q4'"):
        qk.onnx_weights("q4").__enter__()
    with pytest.raises(ValueError, match="accuracy_level must be one of"):
        qk.onnx_weights("matmul_nbits", 5).__enter__()
    with pytest.raises(ValueError, match="accuracy_level must be 0 for form 'qdq', got 4"):
        qk.onnx_weights("qdq", 4).__enter__()
    with qk.onnx_weights("qdq"), pytest.raises(Exception, match="opset_version must be 21 or more for blocks"):
        torch.onnx.export(
            layer("w4a16-g32"), (torch.randn(2, 72),), tmp_path / "x.onnx", dynamo=True, verbose=False, opset_version=18
        )


def test_the_choice_ends_with_its_block(tmp_path):
    model, x = layer("w4a16-g32"), torch.randn(2, 72)
    export(model, (x,), tmp_path / "x.onnx", "matmul_nbits")
    torch.onnx.export(model, (x,), tmp_path / "y.onnx", dynamo=True, verbose=False)
    assert {node.op_type for node in onnx.load(tmp_path / "y.onnx").graph.node} >= {"DequantizeLinear", "Gemm"}
    assert np.isfinite(run(tmp_path / "y.onnx", x).numpy()).all()
