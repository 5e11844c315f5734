"""HQQ folders: every packing, groups along inputs and along outputs."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.registry import open_checkpoint
from qkernels.checkpoints.requantize import dequantize

FOLDER = Path(__file__).parent / "files" / "hqq"
SCHEMES = {
    "l.0.four": "w4a16-g64-min",
    "l.0.row": "w4a16-min",
    "l.0.eight": "w8a16-g64-min",
    "l.0.three": "w4a16-g64-min",
    "l.0.two": "w4a16-g32-min",
    "l.0.one": "w4a16-g32-min",
}


def weight_of(checkpoint, name):
    layer = checkpoint.layers[name]
    return dequantize(layer.read(), layer.in_features, layer.scheme)


def edited(target, changes=(), only="l.0.four"):
    """A folder with one layer of the file, some of whose tensors are others."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((FOLDER / "config.json").read_bytes())
    found = {name: tensor for name, tensor in load_file(FOLDER / "model.safetensors").items() if name.startswith(only)}
    found |= {f"{only}.{part}": tensor for part, tensor in dict(changes).items()}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, target / "model.safetensors")
    return target


def test_files_of_hqq_have_the_weights_that_it_computes(tmp_path):
    expected = json.loads((FOLDER / "expected.json").read_text())
    for name, scheme in SCHEMES.items():
        found = open_checkpoint(edited(tmp_path / name, only=name))
        assert found.format == "hqq" and found.layers[name].scheme.name == scheme
        values = weight_of(found, name) + 0.0
        assert hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest() == expected[name]
        assert set(found.floats) <= {f"{name}.bias"}
    assert set(found.config) == {"model_type"}


def test_whole_zero_points_are_kept_as_integers(tmp_path):
    zeros = load_file(FOLDER / "model.safetensors")["l.0.four.zero"].round()
    found = open_checkpoint(edited(tmp_path / "asym", {"zero": zeros}))
    assert found.layers["l.0.four"].scheme.name == "w4a16-g64-asym"
    assert torch.equal(found.layers["l.0.four"].read().weight.zeros, zeros.view(16, 2).to(torch.uint8))
    for name, half in (("l.0.four", 8), ("l.0.eight", 128), ("l.0.two", 2)):
        tensors = load_file(FOLDER / "model.safetensors")
        floats = torch.full_like(tensors[f"{name}.zero"], half)
        plain = open_checkpoint(edited(tmp_path / name, {"zero": floats}, only=name))
        assert plain.layers[name].scheme.symmetric
        close = open_checkpoint(edited(tmp_path / name, {"zero": floats + 2**-4 * (half < 100)}, only=name))
        moved = weight_of(close, name) + tensors[f"{name}.scale"].float().view(16, -1).repeat_interleave(
            128 // (tensors[f"{name}.scale"].numel() // 16), 1
        ) * (2**-4 * (half < 100))
        torch.testing.assert_close(weight_of(plain, name), moved)


def test_groups_along_outputs_are_quantized_again_when_that_is_allowed(tmp_path):
    folder = edited(tmp_path / "a", only="l.0.outputs")
    with pytest.raises(LossError, match=r"l.0.outputs: its groups run over the outputs \(axis 0\)"):
        open_checkpoint(folder, Losses("report"))
    losses = Losses("requantize")
    found = open_checkpoint(folder, losses)
    weight = weight_of(found, "l.0.outputs")
    tensors = load_file(folder / "model.safetensors")
    packed = tensors["l.0.outputs.W_q"]
    codes = torch.cat([packed >> 4, packed & 15]).float()
    exact = (codes - tensors["l.0.outputs.zero"].float()) * tensors["l.0.outputs.scale"].float()
    exact = exact.reshape(16, 128)
    (entry,) = losses.entries
    assert entry.tensor == "l.0.outputs.weight" and 0 < entry.largest < 0.1
    assert float((weight - exact).abs().max() / exact.abs().max()) == pytest.approx(entry.largest, rel=1e-4)


def test_floats_that_hold_bytes_are_seen_as_bytes(tmp_path):
    packed = load_file(FOLDER / "model.safetensors")["l.0.four.W_q"]
    folder = edited(
        tmp_path / "a", {"W_q": packed.view(torch.float16), "view_as_float": torch.tensor(1, dtype=torch.uint8)}
    )
    assert torch.equal(
        weight_of(open_checkpoint(folder), "l.0.four"), weight_of(open_checkpoint(edited(tmp_path / "b")), "l.0.four")
    )


def text(value):
    return torch.tensor([ord(letter) for letter in value], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing": text("5bit_u8")}, "packing must be one of .*, got '5bit_u8'"),
        ({"nbits": torch.tensor(3, dtype=torch.int32)}, "nbits must be 4 to be read"),
        ({"quant_zero": torch.tensor(1, dtype=torch.uint8)}, "quant_zero must be 0 to be read"),
        ({"zero": None, "zero_q": torch.zeros(4)}, "zero is missing: l.0.four.zero_q is quantized"),
        ({"axis": torch.tensor(2, dtype=torch.int32)}, "axis must be 0 or 1"),
        ({"shape": torch.tensor([16])}, "shape and group_size must say"),
        ({"shape": torch.tensor([16, 1 << 40])}, "W_q must be .* bytes"),
        ({"shape": torch.zeros(200, dtype=torch.int64)}, "shape must be a few integers"),
        ({"group_size": torch.tensor(0, dtype=torch.int32)}, "group_size must divide"),
        ({"W_q": torch.zeros(3, 64, dtype=torch.uint8)}, "W_q must be 1024 bytes of 4bit_u8"),
        ({"scale": torch.zeros(3, 1)}, r"scale must be a float tensor of shape \[32, 1\]"),
        ({"W_q": None}, "no tensor is called .W_q"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        open_checkpoint(edited(tmp_path / "a", changes))


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "config.json").write_bytes((FOLDER / "config.json").read_bytes())
    torch.save({}, tmp_path / "qmodel.pt")
    with pytest.raises(FileNotFoundError, match=r"qmodel.pt is a pickle"):
        open_checkpoint(tmp_path)
