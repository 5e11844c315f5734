"""ONNX files that onnxruntime's quantizer wrote, and graphs that hold weights in every layout there is."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.onnx_packing import dequantized_tensors, nbits_tensors
from qkernels.checkpoints.onnx_weights import module_name
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.formats.storage import dequantize_weight

IN, OUT = 80, 24


def model_of(nodes, constants, in_features=IN, out_features=OUT, opset=21) -> onnx.ModelProto:
    """A model of x [B, in_features] -> y [B, out_features]."""
    shapes = {"x": ["b", in_features], "y": ["b", out_features]}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def constant(name: str, values: torch.Tensor, kind: int | None = None) -> onnx.TensorProto:
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        return helper.make_tensor(name, kind, list(values.shape), values.flatten().tolist())
    return numpy_helper.from_array(values.contiguous().numpy(), name)


def quantized(
    path: Path, bits: int, symmetric: bool, form: QuantFormat = QuantFormat.QOperator, block: int = 32
) -> Path:
    """A file that onnxruntime's own quantizer wrote."""
    torch.manual_seed(0)
    node = helper.make_node("MatMul", ["x", "block.proj.weight"], ["y"], name="/block/proj/MatMul")
    model = model_of([node], [constant("block.proj.weight", torch.randn(IN, OUT))])
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, quant_format=form, bits=bits)
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    onnx.save(quantizer.model.model, path)
    return path


