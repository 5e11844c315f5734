"""Safetensors of torchao: every class that has a layout of its own, and what its metadata may say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.registry import format_of, open_checkpoint, parse_target
from qkernels.formats.storage import dequantize_weight

FOLDER = Path(__file__).with_name("files") / "torchao"
FILE = FOLDER / "model.safetensors"
EXPECTED = load_file(FOLDER / "expected.safetensors")
SCHEMES = {
    "dynamic": "w8a8",
    "static": "w8a8s",
    "int8": "w8a16",
    "groups": "w8a16-g32",
    "intx4": "w4a16-g32",
    "asym": "w4a16-g32-asym",
    "intx3": "w4a16-asym",
    "intx8": "w8a16",
    "mixed": "w4a8-g32",
    "int4": "w4a16-g32",
}


def contents(without: str = "asym8") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of the fixture, without a layer."""
    with safe_open(FILE, "pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if not name.startswith(f"{without}.")}
    tensors = {name: tensor for name, tensor in load_file(FILE).items() if not name.startswith(f"{without}.")}
    return tensors, metadata


def weight_of(layer) -> torch.Tensor:
    return dequantize_weight(*layer.read().weight, layer.in_features, layer.scheme)


@pytest.mark.filterwarnings("ignore:torchao quantizes activations otherwise")
def test_every_class_is_kept(tmp_path):
    tensors, metadata = contents()
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    assert format_of(tmp_path / "x.safetensors").name == "torchao"
    found = open_checkpoint(tmp_path / "x.safetensors")
    assert {name: layer.scheme.name for name, layer in found.layers.items()} == SCHEMES
    assert list(found.floats) == ["int8.bias"]
    for name, layer in found.layers.items():
        if name != "int4":
            assert torch.equal(weight_of(layer), EXPECTED[name]), name
    assert torch.equal(found.layers["dynamic"].read().weight.qweight, tensors["dynamic._weight_qdata"])
    assert found.layers["static"].read().x_scale.tolist() == [0.125]
    parse_target("qkernels")[0].write(found, tmp_path / "out", Losses())
    again = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(weight_of(again.layers[name]), weight_of(layer)) for name, layer in found.layers.items())


def test_pairs_of_twos_complements(tmp_path):
    tensors, metadata = contents()
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.warns(UserWarning, match="mixed: it says int8_asym_per_token"):
        layer = open_checkpoint(tmp_path / "x.safetensors").layers["int4"]
    torch.manual_seed(0)
    weight = torch.nn.Linear(64, 6).weight.detach()
    scales = weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7
    assert torch.equal(layer.read().weight.scales, scales)
    assert float(((weight_of(layer) - weight).abs() / scales.repeat_interleave(32, 1)).max()) < 0.501


@pytest.mark.filterwarnings("ignore:torchao quantizes activations otherwise")
def test_zero_points_of_8_bits_are_minima():
    layer = open_checkpoint(FILE).layers["asym8"]  # its scales are bfloat16, so that no product is rounded
    assert layer.scheme.name == "w8a16-g32-min"
    # q * scale and zero * scale are rounded each, where the other library rounds (q - zero) * scale.
    bound = 3 * 255 * load_file(FILE)["asym8._weight_scale"].float().repeat_interleave(32, 1) * 2.0**-24
    assert torch.all((weight_of(layer) - EXPECTED["asym8"]).abs() <= bound)


@pytest.mark.filterwarnings("ignore:torchao quantizes activations otherwise")
def test_minima_that_are_rounded_are_reported(tmp_path):
    tensors, metadata = contents("none")
    tensors["asym8._weight_scale"] = tensors["asym8._weight_scale"].float() / 3
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(LossError, match=r"asym8.zeros: .* minima that float32 cannot hold"):
        open_checkpoint(tmp_path / "x.safetensors").layers["asym8"].read()
    losses = Losses("report")
    open_checkpoint(tmp_path / "x.safetensors", losses).layers["asym8"].read()
    assert losses.entries[0].largest < 2.0**-24


