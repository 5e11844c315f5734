"""Streams of codes, safetensors files, folders: what every format of checkpoints stands on."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qkernels.checkpoints.bits import pack_codes, unpack_codes
from qkernels.checkpoints.checkpoint import Checkpoint, CheckpointLayer, FloatTensor, LayerWeight
from qkernels.checkpoints.losses import Loss, LossError, Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.checkpoints.safetensors_files import INDEX, SINGLE, SafetensorsFiles
from qkernels.checkpoints.safetensors_writer import SafetensorsWriter
from qkernels.formats.rules import quantize_weight
from qkernels.formats.scheme import QuantScheme


@given(bits=st.integers(1, 8), count=st.integers(1, 70), rows=st.integers(1, 3), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_a_stream_of_codes_is_dense_and_low_bits_come_first(bits, count, rows, seed):
    codes = torch.randint(1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_codes(codes, bits)
    assert words.shape == (rows, -(-count * bits // 32)) and words.dtype == torch.int32
    for row, packed in zip(codes.tolist(), words.view(torch.uint8).tolist(), strict=True):
        assert int.from_bytes(bytes(packed), "little") == sum(code << i * bits for i, code in enumerate(row))
    assert torch.equal(unpack_codes(words, bits, count), codes)


def test_too_short_a_stream_is_refused():
    with pytest.raises(ValueError, match="words must hold 9 codes of 4 bits a row, got 4 bytes"):
        unpack_codes(torch.zeros(2, 1, dtype=torch.int32), 4, 9)


def test_written_tensors_are_those_that_the_library_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randint(-9, 9, (7,), dtype=torch.int8),
        "c": torch.randn(4, 4).to(torch.bfloat16).t(),
        "empty": torch.empty(0, 3),
        "d": torch.tensor(2.5, dtype=torch.float16),
    }
    (tmp_path / "one").mkdir()
    writer = SafetensorsWriter(tmp_path / "one")
    for name, tensor in tensors.items():
        writer.add(name, {name: tensor})
    writer.close()
    assert [file.name for file in (tmp_path / "one").iterdir()] == [SINGLE]
    (tmp_path / "many").mkdir()
    writer = SafetensorsWriter(tmp_path / "many", most_bytes=64)
    for name, tensor in tensors.items():
        writer.add(name, {name: tensor})
    writer.close()
    assert (tmp_path / "many" / INDEX).exists()
    read = {
        name: tensor for file in (tmp_path / "many").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    for found in (load_file(tmp_path / "one" / SINGLE), read):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    files = SafetensorsFiles(tmp_path / "many")
    assert all(torch.equal(files.tensor(name), tensor) for name, tensor in tensors.items())


def header_of(**entry) -> bytes:
    encoded = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 8, "a header of 18446744073709551615 bytes"),
        (header_of()[:-1], "truncated or damaged"),
        (header_of() + b"0", "truncated or damaged"),
        (header_of(dtype="F31"), "dtype 'F31'"),
        (header_of(shape=[3]), "cannot lie in bytes 0 to 8"),
        (header_of(shape=[-2]), "from 0 on"),
        (header_of(shape=[2.0]), "from 0 on"),
        (header_of(shape=[1 << 62, 1 << 62]), "cannot lie"),
        (header_of(data_offsets=[8, 16]), "begins at byte 8"),
        (header_of(more=1), "must have dtype, shape and data_offsets"),
        ((2).to_bytes(8, "little") + b"[]", "header is a list"),
        ((7).to_bytes(8, "little") + b'{"w": 0', "no safetensors file"),
        ((13).to_bytes(8, "little") + b'{"w":1,"w":2}', "stands in it twice"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "no safetensors file"),
    ],
)
def test_a_broken_header_is_refused(tmp_path, content, words):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model") as caught:
        SafetensorsFiles(file)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", "a/b.safetensors", "model.bin"])
def test_an_index_names_files_of_its_own_folder(tmp_path, name):
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match=r"must name .safetensors files of its own folder"):
        SafetensorsFiles(folder)


def test_an_index_that_names_the_wrong_file(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"v": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"says that v is in a.safetensors, where it is not"):
        SafetensorsFiles(tmp_path)


def test_pickles_are_not_read(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is a pickle, which can run any program"):
        SafetensorsFiles(tmp_path)


def checkpoint(scheme: str = "w4a16-g32-asym") -> Checkpoint:
    torch.manual_seed(0)
    parsed = QuantScheme.parse(scheme)
    weight, norm = quantize_weight(torch.randn(8, 64), parsed), torch.randn(64)
    layer = CheckpointLayer("block.proj", 64, 8, parsed, "", (), lambda: LayerWeight(weight))
    return Checkpoint(
        "memory",
        {"model_type": "x"},
        {"block.proj": layer},
        {"norm.weight": FloatTensor((64,), norm.dtype, lambda: norm)},
    )


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym-ag32", "w4a16-g128", "w8a16-g32"])
def test_our_own_folder_keeps_every_bit(tmp_path, scheme):
    written, told = checkpoint(scheme), []
    target, _ = parse_target("qkernels")
    target.write(written, tmp_path / "out", Losses(), progress=lambda *state: told.append(state))
    assert told == [(1, 2, "block.proj"), (2, 2, "norm.weight")]
    read = open_checkpoint(tmp_path / "out")
    assert read.format == "qkernels" and read.config == {"model_type": "x"}
    layer = read.layers["block.proj"]
    assert layer.scheme.name == scheme
    for ours, theirs in zip(layer.read().weight, written.layers["block.proj"].read().weight, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert torch.equal(read.floats["norm.weight"].read(), written.floats["norm.weight"].read())


def test_a_float_folder_rounds_only_where_that_was_allowed(tmp_path):
    exact, _ = parse_target("float:f32")
    exact.write(checkpoint(), tmp_path / "f32", Losses(), "f32")
    assert open_checkpoint(tmp_path / "f32").config == {"model_type": "x", "dtype": "float32"}
    rounded, target = parse_target("float:bf16")
    with pytest.raises(LossError, match=r"block.proj.weight: \d+ of 512 weights that torch.bfloat16 cannot hold"):
        rounded.write(checkpoint(), tmp_path / "bf16", Losses(), target)
    assert not (tmp_path / "bf16").exists() and [file.name for file in tmp_path.iterdir()] == ["f32"]
    losses = Losses("report")
    rounded.write(checkpoint(), tmp_path / "bf16", losses, target)
    entry, of_norm = losses.entries
    assert isinstance(entry, Loss) and entry.total == 512 and 0 < entry.largest < 2**-8
    assert of_norm.tensor == "norm.weight" and of_norm.total == 64  # float32 before
    written = open_checkpoint(tmp_path / "bf16")
    assert {name: tensor.read().dtype for name, tensor in written.floats.items()} == {
        "block.proj.weight": torch.bfloat16,
        "norm.weight": torch.bfloat16,
    }


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError):
        parse_target("qkernels")[0].write(checkpoint(), tmp_path / "out", Losses())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_unknown_formats_and_targets_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"format must be one of .*qkernels.*, got 'zip'"):
        parse_target("zip")
    with pytest.raises(ValueError, match="target of float must be one of f32, bf16, f16, got 'f8'"):
        parse_target("float:f8")
    with pytest.raises(ValueError, match="has no known format; known are"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="on_loss must be one of"):
        Losses("ignore")


def test_a_format_of_weights_alone_warns_of_int8_activations():
    with pytest.warns(UserWarning, match=r"says nothing of int8 activations, which 1 layers have, such as block.proj"):
        parse_target("gptq")[0].warn_of_activations(checkpoint("w4a8-g32-asym"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_target("gptq")[0].warn_of_activations(checkpoint())
        parse_target("qkernels")[0].warn_of_activations(checkpoint("w8a8"))
        parse_target("compressed-tensors")[0].warn_of_activations(checkpoint("w8a8"))
