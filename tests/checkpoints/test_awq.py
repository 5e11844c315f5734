"""AWQ GEMM folders, and those of AutoRound, whose layouts are GPTQ's and AWQ's."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkernels as qk
from qkernels.checkpoints.checkpoint import Checkpoint, CheckpointLayer, LayerWeight
from qkernels.checkpoints.losses import Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.checkpoints.requantize import dequantize
from qkernels.formats.scheme import QuantScheme

FILES = Path(__file__).parent / "files"
K_PROJ, DOWN_PROJ = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"
SCHEMES = {  # by the folder: its format and the scheme of its layers
    "gptq": ("gptq", "w4a16-g32"),
    "gptq-asym": ("gptq", "w4a16-g32-asym"),
    "gptq-2bits": ("gptq", "w4a16-g32"),
    "gptq-3bits": ("gptq", "w4a16-g32"),
    "gptq-8bits": ("gptq", "w8a16-g32"),
    "awq": ("awq", "w4a16-g32-asym"),
    "awq-sym": ("awq", "w4a16-g32"),
    "own-gptq": ("auto-round", "w4a16-g32"),
    "own-gptqmodel": ("auto-round", "w4a16-g32-asym"),
    "own-awq": ("auto-round", "w4a16-g32-asym"),
}


def weight_of(checkpoint, name):
    layer = checkpoint.layers[name]
    return dequantize(layer.read(), layer.in_features, layer.scheme)


@pytest.mark.parametrize("folder", SCHEMES)
def test_files_of_autoround_have_the_weights_that_it_computes(folder):
    found = open_checkpoint(FILES / f"auto_round-{folder}")
    expected = json.loads((FILES / f"auto_round-{folder}" / "expected.json").read_text())
    assert found.format == SCHEMES[folder][0] and found.layers.keys() == expected.keys() == {K_PROJ, DOWN_PROJ}
    assert found.layers[DOWN_PROJ].in_features == 96 and found.layers[DOWN_PROJ].out_features == 64
    for name, digest in expected.items():
        assert found.layers[name].scheme.name == SCHEMES[folder][1]
        values = weight_of(found, name) + 0.0  # all zeros positive
        assert hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize("folder", ["gptq", "gptq-8bits", "awq", "awq-sym", "own-gptqmodel", "own-awq"])
def test_files_of_autoround_are_written_with_the_same_bytes(tmp_path, folder):
    kind = "awq" if "awq" in folder else "gptq"
    parse_target(kind)[0].write(open_checkpoint(FILES / f"auto_round-{folder}"), tmp_path / "out", Losses())
    before = load_file(FILES / f"auto_round-{folder}" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() - {f"{name}.g_idx" for name in (K_PROJ, DOWN_PROJ)} <= after.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


def awq_layer(scheme, k=64, n=16, name="m.0.up"):
    scheme = QuantScheme.parse(scheme)
    weight = qk.quantize_weight(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), scheme)
    if weight.zeros is not None:
        weight.zeros.flatten()[:16].copy_(torch.arange(16))
    weight = weight._replace(scales=weight.scales.half().float())
    return CheckpointLayer(name, k, n, scheme, "", (), lambda: LayerWeight(weight))


def edited(folder, tensors=None, **config):
    """A copy of an AWQ folder with other tensors and keys of its config; None takes one away."""
    content = json.loads((folder / "config.json").read_text())
    own = {**content["quantization_config"], **config}
    content["quantization_config"] = {key: value for key, value in own.items() if value is not None}
    target = folder.with_name("edited")
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(content))
    found = load_file(folder / "model.safetensors") | (tensors or {})
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w4a16", "w4a8-g64-asym", "w4a16-asym"])
def test_awq_round_trip(tmp_path, scheme):
    layer = awq_layer(scheme)
    floats = open_checkpoint(FILES / "auto_round-awq").floats
    parse_target("awq")[0].write(Checkpoint("float", {}, {layer.name: layer}, floats), tmp_path / "a", Losses())
    found = open_checkpoint(tmp_path / "a")
    own, read = layer.read().weight, found.layers[layer.name].read().weight
    assert found.layers[layer.name].scheme == layer.scheme.of_floats
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(own, read, strict=True))
    old = {"bits": None, "w_bit": 4, "group_size": None, "q_group_size": layer.scheme.group_size or -1}
    assert torch.equal(
        weight_of(open_checkpoint(edited(tmp_path / "a", **old)), layer.name), weight_of(found, layer.name)
    )


def test_an_early_folder_has_its_config_beside(tmp_path):
    layer = awq_layer("w4a16-g32-asym")
    parse_target("awq")[0].write(Checkpoint("float", {}, {layer.name: layer}, {}), tmp_path / "a", Losses())
    (tmp_path / "a" / "config.json").write_text('{"model_type": "x"}')
    early = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "a" / "quant_config.json").write_text(json.dumps(early))
    found = open_checkpoint(tmp_path / "a")
    assert found.format == "awq" and torch.equal(weight_of(found, layer.name), weight_of_layer(layer))


def weight_of_layer(layer):
    return dequantize(layer.read(), layer.in_features, layer.scheme)


def test_what_awq_cannot_be_is_named(tmp_path):
    layer, writer = awq_layer("w4a16-g32-asym"), parse_target("awq")[0]
    writer.write(Checkpoint("float", {}, {layer.name: layer}, {}), tmp_path / "a", Losses())
    name = layer.name
    for config, tensors, words in (
        *(({"version": layout}, {}, f"must be gemm to be read, got '{layout}'") for layout in ("gemv", "gemv_fast")),
        *(({"format": layout}, {}, f"must be gemm to be read, got '{layout}'") for layout in ("llm-awq", "marlin")),
        ({"version": "exllama"}, {}, "must be gemm to be read, got 'exllama'"),
        ({"bits": 8}, {}, "bits of m.0.up must be 4 for AWQ, got 8"),
        ({"group_size": None}, {}, "group_size of m.0.up must be -1 or a number from 1 on, got None"),
        ({"group_size": 48}, {}, "must have groups of 48 input features, got 64"),
        ({"group_size": 64}, {}, r"qzeros must be torch.int32 of shape \[1, 2\]"),
        ({"zero_point": False}, {}, "qzeros must be 8 everywhere"),
        ({"zero_point": 1}, {}, "zero_point must be true or false"),
        ({}, {f"{name}.qzeros": None}, "m.0.up.qzeros is missing"),
        ({}, {f"{name}.scales": None}, "m.0.up.scales is missing"),
        ({}, {f"{name}.qweight": torch.zeros(64, 2)}, "qweight must be an int32 matrix"),
        ({}, {"m.0.act.scales": torch.ones(4)}, "m.0.act.scales scales the output of an activation function"),
        ({}, {f"{name}.qweight": None}, "no tensor is called .qweight"),
    ):
        with pytest.raises(ValueError, match=words):
            open_checkpoint(edited(tmp_path / "a", tensors, **config))
    for wrong, words in (
        (awq_layer("w8a16"), "it has 4-bit weights"),
        (awq_layer("w4a16-g32", k=72), "input features must be a multiple of 32"),
        (awq_layer("w4a16-g32", n=12), "output features must be a multiple of 8, got 12"),
    ):
        with pytest.raises(ValueError, match=words):
            writer.write(Checkpoint("float", {}, {name: wrong}, {}), tmp_path / "b", Losses())
    two = {name: layer, "m.0.down": awq_layer("w4a16-g64-asym", name="m.0.down")}
    with pytest.raises(ValueError, match="AWQ has one group size for all layers"):
        writer.write(Checkpoint("float", {}, two, {}), tmp_path / "b", Losses())
    assert not (tmp_path / "b").exists()


def test_groups_of_16_are_those_of_8_bits(tmp_path):
    layer = awq_layer("w4a16-g32-asym", k=32)
    parse_target("awq")[0].write(Checkpoint("float", {}, {layer.name: layer}, {}), tmp_path / "a", Losses())
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    before = weight_of(open_checkpoint(tmp_path / "a"), layer.name)
    scales, zeros = (tensors[f"{layer.name}.{part}"] for part in ("scales", "qzeros"))
    twice = {f"{layer.name}.scales": torch.cat([scales, scales * 2]), f"{layer.name}.qzeros": zeros.repeat(2, 1)}
    found = open_checkpoint(edited(tmp_path / "a", twice, group_size=16))
    assert found.layers[layer.name].scheme.name == "w8a16-g16"
    doubled = torch.cat([before[:, :16], before[:, 16:] * 2], dim=1)
    assert torch.equal(weight_of(found, layer.name), doubled)


def test_settings_of_autoround(tmp_path):
    source = FILES / "auto_round-own-gptqmodel"
    folder = tmp_path / "a"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((source / file).read_bytes())
    expected = weight_of(open_checkpoint(source), K_PROJ)
    extra = {K_PROJ: {"bits": 4, "group_size": 32}, r".*mlp\..*": {"group_size": 32}, "lm_head": {"bits": 16}}
    wrong = {"bits": 8, "group_size": 64}
    assert torch.equal(
        weight_of(
            open_checkpoint(
                edited(
                    folder,
                    **wrong,
                    extra_config={
                        K_PROJ: {"bits": 4, "group_size": 32},
                        r".*mlp\..*": {"bits": 4, "group_size": 32},
                    },
                )
            ),
            K_PROJ,
        ),
        expected,
    )
    assert torch.equal(weight_of(open_checkpoint(edited(folder, extra_config=extra)), K_PROJ), expected)
    for config, words in (
        ({"packing_format": "auto_round:nvfp4"}, "packing_format must be one of .* got 'auto_round:nvfp4'"),
        ({"data_type": "mx_fp"}, "data_type of .* must be int to be read, got 'mx_fp'"),
        ({"act_bits": 8}, "act_bits of .* must be 16 in this layout, got 8"),
        ({"bits": 6}, "bits of .* must be 2, 3, 4 or 8, got 6"),
        ({"rotation_config": {"x": 1}}, "rotation_config says that weights were rotated"),
        ({"extra_config": {K_PROJ: {"bits": 16}}}, "bits of .*k_proj must be 2, 3, 4 or 8, got 16"),
        ({"extra_config": {"(": {}}}, "extra_config must have names or regular expressions"),
    ):
        with pytest.raises(ValueError, match=words):
            open_checkpoint(edited(folder, **config))