def float_weight(path: Path, in_features: int = IN) -> torch.Tensor:
    """float32 [N, K] that onnxruntime multiplies with: its results for the rows of an identity."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": np.eye(in_features, dtype=np.float32)})
    return torch.from_numpy(out).t()


def weight_of(layer) -> torch.Tensor:
    """float32 [N, K], columns in the order of the input."""
    values = layer.read()
    weight = dequantize_weight(*values.weight, layer.in_features, layer.scheme)
    return weight if values.input_order is None else weight[:, values.input_order.argsort()]


@pytest.mark.parametrize(
    ("bits", "symmetric", "form", "block", "scheme"),
    [
        (4, True, QuantFormat.QOperator, 32, "w4a16-g32"),
        (4, False, QuantFormat.QOperator, 32, "w4a16-g32-asym"),
        (8, True, QuantFormat.QOperator, 64, "w8a16-g64"),
        (4, True, QuantFormat.QOperator, 128, "w4a16-g128"),
        (4, False, QuantFormat.QOperator, 256, "w4a16-g128-asym"),
        (4, True, QuantFormat.QDQ, 32, "w4a16-g32"),
        (4, False, QuantFormat.QDQ, 64, "w4a16-g64-asym"),
    ],
)
def test_what_onnxruntime_writes_is_kept(tmp_path, bits, symmetric, form, block, scheme):
    path = quantized(tmp_path / "x.onnx", bits, symmetric, form, block)
    found = open_checkpoint(path)
    assert found.format == "onnx" and list(found.layers) == ["block.proj"] and not found.floats
    layer = found.layers["block.proj"]
    assert layer.scheme.name == scheme and (layer.in_features, layer.out_features) == (IN, OUT)
    assert torch.equal(weight_of(layer), float_weight(path))
    parse_target("qkernels")[0].write(found, tmp_path / "out", Losses())
    assert torch.equal(weight_of(open_checkpoint(tmp_path / "out").layers["block.proj"]), weight_of(layer))


@pytest.mark.parametrize(
    ("bits", "symmetric", "form"),
    [
        (4, True, QuantFormat.QOperator),
        (4, False, QuantFormat.QOperator),
        (8, True, QuantFormat.QOperator),
        (4, True, QuantFormat.QDQ),
        (4, False, QuantFormat.QDQ),
    ],
)
def test_what_onnxruntime_writes_is_packed_to_the_same_bytes(tmp_path, bits, symmetric, form):
    path = quantized(tmp_path / "x.onnx", bits, symmetric, form)
    layer = open_checkpoint(path).layers["block.proj"]
    packing = nbits_tensors if form == QuantFormat.QOperator else dequantized_tensors
    ours = [tensor for tensor in packing(layer.read().weight, IN, layer.scheme)[:3] if tensor is not None]
    theirs = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert len(ours) == len(layer.tensors) == (2 if symmetric else 3)
    for tensor, name in zip(ours, layer.tensors, strict=True):
        stored = theirs[name].astype(tensor.numpy().dtype)
        assert tensor.shape == stored.shape and tensor.numpy().tobytes() == stored.tobytes()


def test_zero_points_of_8_bits_are_minima_with_a_report(tmp_path):
    path = quantized(tmp_path / "x.onnx", 8, False)
    with pytest.raises(LossError, match="minima that float32 cannot hold"):
        open_checkpoint(path).layers["block.proj"].read()
    losses, exact = Losses("report"), float_weight(path)
    layer = open_checkpoint(path, losses).layers["block.proj"]
    assert layer.scheme.name == "w8a16-g32-min"
    assert float((weight_of(layer) - exact).abs().max() / exact.abs().max()) < 2.0**-21
    assert losses.entries[0].largest < 2.0**-23


def nbits(
    changes: dict | None = None, constants: dict[str, torch.Tensor] | None = None, bits: int = 4, block: int = 32
):
    """A model with one MatMulNBits of random codes."""
    torch.manual_seed(0)
    groups = -(-IN // block)
    stored = {
        "B": torch.randint(256, (OUT, groups, block * bits // 8), dtype=torch.uint8),
        "scales": torch.rand(OUT, groups) + 0.1,
    } | (constants or {})
    inputs = ["x"] + [name if name in stored else "" for name in ("B", "scales", "zeros", "g_idx")]
    said = {"K": IN, "N": OUT, "bits": bits, "block_size": block} | (changes or {})
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", name="/a/MatMul_Q4", **said)
    return model_of([node], [constant(name, tensor) for name, tensor in stored.items()])


@pytest.mark.parametrize(
    "constants",
    [
        {"scales": torch.rand(OUT * 3) + 0.1},
        {"zeros": torch.full((OUT * 2,), 0x53, dtype=torch.uint8)},
        {"zeros": torch.arange(OUT * 3, dtype=torch.float32).remainder(16).view(OUT, 3)},
    ],
    ids=["flat scales", "flat zero points", "whole floats as zero points"],
)
def test_older_layouts(tmp_path, constants):
    onnx.save(nbits(constants=constants), tmp_path / "x.onnx")
    layer = open_checkpoint(tmp_path / "x.onnx").layers["a"]
    found, expected = weight_of(layer), float_weight(tmp_path / "x.onnx")
    # With floats as zero points onnxruntime rounds the product of scale and zero point too: of at most 15 * 1.1.
    assert torch.all((found - expected).abs() <= (2 * 16.5 * 2.0**-24 if "zeros" in constants else 0))


def test_codes_of_2_bits(tmp_path):
    onnx.save(nbits(bits=2), tmp_path / "x.onnx")
    layer = open_checkpoint(tmp_path / "x.onnx").layers["a"]
    assert layer.scheme.name == "w4a16-g32"
    assert torch.equal(weight_of(layer), float_weight(tmp_path / "x.onnx"))


def test_groups_in_another_order_are_an_order_of_the_input(tmp_path):
    torch.manual_seed(1)
    order = torch.randperm(IN)
    groups = torch.empty(IN, dtype=torch.int32)
    groups[order] = torch.arange(IN, dtype=torch.int32) // 32
    model = nbits(constants={"g_idx": groups})
    onnx.save(model, tmp_path / "x.onnx")
    layer = open_checkpoint(tmp_path / "x.onnx").layers["a"]
    assert layer.has_input_order
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    codes = torch.stack((stored["B"] & 15, stored["B"] >> 4), dim=-1).view(OUT, -1)[:, :IN]
    expected = (codes.float() - 8) * stored["scales"][:, groups.long()]
    assert torch.equal(weight_of(layer), expected)


def test_a_block_of_16_is_one_of_8_bits(tmp_path):
    onnx.save(nbits(block=16), tmp_path / "x.onnx")
    layer = open_checkpoint(tmp_path / "x.onnx").layers["a"]
    assert layer.scheme.name == "w8a16-g16"
    assert torch.equal(weight_of(layer), float_weight(tmp_path / "x.onnx"))


@pytest.mark.parametrize("bits", [2, 4])
def test_zero_points_that_are_no_integers_are_minima(tmp_path, bits):
    scales = (torch.rand(OUT, 3) + 0.1).to(torch.float16).float()  # so that no product is rounded
    onnx.save(nbits(constants={"zeros": torch.full((OUT, 3), 1.25), "scales": scales}, bits=bits), tmp_path / "x.onnx")
    layer, exact = open_checkpoint(tmp_path / "x.onnx").layers["a"], float_weight(tmp_path / "x.onnx")
    assert layer.scheme.name == "w4a16-g32-min"
    assert float((weight_of(layer) - exact).abs().max() / exact.abs().max()) < 2.0**-22


def dequantizing(nodes, stored: dict[str, tuple[torch.Tensor, int | None]], **said) -> onnx.ModelProto:
    """A model whose weight "w" is that of a DequantizeLinear."""
    inputs = [name for name in ("w", "scales", "zeros") if name in stored]
    first = helper.make_node("DequantizeLinear", inputs, ["d"], **said)
    constants = [constant(name, tensor, kind) for name, (tensor, kind) in stored.items()]
    return model_of([first, *nodes], constants)


PRODUCT = helper.make_node("MatMul", ["x", "d"], ["y"])
TURNED = [
    helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0]),
    helper.make_node("Cast", ["t"], ["c"], to=TensorProto.FLOAT),
    helper.make_node("MatMul", ["x", "c"], ["y"]),
]
GEMM = helper.make_node("Gemm", ["x", "d"], ["y"], transB=1)


def integers(*shape: int, low: int = -127, high: int = 128, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(low, high, shape, dtype=dtype)


def floats(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(shape) + 0.1


UINT8 = {"dtype": torch.uint8, "low": 0, "high": 256}
INT4, UINT4 = {"low": -8, "high": 8}, {"low": 0, "high": 16, "dtype": torch.uint8}
GRAPHS = {
    "tensor": ([PRODUCT], {"w": (integers(IN, OUT), None), "scales": (floats(), None)}, {}, "w8a16"),
    "rows": ([PRODUCT], {"w": (integers(IN, OUT), None), "scales": (floats(OUT), None)}, {"axis": 1}, "w8a16"),
    "turned": (TURNED, {"w": (integers(OUT, IN), None), "scales": (floats(OUT), None)}, {"axis": 0}, "w8a16"),
    "gemm": ([GEMM], {"w": (integers(OUT, IN), None), "scales": (floats(OUT), None)}, {"axis": -2}, "w8a16"),
    "uint8": (
        [GEMM],
        {
            "w": (integers(OUT, IN, **UINT8) | 1, None),
            "scales": (floats(OUT), None),
            "zeros": (torch.full((OUT,), 128, dtype=torch.uint8), None),
        },
        {"axis": 0},
        "w8a16",
    ),
    "blocks": (
        [GEMM],
        {"w": (integers(OUT, IN, **INT4), TensorProto.INT4), "scales": (floats(OUT, 3), None)},
        {"axis": 1, "block_size": 32},
        "w4a16-g32",
    ),
    "uint4": (
        [PRODUCT],
        {"w": (integers(IN, OUT, **UINT4), TensorProto.UINT4), "scales": (floats(1, OUT), None)},
        {"axis": 0, "block_size": 128},
        "w4a16-g128-asym",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_matrix_that_is_dequantized_is_kept(tmp_path, name):
    nodes, stored, said, scheme = GRAPHS[name]
    onnx.save(dequantizing(nodes, stored, **said), tmp_path / "x.onnx")
    found = open_checkpoint(tmp_path / "x.onnx")
    layer = found.layers["w"]
    assert layer.scheme.name == scheme and not found.floats
    assert torch.equal(weight_of(layer), float_weight(tmp_path / "x.onnx"))


def test_scales_of_columns_are_quantized_again_or_refused(tmp_path):
    model = dequantizing([PRODUCT], {"w": (integers(IN, OUT), None), "scales": (floats(IN), None)}, axis=0)
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(LossError, match="no scheme has groups of 1"):
        open_checkpoint(tmp_path / "x.onnx")
    weight = weight_of(open_checkpoint(tmp_path / "x.onnx", Losses("requantize")).layers["w"])
    exact = float_weight(tmp_path / "x.onnx")
    assert float((weight - exact).abs().max() / exact.abs().max()) < 1 / 250


@pytest.mark.parametrize("outside", [False, True])
def test_external_data_lie_in_the_folder_of_the_file(tmp_path, outside):
    (tmp_path / "in").mkdir()
    model = nbits()
    onnx.save(model, tmp_path / "in" / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    kept = weight_of(open_checkpoint(tmp_path / "in" / "x.onnx").layers["a"])
    onnx.save(nbits(), tmp_path / "plain.onnx")
    assert torch.equal(kept, weight_of(open_checkpoint(tmp_path / "plain.onnx").layers["a"]))
    model = onnx.load(tmp_path / "in" / "x.onnx", load_external_data=False)
    if outside:
        (tmp_path / "in" / "x.data").rename(tmp_path / "y.data")
        words = "must lie in the folder of its file, got '../y.data'"
    else:
        data = (tmp_path / "in" / "x.data").read_bytes()
        (tmp_path / "in" / "x.data").write_bytes(data[:64])
        words = "bytes in the 64 of x.data"
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and outside:
                entry.value = "../y.data"
    (tmp_path / "in" / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=words):
        open_checkpoint(tmp_path / "in" / "x.onnx").layers["a"].read()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "in").mkdir()
    onnx.save(nbits(), tmp_path / "in" / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    (tmp_path / "in" / "x.data").rename(tmp_path / "y.data")
    (tmp_path / "in" / "x.data").symlink_to(tmp_path / "y.data")
    with pytest.raises(ValueError, match="must lie in the folder of its file"):
        open_checkpoint(tmp_path / "in" / "x.onnx").layers["a"].read()


OTHER = helper.make_node("MatMulInteger", ["q", "w"], ["i"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nbits({"bits": 3}), r"bits of B must be one of \(2, 4, 8\), got 3"),
        (nbits({"block_size": 48}), "must be a power of two from 16 on, got 48"),
        (nbits({"block_size": 0}), "must be a power of two from 16 on, got 0"),
        (nbits({"K": -1}), "K and N of B must be positive"),
        (nbits({"N": 1 << 40}), "B must be .* values of torch.uint8"),
        (nbits({"N": OUT + 1}), "B must be .* values of torch.uint8"),
        (nbits(constants={"scales": torch.ones(OUT, 2)}), "scales must be 72 values of"),
        (nbits(constants={"zeros": torch.ones(OUT, 3, dtype=torch.uint8)}), "zeros must be 48 values"),
        (nbits(constants={"g_idx": torch.zeros(3, dtype=torch.int32)}), "must have a group for each of 80"),
        (nbits(constants={"g_idx": torch.zeros(IN, dtype=torch.int32)}), "must give each group 32 input features"),
        (model_of([OTHER], [constant("w", integers(IN, OUT))]), "w, .* of MatMulInteger, is not read: read are"),
        (model_of([], [constant("w", integers(IN, OUT))]), "w, .* of nothing, is not read"),
        (
            dequantizing([PRODUCT], {"w": (integers(IN, OUT), None), "scales": (floats(3), None)}, axis=1),
            r"scales must have the shape \[24\], got \[3\]",
        ),
        (
            dequantizing([], {"w": (integers(IN, OUT, dtype=torch.int16), None), "scales": (floats(OUT), None)}),
            "w, torch.int16 .* is not read",
        ),
        (
            dequantizing([PRODUCT, GEMM], {"w": (integers(IN, IN), None), "scales": (floats(IN), None)}, axis=1),
            r"w is read as \[N, K\] by one product and as \[K, N\] by another",
        ),
    ],
)
def test_broken_and_unknown_graphs_are_refused(tmp_path, model, words):
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=words):
        open_checkpoint(tmp_path / "x.onnx", Losses("requantize"))


def test_bytes_that_are_no_graph_are_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"\x00\xff" * 40)
    with pytest.raises(ValueError, match="is no ONNX file"):
        open_checkpoint(tmp_path / "x.onnx")


def test_data_of_another_size_than_the_shape_are_refused(tmp_path):
    model = nbits()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-1]
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"B must have 1152 bytes of data for shape \[24, 3, 16\], got 1151"):
        open_checkpoint(tmp_path / "x.onnx").layers["a"].read()


def test_biases_of_integers_are_floats(tmp_path):
    model = dequantizing([PRODUCT], {"w": (integers(IN, OUT), None), "scales": (floats(OUT), None)}, axis=1)
    model.graph.node.append(helper.make_node("DequantizeLinear", ["bias_quantized", "s"], ["bias"]))
    model.graph.initializer.extend(
        [constant("bias_quantized", torch.tensor([3, -4], dtype=torch.int32)), constant("s", torch.tensor(0.5))]
    )
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    found = open_checkpoint(tmp_path / "x.onnx")
    assert found.floats.keys() == {"bias"} and found.floats["bias"].read().tolist() == [1.5, -2.0]


def test_quantized_activations_are_told(tmp_path):
    model = dequantizing([PRODUCT], {"w": (integers(IN, OUT), None), "scales": (floats(OUT), None)}, axis=1)
    model.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]))
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.warns(UserWarning, match="x.onnx quantizes activations too; these layers leave them float"):
        open_checkpoint(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("constant_name", "node", "module"),
    [
        ("onnx::MatMul_80_Q4G32", "/model/layers.0/mlp/up_proj/MatMul_Q4", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.attn.q_proj.MatMul.weight_Q4", "/x", "model.layers.0.attn.q_proj"),
        ("lm_head.weight_DQ_Q4", "", "lm_head"),
        ("val_12", "node_matmul_3", "val_12"),
    ],
)
def test_names_of_modules(constant_name, node, module):
    assert module_name(constant_name, node) == module
