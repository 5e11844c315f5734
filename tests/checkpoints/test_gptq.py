"""GPTQ folders: both versions, activation order, what their labels and writers get wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qkernels.checkpoints.checkpoint import Checkpoint, CheckpointLayer, LayerWeight
from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.checkpoints.requantize import dequantize
from qkernels.formats.rules import quantize_weight
from qkernels.formats.scheme import QuantScheme


def words_of(rows, bits):
    """Dense streams [R, n], low bits first, as int32 [R, ceil(n * bits / 32)], by numbers of any size."""
    count = -(-rows.shape[1] * bits // 32)
    streams = [sum(int(code) << i * bits for i, code in enumerate(row)) for row in rows]
    words = [np.frombuffer(stream.to_bytes(count * 4, "little"), np.int32) for stream in streams]
    return torch.from_numpy(np.stack(words).copy())


def gptq_tensors(codes, zeros, scales, bits, version=1, indices=None):
    """The tensors of GPTQ for codes [N, K], zeros [N, G], scales [N, G]."""
    tensors = {
        "qweight": words_of(codes, bits).t().contiguous(),
        "qzeros": words_of((zeros - int(version == 1)).t(), bits),
        "scales": scales.t().to(torch.float16).contiguous(),
    }
    return tensors if indices is None else {**tensors, "g_idx": indices.to(torch.int32)}


def folder_of(path, layers, config, beside=False):
    """A folder of GPTQ with these tensors of layers."""
    path.mkdir()
    tensors = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    save_file({**tensors, "norm.weight": torch.ones(4)}, path / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True} | config
    config = {key: value for key, value in config.items() if value is not None}
    if beside:
        (path / "config.json").write_text('{"model_type": "x"}')
        (path / "quantize_config.json").write_text(json.dumps(config))
    else:
        (path / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": config}))
    return path


def sample(bits=4, n=32, k=96, group_size=32, zeros=None, order=None):
    """Codes [N, K], zeros [N, G], scales [N, G] that float16 holds, group of each column, and the float weight."""
    generator = torch.Generator().manual_seed(bits * 1000 + k)
    groups = -(-k // group_size)
    codes = torch.randint(1 << bits, (n, k), generator=generator)
    if bits == 8:
        codes.clamp_(1)
    given = torch.full((n, groups), 1 << bits - 1) if zeros is None else zeros(n, groups, generator)
    scales = (torch.rand(n, groups, generator=generator) + 0.5).to(torch.float16).to(torch.float32)
    indices = torch.arange(k) // group_size
    if order is not None:
        indices = indices[torch.randperm(k, generator=generator)]
    weight = (codes - given[:, indices]).to(torch.float32) * scales[:, indices]
    return codes, given, scales, indices, weight


def some_zeros(low, high):
    return lambda n, groups, generator: torch.randint(low, high + 1, (n, groups), generator=generator)


def read_weight(checkpoint, name="proj"):
    layer = checkpoint.layers[name]
    return dequantize(layer.read(), layer.in_features, layer.scheme)


@pytest.mark.parametrize(
    ("bits", "group_size", "scheme"),
    [(4, 32, "w4a16-g32"), (4, 96, "w4a16"), (8, 32, "w8a16-g32"), (2, 32, "w4a16-g32"), (3, 32, "w4a16-g32")],
)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [None, "shuffled", "missing"])
def test_symmetric_layers_are_exact_whatever_the_label_says(tmp_path, bits, group_size, scheme, version, order):
    codes, zeros, scales, indices, weight = sample(
        bits, group_size=group_size, order="x" if order == "shuffled" else None
    )
    tensors = gptq_tensors(codes, zeros, scales, bits, version, None if order == "missing" else indices)
    stated = {"bits": bits, "group_size": -1 if group_size == 96 else group_size}
    for at, config in enumerate(({}, {"format": "gptq"}, {"checkpoint_format": "gptq_v2"}, {"sym": None})):
        found = open_checkpoint(folder_of(tmp_path / str(at), {"proj": tensors}, {**stated, **config}))
        assert found.format == "gptq" and found.config == {"model_type": "x"} and set(found.floats) == {"norm.weight"}
        layer = found.layers["proj"]
        assert layer.scheme == QuantScheme.parse(scheme)
        assert layer.has_input_order == (order == "shuffled" and group_size != 96)
        assert layer.details.startswith(f"GPTQ v{version}")
        assert torch.equal(read_weight(found), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("version", [1, 2])
def test_zero_points(tmp_path, bits, version):
    low, high = (1, (1 << bits) - 1) if version == 1 else (0, (1 << bits) - 1)
    codes, zeros, scales, indices, weight = sample(bits, zeros=some_zeros(low, high), order="x")
    tensors = gptq_tensors(codes, zeros, scales, bits, version, indices)
    config = {"bits": bits, "sym": False, "format": "gptq" if version == 1 else "gptq_v2"}
    found = open_checkpoint(folder_of(tmp_path / "in", {"proj": tensors}, config))
    assert found.layers["proj"].scheme.name == "w4a16-g32-asym"
    assert torch.equal(read_weight(found), weight)


def test_fields_of_15_in_version_1_mean_different_things(tmp_path):
    """Zero 0 of GPTQModel borrows from the next field, which its reader gives back."""
    codes, zeros, scales, _, weight = sample(zeros=some_zeros(0, 15))
    tensors = gptq_tensors(codes, zeros, scales, 4, version=2)
    words = (tensors["qzeros"].numpy().view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    tensors["qzeros"] = torch.from_numpy(words.copy())
    config = {"sym": False, "format": "gptq", "meta": {"quantizer": ["gptqmodel:7.0.0"]}}
    assert torch.equal(read_weight(open_checkpoint(folder_of(tmp_path / "ours", {"proj": tensors}, config))), weight)
    fields = np.stack([words >> at & 15 for at in range(0, 32, 4)])
    unknown = folder_of(tmp_path / "unknown", {"proj": tensors}, {**config, "meta": {"quantizer": "auto-gptq"}})
    with pytest.raises(ValueError, match=rf"proj.qzeros holds 15 in {(fields == 15).sum()} of 96 fields"):
        open_checkpoint(unknown)


def test_symmetric_layers_of_3_bits_that_gptqmodel_wrote(tmp_path):
    codes, zeros, scales, _, weight = sample(3)
    tensors = gptq_tensors(codes, zeros, scales, 3, version=2)
    subtracted = np.array([0x24924924, 0x92492492, 0x49249249], np.uint32)
    words = (tensors["qzeros"].numpy().view(np.uint32) - subtracted).view(np.int32)
    tensors["qzeros"] = torch.from_numpy(words.copy())
    config = {"bits": 3, "format": "gptq", "meta": {"quantizer": ["gptqmodel:7.0.0"]}}
    found = open_checkpoint(folder_of(tmp_path / "in", {"proj": tensors}, config))
    assert found.layers["proj"].scheme.name == "w4a16-g32" and torch.equal(read_weight(found), weight)


@pytest.mark.parametrize(
    ("group_size", "k", "scheme"), [(256, 640, "w4a16-g128"), (192, 384, "w4a16-g64"), (48, 96, "w8a16-g16")]
)
def test_other_groups_are_repeated(tmp_path, group_size, k, scheme):
    codes, zeros, scales, indices, weight = sample(k=k, group_size=group_size)
    tensors = gptq_tensors(codes, zeros, scales, 4, 1, indices)
    found = open_checkpoint(folder_of(tmp_path / "in", {"proj": tensors}, {"group_size": group_size}))
    assert found.layers["proj"].scheme.name == scheme and torch.equal(read_weight(found), weight)


@pytest.mark.parametrize(
    ("bits", "group_size", "zeros", "why"),
    [
        (4, 8, None, "no scheme has groups of 8"),
    ],
)
def test_what_no_scheme_has_is_quantized_again_when_that_is_allowed(tmp_path, bits, group_size, zeros, why):
    codes, given, scales, indices, weight = sample(bits, group_size=group_size, zeros=zeros)
    config = {"bits": bits, "group_size": group_size, "sym": None, "format": "gptq_v2"}
    folder = folder_of(tmp_path / "in", {"proj": gptq_tensors(codes, given, scales, bits, 2, indices)}, config)
    for policy in ("refuse", "report"):
        with pytest.raises(LossError, match=why):
            open_checkpoint(folder, Losses(policy))
    losses = Losses("requantize")
    found = read_weight(open_checkpoint(folder, losses))
    (entry,) = losses.entries
    assert entry.total == weight.numel() and 0 < entry.largest < (0.15 if bits == 4 else 0.01)
    assert float((found - weight).abs().max() / weight.abs().max()) == pytest.approx(entry.largest, rel=1e-4)


def test_8_bits_with_zero_points_have_minima(tmp_path):
    codes, zeros, scales, indices, weight = sample(8, zeros=some_zeros(100, 140))
    tensors = gptq_tensors(codes, zeros, scales, 8, 2, indices)
    found = open_checkpoint(
        folder_of(tmp_path / "in", {"proj": tensors}, {"bits": 8, "sym": None, "format": "gptq_v2"})
    )
    assert found.layers["proj"].scheme.name == "w8a16-g32-min" and torch.equal(read_weight(found), weight)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-g64-asym", "w8a16", "w4a16", "w8a8-g128"])
def test_a_written_folder_has_the_same_bytes_after_it_was_read(tmp_path, scheme):
    scheme = QuantScheme.parse(scheme)
    weight = quantize_weight(torch.randn(32, 160, generator=torch.Generator().manual_seed(0)), scheme)
    weight = weight._replace(scales=weight.scales.to(torch.float16).to(torch.float32))
    other = quantize_weight(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), "w8a16-g32")
    other = other._replace(scales=other.scales.to(torch.float16).to(torch.float32))
    order = torch.randperm(160, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    layers = {
        "model.layers.0.a": CheckpointLayer("model.layers.0.a", 160, 32, scheme, "", (), lambda: LayerWeight(weight)),
        "model.layers.0.b": CheckpointLayer(
            "model.layers.0.b", 160, 32, scheme, "", (), lambda: LayerWeight(weight, None, order), True
        ),
        "lm_head": CheckpointLayer(
            "lm_head", 64, 64, QuantScheme.parse("w8a16-g32"), "", (), lambda: LayerWeight(other)
        ),
    }
    writer, _ = parse_target("gptq")
    writer.write(Checkpoint("float", {"model_type": "x"}, layers, {}), tmp_path / "first", Losses())
    config = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    assert config["format"] == config["checkpoint_format"] == ("gptq" if scheme.symmetric else "gptq_v2")
    assert config["lm_head"] and config["desc_act"] == (scheme.group_size is not None)
    assert config["dynamic"].keys() == {r"+:^lm_head$"}
    found = open_checkpoint(tmp_path / "first")
    for name, layer in layers.items():
        read = found.layers[name].read()
        if not layer.has_input_order:  # that is sorted within the groups
            assert torch.equal(read.weight.qweight, layer.read().weight.qweight)
        ours = dequantize(layer.read(), layer.in_features, layer.scheme)
        assert torch.equal(ours, dequantize(read, layer.in_features, found.layers[name].scheme))
    writer.write(found, tmp_path / "second", Losses())
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_scales_are_rounded_with_a_report(tmp_path):
    weight = quantize_weight(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), "w4a16-g32")
    layer = CheckpointLayer("p", 64, 32, QuantScheme.parse("w4a16-g32"), "", (), lambda: LayerWeight(weight))
    model, losses = Checkpoint("float", {}, {"p": layer}, {}), Losses("report")
    writer, _ = parse_target("gptq")
    with pytest.raises(LossError, match=r"p.scales: \d+ of 64 scales that float16 cannot hold"):
        writer.write(model, tmp_path / "out", Losses())
    writer.write(model, tmp_path / "out", losses)
    assert losses.entries[0].tensor == "p.scales" and losses.entries[0].largest < 2**-11
    weight.scales.mul_(1e7)
    with pytest.raises(ValueError, match=r"p.scales must be at most 65504 for float16"):
        writer.write(model, tmp_path / "large", losses)
    assert not (tmp_path / "large").exists()


def test_bf16_scales_and_a_config_beside(tmp_path):
    codes, zeros, scales, indices, _ = sample()
    tensors = gptq_tensors(codes, zeros, scales, 4, 1, indices)
    tensors["scales"] = tensors["scales"].to(torch.bfloat16)
    tensors["bias"] = torch.ones(32, dtype=torch.bfloat16)
    config = {"quant_method": None, "desc_act": False, "damp_percent": 0.01}
    found = open_checkpoint(folder_of(tmp_path / "in", {"proj": tensors}, config, beside=True))
    weight = (codes - 8) * scales.to(torch.bfloat16).to(torch.float32)[:, indices]
    assert found.format == "gptq" and torch.equal(read_weight(found), weight)
    assert set(found.floats) == {"norm.weight", "proj.bias"}
    assert "quantize_config.json" not in [file.name for file in found.files]


def test_dynamic_gives_layers_settings_of_their_own(tmp_path):
    four, eight = sample(), sample(8, group_size=96)
    layers = {"m.0.a": gptq_tensors(*four[:3], 4, 1, four[3]), "m.0.b": gptq_tensors(*eight[:3], 8, 1, eight[3])}
    dynamic = {r"-:.*\.c$": {}, r"+:.*\.b$": {"bits": 8, "group_size": -1}}
    found = open_checkpoint(folder_of(tmp_path / "in", layers, {"dynamic": dynamic}))
    assert [layer.scheme.name for layer in found.layers.values()] == ["w4a16-g32", "w8a16"]
    assert torch.equal(read_weight(found, "m.0.b"), eight[4])
    contradicting = folder_of(tmp_path / "no", layers, {"dynamic": {r"-:m\.0": {}}})
    with pytest.raises(ValueError, match=r"m.0.a has a qweight, but dynamic says"):
        open_checkpoint(contradicting)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"format": "marlin"}, "must be gptq or gptq_v2 to be read, got 'marlin'"),
        ({"checkpoint_format": "bitblas"}, "got 'bitblas'"),
        ({"format": "gptq_p"}, "got 'gptq_p'"),
        ({"pack_dtype": "int16"}, "pack_dtype must be int32"),
        ({"bits": 5}, "bits of proj must be 2, 3, 4 or 8, got 5"),
        ({"bits": None}, "bits of proj must be 2, 3, 4 or 8, got None"),
        ({"bits": 8}, "proj.qweight must be"),
        ({"group_size": None}, "group_size of proj must be -1 or a number from 1 on, got None"),
        ({"group_size": 0}, "group_size of proj must be"),
        ({"group_size": 64}, r"proj.qzeros must be torch.int32 of shape \[2, 4\]"),
        ({"dynamic": {"+:(": {}}}, "dynamic must have regular expressions"),
        ({"sym": False, "format": "gptq_v2"}, "symmetric layers in version 1 of GPTQ, but the config says sym=false"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, config, words):
    codes, zeros, scales, indices, _ = sample()
    folder = folder_of(tmp_path / "in", {"proj": gptq_tensors(codes, zeros, scales, 4, 1, indices)}, config)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(folder)


def test_tensors_that_do_not_fit(tmp_path):
    codes, zeros, scales, indices, _ = sample()
    good = gptq_tensors(codes, zeros, scales, 4, 1, indices)
    broken = {
        "qzeros is missing": {name: tensor for name, tensor in good.items() if name != "qzeros"},
        "scales must be torch.float16 of shape": {**good, "scales": good["scales"][:2].contiguous()},
        "qweight must be a matrix": {**good, "qweight": good["qweight"].flatten()},
        "g_idx must be a vector of int32": {**good, "g_idx": good["g_idx"].to(torch.float32)},
        "g_idx must give each group 32": {**good, "g_idx": torch.zeros(96, dtype=torch.int32)},
    }
    for at, (words, tensors) in enumerate(broken.items()):
        with pytest.raises(ValueError, match=f"proj.{words}"):
            open_checkpoint(folder_of(tmp_path / str(at), {"proj": tensors}, {}))
    mixed = {"a": good, "b": gptq_tensors(codes, zeros, scales, 4, 2, indices)}
    with pytest.raises(
        ValueError, match="of 2 layers with sym=true in the config, 1 have the zero points of version 1"
    ):
        open_checkpoint(folder_of(tmp_path / "mixed", mixed, {}))


def test_what_gptq_cannot_hold(tmp_path):
    weight = quantize_weight(torch.randn(8, 60), "w4a16-g32")
    layer = CheckpointLayer("p", 60, 8, QuantScheme.parse("w4a16-g32"), "", (), lambda: LayerWeight(weight))
    with pytest.raises(ValueError, match=r"GPTQ cannot hold p \(w4a16-g32\): .*input features must be a multiple of 8"):
        parse_target("gptq")[0].write(Checkpoint("float", {}, {"p": layer}, {}), tmp_path / "out", Losses("report"))


def test_float_layers_of_a_block_are_named_in_the_config(tmp_path):
    codes, zeros, scales, indices, _ = sample()
    folder = folder_of(tmp_path / "in", {"m.0.a": gptq_tensors(codes, zeros, scales, 4, 1, indices)}, {})
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "m.0.gate.weight": torch.ones(4, 4), "embed.weight": torch.ones(4, 4)}, folder / "model.safetensors"
    )
    parse_target("gptq")[0].write(open_checkpoint(folder), tmp_path / "out", Losses())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {r"-:^m\.0\.gate$": {}} and not config["lm_head"] and not config["desc_act"]
