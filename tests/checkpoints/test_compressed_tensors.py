"""Folders of compressed-tensors: what the library wrote is read, what is written is what it would write."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkernels.checkpoints.bits import pack_codes
from qkernels.checkpoints.checkpoint import Checkpoint, CheckpointLayer, FloatTensor, LayerWeight
from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.checkpoints.requantize import dequantize
from qkernels.formats.rules import quantize_weight
from qkernels.formats.scheme import QuantScheme

FOLDER = Path(__file__).with_name("files") / "compressed-tensors"
WRITTEN, EXPECTED = load_file(FOLDER / "model.safetensors"), load_file(FOLDER / "expected.safetensors")
CONFIG = json.loads((FOLDER / "config.json").read_text())
SCHEMES = {
    "four": "w4a16-g32",
    "four_asym": "w4a16-g32-asym",
    "four_row": "w4a16",
    "four_tensor": "w4a16-asym",
    "four_wide": "w4a16-g128",
    "four_ag": "w4a8-g32-asym-ag32",
    "one": "w4a16-g32",
    "two_asym": "w4a16-g64-asym",
    "three_asym": "w4a16-g64-asym",
    "five": "w8a16-g32",
    "six_asym": "w8a16",
    "seven_asym": "w8a16-g32",
    "eight": "w8a16-g32",
    "eight_asym": "w8a16-g32-min",
    "w8a8": "w8a8",
    "w8a8_tensor": "w8a8",
    "w8a8_static": "w8a8s",
    "naive": "w8a16-g32",
}


def folder_of(path: Path, names: list[str], changes: dict | None = None, **settings: object) -> Path:
    """A folder with these layers of the fixture, other tensors, and other settings."""
    path.mkdir()
    kept = {name: t for name, t in WRITTEN.items() if any(name.startswith(f"block.{n}.") for n in names)}
    save_file({n: t for n, t in (kept | (changes or {})).items() if t is not None}, path / "model.safetensors")
    quantization = dict(CONFIG["quantization_config"])
    groups = quantization["config_groups"].items()
    quantization["config_groups"] = {
        name: group for name, group in groups if group["targets"][0].removeprefix("block.") in names
    }
    config = CONFIG | {"quantization_config": quantization | settings}
    (path / "config.json").write_text(json.dumps(config))
    return path


def group(folder: Path, **changes: object) -> Path:
    """The folder with another first config group: its own settings, or `weights__num_bits` and the like."""
    config = json.loads((folder / "config.json").read_text())
    found = next(iter(config["quantization_config"]["config_groups"].values()))
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            found[part][field] = value
        else:
            found[part] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", SCHEMES)
def test_what_the_library_wrote(tmp_path, name):
    layer = open_checkpoint(folder_of(tmp_path / "in", [name])).layers[f"block.{name}"]
    assert layer.scheme.name == SCHEMES[name]
    values = layer.read()
    # The library multiplies in the dtype of the scales, bfloat16; the float32 product is that before its rounding.
    weight = dequantize(values, layer.in_features, layer.scheme)
    assert torch.equal(weight.to(torch.bfloat16), EXPECTED[f"block.{name}"])
    assert (values.x_scale is not None) == (name == "w8a8_static")


def test_import_and_export_are_the_identity(tmp_path):
    kept = WRITTEN
    folder = folder_of(tmp_path / "in", [*SCHEMES], {"lm_head.weight": kept["lm_head.weight"]})
    parse_target("compressed-tensors")[0].write(open_checkpoint(folder), tmp_path / "out", Losses())
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == kept.keys()
    for name, tensor in kept.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["four", "four_asym", "four_row", "eight", "w8a8", "w8a8_static", "four_ag"])
def test_the_canonical_storage_is_written_as_the_library_writes_it(tmp_path, name):
    found = open_checkpoint(folder_of(tmp_path / "in", [name]))
    bare = {key: replace(layer, source=None) for key, layer in found.layers.items()}
    target, suffix = parse_target("compressed-tensors:bf16")
    target.write(replace(found, layers=bare, metadata={}), tmp_path / "out", Losses(), suffix)
    again = load_file(tmp_path / "out" / "model.safetensors")
    kept = {key: tensor for key, tensor in WRITTEN.items() if key.startswith(f"block.{name}.")}
    assert again.keys() == kept.keys()
    for key, tensor in kept.items():
        assert again[key].dtype == tensor.dtype and torch.equal(again[key], tensor), key
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (ours,), (theirs,) = written["config_groups"].values(), open_group(found)
    for part in ("weights", "input_activations"):
        told = {k: v for k, v in (ours[part] or {}).items() if v is not None}
        own = (theirs[part] or {}).items()  # without what only calibration needs
        assert told == {k: v for k, v in own if v is not None and k not in ("observer_kwargs", "zp_dtype")}
    assert ours["targets"] == [f"block.{name}"] and written["format"] == theirs["format"]


def open_group(found: Checkpoint) -> list[dict]:
    return list(found.metadata["quantization_config"]["config_groups"].values())


def in_memory(scheme: str, out_features: int = 10, in_features: int = 128, input_order: bool = False) -> Checkpoint:
    torch.manual_seed(0)
    parsed = QuantScheme.parse(scheme)
    weight = quantize_weight(torch.randn(out_features, in_features), parsed)
    order = torch.randperm(in_features).to(torch.int32) if input_order else None
    x_scale = torch.tensor([0.3]) if parsed.static_activations else None
    layer = CheckpointLayer(
        "up", in_features, out_features, parsed, "", (), lambda: LayerWeight(weight, x_scale, order), input_order
    )
    return Checkpoint(
        "memory", {}, {"up": layer}, {"norm.weight": FloatTensor((4,), torch.float32, lambda: torch.ones(4))}
    )


WRITABLE = "w8a8 w8a8s w8a8-g32 w8a8-ag64 w8a16-g64 w8a16 w8a16-g16 w4a8-g32-asym w4a16-g128 w4a16-asym".split()


@pytest.mark.parametrize("scheme", WRITABLE)
def test_every_scheme_is_written_and_read(tmp_path, scheme):
    written = in_memory(scheme)
    parse_target("compressed-tensors")[0].write(written, tmp_path / "out", Losses())
    layer, source = open_checkpoint(tmp_path / "out").layers["up"], written.layers["up"].read()
    assert layer.scheme.name == scheme
    values = layer.read()
    for ours, theirs in zip((*values.weight, values.x_scale), (*source.weight, source.x_scale), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_scales_in_the_dtype_of_the_model_are_a_loss(tmp_path):
    target, suffix = parse_target("compressed-tensors:bf16")
    with pytest.raises(LossError, match=r"up.scales: \d+ of 40 scales that torch.bfloat16 cannot hold"):
        target.write(in_memory("w4a16-g32"), tmp_path / "out", Losses(), suffix)
    losses = Losses("report")
    target.write(in_memory("w4a16-g32"), tmp_path / "out", losses, suffix)
    assert [loss.tensor for loss in losses.entries] == ["up.scales"] and losses.entries[0].largest < 2**-8


def test_groups_that_do_not_divide_the_features(tmp_path):
    target = parse_target("compressed-tensors")[0]
    with pytest.raises(ValueError, match=r"cannot hold up \(w4a16-g128\): of its schemes, w4a16-g32 is the nearest"):
        target.write(in_memory("w4a16-g128", in_features=160), tmp_path / "out", Losses("report"))
    losses = Losses("requantize")
    target.write(in_memory("w4a16-g128", in_features=160), tmp_path / "out", losses)
    assert not losses.entries  # the scales are repeated
    assert open_checkpoint(tmp_path / "out").layers["up"].scheme.name == "w4a16-g32"


def test_columns_in_another_order(tmp_path):
    target, written = parse_target("compressed-tensors")[0], in_memory("w8a16-g32", input_order=True)
    with pytest.raises(ValueError, match="columns in another order are no longer read"):
        target.write(written, tmp_path / "out", Losses())
    losses = Losses("requantize")
    target.write(written, tmp_path / "out", losses)
    source, layer = written.layers["up"], open_checkpoint(tmp_path / "out").layers["up"]
    exact = dequantize(source.read(), 128, source.scheme)
    assert (
        losses.entries and (dequantize(layer.read(), 128, layer.scheme) - exact).abs().max() < exact.abs().max() / 127
    )


def test_old_files_have_an_order_of_columns(tmp_path):
    groups = torch.arange(64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))] // 32
    changes = {"block.four.weight_g_idx": groups.to(torch.int32)}
    folder = group(folder_of(tmp_path / "in", ["four"], changes), weights__actorder="group")
    layer = open_checkpoint(folder).layers["block.four"]
    assert layer.has_input_order
    integers = (
        EXPECTED["block.four"].float() / WRITTEN["block.four.weight_scale"].float().repeat_interleave(32, 1)
    ).round()
    weight = dequantize(layer.read(), 64, layer.scheme)
    assert torch.equal(weight, integers * WRITTEN["block.four.weight_scale"].float()[:, groups])
    parse_target("compressed-tensors")[0].write(open_checkpoint(folder), tmp_path / "out", Losses())
    assert "block.four.weight_g_idx" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("groups", [torch.arange(64) // 32, torch.full((64,), -1)])
def test_an_order_that_is_none(tmp_path, groups):
    changes = {"block.four.weight_g_idx": groups.to(torch.int32)}
    layer = open_checkpoint(folder_of(tmp_path / "in", ["four"], changes)).layers["block.four"]
    assert not layer.has_input_order and layer.read().input_order is None


@pytest.mark.parametrize("bits", [2, 4])
def test_groups_of_16_are_those_of_8_bits(tmp_path, bits):
    torch.manual_seed(bits)
    codes, zeros = (torch.randint(1 << bits, (10, n), dtype=torch.uint8) for n in (64, 4))
    scales = torch.rand(10, 4) + 0.1
    parts = {"packed": pack_codes(codes, bits), "scale": scales}
    parts["zero_point"] = pack_codes(zeros.t().contiguous(), bits).t().contiguous()
    changes = {f"block.four.weight_{part}": tensor for part, tensor in parts.items()}
    folder = folder_of(tmp_path / "in", ["four"], changes)
    group(folder, weights__num_bits=bits, weights__symmetric=False, weights__group_size=16)
    layer = open_checkpoint(folder).layers["block.four"]
    assert layer.scheme.name == "w8a16-g16"
    integers = codes.float() - zeros.float().repeat_interleave(16, 1)
    assert torch.equal(dequantize(layer.read(), 64, layer.scheme), integers * scales.repeat_interleave(16, 1))


def old_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of as many whole codes as they hold, the layout of old files."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[1] % per_word)).unflatten(
        1, (-1, per_word)
    )
    words = (padded << torch.arange(per_word) * bits).sum(-1)
    return words.to(torch.int32)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_old_files_are_packed_with_gaps(tmp_path, bits):
    torch.manual_seed(bits)
    codes = torch.randint(1 << bits, (64, 64), dtype=torch.uint8)
    zeros = torch.randint(1 << bits, (64, 2), dtype=torch.uint8)
    scales = torch.rand(64, 2) + 0.1
    shape = torch.tensor([64, 64])

    def written(pack) -> dict[str, torch.Tensor]:
        parts = {"packed": pack(codes, bits), "shape": shape, "scale": scales}
        parts["zero_point"] = pack(zeros.t().contiguous(), bits).t().contiguous()
        return {f"block.four.weight_{part}": tensor for part, tensor in parts.items()}

    found = []
    for name, pack in (("old", old_words), ("new", pack_codes)):
        folder = folder_of(tmp_path / name, ["four"], written(pack))
        layer = open_checkpoint(group(folder, weights__num_bits=bits, weights__symmetric=False)).layers["block.four"]
        found.append(dequantize(layer.read(), 64, layer.scheme))
    integers = codes.float() - zeros.float().repeat_interleave(32, 1)
    assert torch.equal(found[0], integers * scales.repeat_interleave(32, 1))
    assert torch.equal(found[0], found[1])


def test_words_that_may_be_packed_in_two_ways(tmp_path):
    codes = torch.randint(8, (4, 20), dtype=torch.uint8)

    def weight(packed: torch.Tensor, name: str) -> torch.Tensor:
        changes = {"packed": packed, "shape": torch.tensor([4, 20]), "scale": torch.ones(4, 1)}
        folder = folder_of(tmp_path / name, ["four"], {f"block.four.weight_{k}": t for k, t in changes.items()})
        layer = open_checkpoint(group(folder, weights__num_bits=3)).layers["block.four"]
        return dequantize(layer.read(), 20, layer.scheme)

    assert torch.equal(weight(pack_codes(codes, 3), "new"), codes.float() - 4)
    with pytest.raises(ValueError, match="20 codes of 3 bits in 2 words, which may be packed in two ways"):
        weight(old_words(codes, 3), "old")


def test_eight_bits_with_zero_points_and_long_scales(tmp_path):
    scales = torch.rand(4, 2) + 0.1
    folder = folder_of(tmp_path / "in", ["eight_asym"], {"block.eight_asym.weight_scale": scales})
    with pytest.raises(LossError, match=r"block.eight_asym.weight: \d+ of 256 weights that float minima round"):
        open_checkpoint(folder).layers["block.eight_asym"].read()
    losses = Losses("report")
    open_checkpoint(folder, losses).layers["block.eight_asym"].read()
    assert losses.entries[0].largest < 2**-22


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"num_bits": 4, "strategy": "token", "dynamic": True}, "activations of 4 bits, type int"),
        ({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}, "activations of 8 bits, type float"),
        ({"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False}, "asymmetric activations"),
        ({"num_bits": 8, "strategy": "group", "group_size": 48, "dynamic": True}, "dynamic activations a group of 48"),
    ],
)
def test_activations_that_have_no_scheme(tmp_path, inputs, words):
    folder = group(folder_of(tmp_path / "in", ["four"]), input_activations=inputs)
    with pytest.raises(LossError, match=f"block.four: {words} have no scheme here, they would stay float"):
        open_checkpoint(folder)
    layer = open_checkpoint(folder, Losses("report")).layers["block.four"]
    assert layer.scheme.name == "w4a16-g32" and words in layer.details and layer.source is None


def test_static_activations_with_a_zero_point(tmp_path):
    changes = {"block.w8a8_static.input_zero_point": torch.tensor([3], dtype=torch.int8)}
    folder = folder_of(tmp_path / "in", ["w8a8_static"], changes)
    with pytest.raises(LossError, match="static activations with a zero point have no scheme"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, Losses("report")).layers["block.w8a8_static"].scheme.name == "w8a16"
    zero = {"block.w8a8_static.input_zero_point": torch.tensor([0], dtype=torch.int8)}
    found = open_checkpoint(folder_of(tmp_path / "zero", ["w8a8_static"], zero))
    assert found.layers["block.w8a8_static"].scheme.name == "w8a8s"


def test_what_is_dropped_is_told(tmp_path):
    cache = {"block.attn.k_scale": torch.ones(1), "block.attn.v_scale": torch.ones(1)}
    folder = folder_of(tmp_path / "in", ["four"], cache, kv_cache_scheme={"num_bits": 8})
    group(folder, output_activations={"num_bits": 8})
    with pytest.warns(UserWarning) as told:
        found = open_checkpoint(folder)
    assert {str(w.message).partition(" ")[0] for w in told} == {"kv_cache_scheme", "output_activations"}
    assert list(found.floats) == ["block.four.bias"]
    parse_target("compressed-tensors")[0].write(found, tmp_path / "out", Losses())
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "kv_cache_scheme" not in written and not written["config_groups"]["group_0"].get("output_activations")


def of(scheme: dict, *targets: str) -> dict:
    return scheme | {"targets": list(targets)}


def test_the_group_of_a_layer_is_found_as_the_library_finds_it(tmp_path):
    plain = CONFIG["quantization_config"]["config_groups"]
    four, eight = plain["group_0"], plain["group_12"]
    for number, groups in enumerate(
        [
            [of(eight, "Linear"), of(four, "re:.*four$")],
            [of(eight, "re:.*"), of(four, "block.four")],
            [of(four, "Linear")],
            [of(eight, "Embedding"), of(four, "Linear")],
            [of(eight, "re:.*z"), of(four, "re:block")],
        ]
    ):
        settings = {"config_groups": {f"group_{i}": g for i, g in enumerate(groups)}}
        folder = folder_of(tmp_path / str(number), ["four"], **settings)
        assert open_checkpoint(folder).layers["block.four"].scheme.name == "w4a16-g32"
    for number, (groups, words) in enumerate(
        [
            ([of(four, "re:other")], "no config group has it as a target"),
            ([of(four, "Linear"), of(eight, "Conv1D")], "block.four may be of any of the classes Linear, Conv1D"),
        ]
    ):
        settings = {"config_groups": {f"group_{i}": g for i, g in enumerate(groups)}}
        with pytest.raises(ValueError, match=words):
            open_checkpoint(folder_of(tmp_path / f"bad{number}", ["four"], **settings))


def test_an_embedding_is_a_layer(tmp_path):
    embedding = {
        f"model.embed_tokens.{n.removeprefix('block.four.')}": t for n, t in WRITTEN.items() if ".four.weight" in n
    }
    groups = CONFIG["quantization_config"]["config_groups"]
    settings = {"config_groups": {"a": of(groups["group_12"], "Linear"), "b": of(groups["group_0"], "Embedding")}}
    folder = folder_of(tmp_path / "in", [], embedding, **settings)
    assert open_checkpoint(folder).layers["model.embed_tokens"].scheme.name == "w4a16-g32"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "marlin-24", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask weights"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config rotates activations"),
        ({"quantization_status": "frozen"}, "quantization_status must be 'compressed', got 'frozen'"),
        ({"config_groups": {}}, "config_groups must be groups of layers"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "W4A16 of config_groups must be an object with targets"),
    ],
)
def test_folders_that_are_not_read_say_what_to_do(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        open_checkpoint(folder_of(tmp_path / "in", ["four"], **settings), Losses("requantize"))


FORMATS = ["float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "marlin-24", "dense"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *[({"format": name}, f"{name} of group_0 is not read") for name in FORMATS],
        ({"weights__type": "float"}, "weights.type must be 'int'"),
        ({"weights__num_bits": 9}, "weights.num_bits must be 1 to 8, got 9"),
        ({"weights__num_bits": "4"}, "weights.num_bits must be 1 to 8, got '4'"),
        ({"weights__strategy": "block"}, "weights.strategy must be 'group', 'channel' or 'tensor'"),
        ({"weights__group_size": None}, "weights.group_size must be a positive number"),
        ({"weights__group_size": 64}, r"weight_scale must be float \[10, 1\], got torch.bfloat16 \[10, 2\]"),
        ({"weights__num_bits": 8}, r"weight_packed must be 8 bits of a weight \[10, 64\]"),
        ({"weights__symmetric": False}, "weight_zero_point must be integers .* got nothing"),
        ({"weights": 3}, "weights must be an object"),
        ({"input_activations": 3}, "input_activations must be an object"),
        ({"targets": ["block.four", "block.more"]}, None),
    ],
)
def test_broken_groups_are_refused(tmp_path, changes, words):
    folder = group(folder_of(tmp_path / "in", ["four"]), **changes)
    if words is None:
        assert open_checkpoint(folder).layers  # a target may name a module that the file has not
        return
    with pytest.raises(ValueError, match=words):
        open_checkpoint(folder, Losses("requantize"))


@pytest.mark.parametrize(
    ("name", "part", "tensor", "words"),
    [
        ("four", "weight_packed", torch.zeros(10, 8, dtype=torch.uint8), "must be an int32 matrix"),
        ("four", "weight_packed", torch.zeros(10, 9, dtype=torch.int32), "as weight_shape says, got"),
        ("four", "weight_packed", None, "weight must be an int8 matrix, got nothing"),
        ("four", "weight_shape", None, "weight_shape must be two integers, got nothing"),
        ("four", "weight_shape", torch.tensor([10, -64]), "weight_packed must be 4 bits of a weight"),
        ("four", "weight_shape", torch.tensor([10, 1 << 60]), "weight_packed must be 4 bits of a weight"),
        ("four", "weight_scale", None, "weight_scale must be float .* got nothing"),
        ("four", "weight_scale", torch.ones(10, 2, dtype=torch.int32), "weight_scale must be float"),
        ("four", "weight_scale", torch.full((10, 2), torch.nan), "scales must be finite"),
        ("four", "weight_g_idx", torch.zeros(64, dtype=torch.int32), "must give each group 32 input features"),
        ("four", "weight_g_idx", torch.zeros(63, dtype=torch.int32), "must be 64 numbers of groups"),
        ("four_asym", "weight_zero_point", torch.zeros(2, 3, dtype=torch.int32), "weight_zero_point must be integers"),
        ("w8a8", "weight", torch.zeros(6, 64), "weight must be an int8 matrix, got torch.float32"),
        ("four_ag", "weight", torch.full((4, 64), 8, dtype=torch.int8), r"must be in \[-8, 7\] for 4 bits, got 8 to 8"),
        ("w8a8_static", "input_scale", None, "input_scale is missing for static activations"),
        ("w8a8_static", "input_scale", torch.zeros(1), "x_scale must be finite and at least"),
    ],
)
def test_broken_tensors_are_refused(tmp_path, name, part, tensor, words):
    with pytest.raises(ValueError, match=words):
        open_checkpoint(folder_of(tmp_path / "in", [name], {f"block.{name}.{part}": tensor})).layers[
            f"block.{name}"
        ].read()


def test_a_layer_that_lost_its_scale_is_no_float(tmp_path):
    changes = {f"block.four.weight_{part}": None for part in ("packed", "scale")}
    with pytest.raises(
        ValueError, match=r"block.four.weight_shape is of a quantized layer, but block.four has no weight_scale"
    ):
        open_checkpoint(folder_of(tmp_path / "in", ["four"], changes))
    with pytest.raises(ValueError, match=r"block.w8a8 is a target of group_14, but has no weight_scale"):
        open_checkpoint(folder_of(tmp_path / "int", ["w8a8"], {"block.w8a8.weight_scale": None}))