@pytest.mark.filterwarnings("ignore:torchao quantizes activations otherwise")
def test_zero_points_that_are_added_are_minima(tmp_path):
    tensors, metadata = contents()
    torch.manual_seed(0)
    offsets, scales = torch.randn(2, 6).to(torch.bfloat16), (torch.rand(2, 6) + 0.1).to(torch.bfloat16)
    tensors |= {"int4._weight_zero_point": offsets, "int4._weight_scale": scales}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    layer = open_checkpoint(tmp_path / "x.safetensors").layers["int4"]
    assert layer.scheme.name == "w4a16-g32-min"
    packed = tensors["int4._weight_qdata"]
    codes = torch.stack((packed << 4 >> 4, packed >> 4), dim=-1).flatten(1).double()  # of two's complement
    by_column = [tensor.double().t().repeat_interleave(32, 1) for tensor in (scales, offsets)]
    expected = codes * by_column[0] + by_column[1]
    assert float((weight_of(layer) - expected).abs().max()) < 2.0**-22 * float(expected.abs().max())


def said(metadata: dict[str, str], parameter: str, **changes: object) -> str:
    entry = json.loads(metadata[parameter])
    entry["_data"] |= changes
    return json.dumps(entry)


KIND = '{{"_type": "{}", "_data": {{}}}}'


@pytest.mark.filterwarnings("ignore:torchao quantizes activations otherwise")
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("int8.weight", "[" * 90000, "must be a JSON object with a _type"),
        ("int8.weight", '{"_type": 3}', "must be a JSON object with a _type"),
        ("int8.weight", '{"_type": "Int8Tensor"}', "must have a JSON object in _data"),
        ("int8.weight", KIND.format("Int4TilePackedTo4dTensor"), "layout is that of one GPU kernel"),
        ("int8.weight", KIND.format("Int4PlainInt32Tensor"), "layout is that of one device"),
        ("int8.weight", KIND.format("Float8Tensor"), "is a Float8Tensor of torchao, which is not read"),
        ("int8.weight", {"block_size": [1, 63]}, r"must divide \[6, 64\], got \[1, 63\]"),
        ("int8.weight", {"block_size": [0, 64]}, "must be two positive numbers"),
        ("int8.weight", {"block_size": [2, 64]}, r"int8._weight_scale must be \[3, 1\]"),
        ("int8.weight", None, "int8._weight_qdata is part of a quantized weight|int8._weight_scale is part"),
        ("intx4.weight", {"target_dtype": {"_type": "torch.dtype", "_data": "int9"}}, "must be int1 to int8"),
        ("other.weight", KIND.format("Int8Tensor"), "other._weight_qdata is missing for a Int8Tensor"),
        ("dynamic.weight", {"act_quant_kwargs": 5}, "act_quant_kwargs of dynamic.weight must be a JSON object"),
    ],
)
def test_broken_metadata_are_refused(tmp_path, name, text, words):
    tensors, metadata = contents()
    if text is None:
        del metadata[name]
    else:
        metadata[name] = said(metadata, name, **text) if isinstance(text, dict) else text
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore:torchao quantizes activations otherwise")
@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("static._weight_act_pre_scale", torch.ones(64), "multiplies its input by act_pre_scale"),
        ("static._weight_act_quant_scale", torch.ones(2), "must be one float"),
        ("int8._weight_qdata", torch.ones(6, 64), "must be a matrix of torch.int8, got torch.float32"),
    ],
)
def test_tensors_that_no_layer_has_are_refused(tmp_path, name, tensor, words):
    tensors, metadata = contents()
    save_file(tensors | {name: tensor}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore:torchao quantizes activations otherwise")
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("intx4._weight_qdata", 9, "integers of 4 bits, got -8 to 9|got .* to 9"),
        ("asym._weight_zero_point", 9, "4 bits"),
    ],
)
def test_integers_of_more_bits_are_refused(tmp_path, name, value, words):
    tensors, metadata = contents()
    tensors[name][0, 0] = value
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    layer = open_checkpoint(tmp_path / "x.safetensors").layers[name.partition(".")[0]]
    with pytest.raises(ValueError, match=words):
        layer.read()
