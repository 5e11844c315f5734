"""MLX folders: affine codes of all widths, in and out."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkernels as qk
from qkernels.checkpoints.checkpoint import Checkpoint, CheckpointLayer, LayerWeight
from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.checkpoints.requantize import dequantize
from qkernels.formats.scheme import QuantScheme
from qkernels.formats.storage import QuantizedWeight

FOLDER = Path(__file__).parent / "files" / "mlx"


def weight_of(checkpoint, name):
    layer = checkpoint.layers[name]
    return dequantize(layer.read(), layer.in_features, layer.scheme)


def test_files_of_mlx_have_the_weights_that_it_computes():
    found = open_checkpoint(FOLDER)
    expected = json.loads((FOLDER / "expected.json").read_text())
    assert found.format == "mlx" and found.config == {"model_type": "llama"} and found.layers.keys() == expected.keys()
    assert set(found.floats) == {"layers.0.bits4.bias", "embed.weight"}
    for name, digest in expected.items():
        bits, group = int(name[-1]), 32 if name.endswith("8") else 64
        assert found.layers[name].scheme.name == f"w{4 if bits < 5 else 8}a16-g{group}-min"
        values = weight_of(found, name) + 0.0
        assert hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest() == digest


def random_layer(scheme, name="layers.0.up", k=128, n=16):
    scheme = QuantScheme.parse(scheme)
    generator = torch.Generator().manual_seed(0)
    shapes = scheme.storage_shapes(k, n)
    if scheme.weight_bits == 8:
        qweight = torch.randint(-128, 128, shapes["qweight"], generator=generator).to(torch.int8)
    else:
        qweight = torch.randint(256, shapes["qweight"], generator=generator).to(torch.uint8)
    scales = torch.randn(shapes["scales"], generator=generator).to(torch.bfloat16).to(torch.float32)
    zeros = None
    if scheme.has_min:
        zeros = torch.randn(shapes["zeros"], generator=generator).to(torch.bfloat16).to(torch.float32)
    elif scheme.zeros is not None:
        zeros = torch.arange(scales.numel()).view_as(scales).remainder(16).to(torch.uint8)
    weight = QuantizedWeight(qweight, scales, zeros)
    return CheckpointLayer(name, k, n, scheme, "", (), lambda: LayerWeight(weight))


@pytest.mark.parametrize("scheme", ["w4a16-g32-min", "w4a16-g64-asym", "w4a8-g128", "w8a16-g32", "w8a16", "w4a16-asym"])
def test_a_written_folder_has_the_same_integers_and_bytes_after_it_was_read(tmp_path, scheme):
    layers = {"layers.0.up": random_layer(scheme), "layers.0.down": random_layer("w8a16-g32", "layers.0.down", 64)}
    writer = parse_target("mlx")[0]
    floats = open_checkpoint(FOLDER).floats
    writer.write(Checkpoint("float", {"model_type": "x"}, layers, floats), tmp_path / "a", Losses())
    found = open_checkpoint(tmp_path / "a")
    for name, layer in layers.items():
        own, read = layer.read().weight, found.layers[name].read().weight
        assert torch.equal(own.qweight, read.qweight) and (own.zeros is None) == (read.zeros is None)
        assert torch.equal(dequantize(layer.read(), layer.in_features, layer.scheme), weight_of(found, name))
        kept = found.layers[name].scheme
        assert (kept.weight_bits, kept.zeros) == (layer.scheme.weight_bits, layer.scheme.zeros)
    writer.write(found, tmp_path / "b", Losses())
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_minima_of_8_bits_come_back(tmp_path):
    layer = random_layer("w8a16-g64-min")
    model, losses = Checkpoint("float", {}, {layer.name: layer}, {}), Losses("report")
    parse_target("mlx")[0].write(model, tmp_path / "a", losses)
    found = weight_of(open_checkpoint(tmp_path / "a", losses), layer.name)
    exact = dequantize(layer.read(), layer.in_features, layer.scheme)
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-6)


def test_bf16_is_written_with_a_report(tmp_path):
    layer = CheckpointLayer(
        "up", 64, 8, QuantScheme.parse("w4a16-g32-asym"), "", (),
        lambda: LayerWeight(qk.quantize_weight(torch.ones(8, 1) - torch.arange(64) / 50, "w4a16-g32-asym")),
    )  # fmt: skip
    writer, target = parse_target("mlx:bf16")
    model, losses = Checkpoint("float", {}, {"up": layer}, {}), Losses("report")
    with pytest.raises(LossError, match=r"up.scales: \d+ of 16 scales that torch.bfloat16 cannot hold"):
        writer.write(model, tmp_path / "a", Losses(), target)
    writer.write(model, tmp_path / "a", losses, target)
    assert {entry.tensor for entry in losses.entries} == {"up.scales", "up.biases"}
    assert all(entry.largest < 2**-8 for entry in losses.entries)
    assert load_file(tmp_path / "a" / "model.safetensors")["up.scales"].dtype == torch.bfloat16


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    def edited(tensors=(), **quantization):
        (tmp_path / "a").mkdir(exist_ok=True)
        config = json.loads((FOLDER / "config.json").read_text())["quantization"] | quantization
        (tmp_path / "a" / "config.json").write_text(json.dumps({"quantization": config}))
        found = {**load_file(FOLDER / "model.safetensors"), **dict(tensors)}
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        save_file(kept, tmp_path / "a" / "model.safetensors")
        return tmp_path / "a"

    four = "layers.0.bits4"
    for folder, words in (
        (lambda: edited(mode="mxfp4"), "mode of layers.0.bits.* must be affine to be read, got 'mxfp4'"),
        (lambda: edited(bits=7), "bits of layers.0.bits4 must be one of 2, 3, 4, 5, 6, 8, got 7"),
        (lambda: edited(group_size=16), "group_size of layers.0.bits4 must be one of 32, 64, 128, got 16"),
        (lambda: edited(**{four: False}), "layers.0.bits4 has scales, but the config says that it is not quantized"),
        (lambda: edited(bits=8), r"layers.0.bits4.weight must be torch.uint32 of shape \[16, 32\]"),
        (lambda: edited({f"{four}.biases": None}.items()), r"layers.0.bits4.biases is missing"),
        (lambda: edited({f"{four}.weight": torch.zeros(2, 3, 4)}.items()), "stacked experts are not read"),
    ):
        with pytest.raises(ValueError, match=words):
            open_checkpoint(folder())
    writer = parse_target("mlx")[0]
    for layer, words in (
        (random_layer("w4a16-g32", k=80), "must be a multiple of 32"),
        (random_layer("w8a16-g16"), "it has groups of 32, 64, 128"),
    ):
        with pytest.raises(ValueError, match=words):
            writer.write(Checkpoint("float", {}, {layer.name: layer}, {}), tmp_path / "b", Losses())
    assert not (tmp_path / "b").exists()


def test_mlx_itself_reads_what_is_written(tmp_path):
    mx = pytest.importorskip("mlx.core")
    layer = random_layer("w4a16-g64-asym")
    parse_target("mlx")[0].write(Checkpoint("float", {}, {layer.name: layer}, {}), tmp_path / "a", Losses())
    tensors = mx.load(str(tmp_path / "a" / "model.safetensors"))
    parts = [tensors[f"{layer.name}.{part}"] for part in ("weight", "scales", "biases")]
    theirs = torch.tensor(mx.dequantize(*parts, group_size=64, bits=4).tolist())
    ours = dequantize(layer.read(), layer.in_features, layer.scheme)
    torch.testing.assert_close(theirs, ours, atol=2e-6, rtol=1e-6)
