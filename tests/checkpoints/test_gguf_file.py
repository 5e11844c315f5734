"""Headers of GGUF files: written ones that the package gguf reads, its own, and broken ones."""

import resource
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.checkpoints.gguf_file import GGUFFile, Written, write_gguf


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(pairs=(), infos=(), magic=b"GGUF", version=3, tensors=None, keys=None, data=bytes(64)) -> bytes:
    counts = struct.pack(
        "<IQQ", version, len(infos) if tensors is None else tensors, len(pairs) if keys is None else keys
    )
    head = magic + counts + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A file that the package gguf wrote."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "", "ü" * 9])
    writer.add_token_scores([0.5, 1.5, -2.0])
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("a.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    rows = np.arange(2 * 34, dtype=np.uint8).reshape(2, 34)
    writer.add_tensor("b.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def test_a_file_of_the_package_gguf_is_read(written):
    file = GGUFFile(written)
    assert file.value("general.architecture") == "llama" and file.value("llama.block_count") == 2
    assert file.value("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert file.array("tokenizer.ggml.tokens") == ["a", "", "ü" * 9] and file.value("tokenizer.ggml.tokens") is None
    assert file.array("tokenizer.ggml.scores") == [0.5, 1.5, -2.0]
    first, second = file.tensors.values()
    assert (first.name, first.shape, first.kind) == ("a.weight", (3, 4), "F32")
    assert torch.equal(file.bytes_of(first).view(torch.float32), torch.arange(12.0).view(3, 4))
    assert (second.shape, second.kind, second.row_bytes) == ((2, 32), "Q8_0", 34)
    assert torch.equal(file.bytes_of(second, slice(1, 2)), torch.arange(34, 68, dtype=torch.uint8).view(1, 34))
    with pytest.raises(ValueError, match="must be an array"):
        file.array("llama.block_count")


@pytest.mark.parametrize("alignment", [32, 64])
def test_a_written_file_is_read_by_the_package_gguf(tmp_path, written, alignment):
    source = GGUFFile(written)
    pairs = written.read_bytes()[slice(*source.pairs)] + (number("general.alignment", 64) if alignment == 64 else b"")
    tensors = [Written(t.name, t.shape, t.kind, lambda t=t: iter(source.bytes_of(t))) for t in source.tensors.values()]
    out = tmp_path / "out.gguf"
    assert list(write_gguf(out, pairs, len(source.metadata) + (alignment == 64), tensors, alignment)) == [
        "a.weight",
        "b.weight",
    ]
    if alignment == 32:
        assert out.read_bytes() == written.read_bytes()
    read = gguf.GGUFReader(out)
    assert [t.name for t in read.tensors] == ["a.weight", "b.weight"] and read.alignment == alignment
    assert np.array_equal(read.tensors[1].data.reshape(-1), np.arange(68, dtype=np.uint8))
    assert [t.begin for t in GGUFFile(out).tensors.values()] == [t.data_offset for t in read.tensors]


SPLIT = text("split.count") + struct.pack("<IH", 2, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the magic needs 4 bytes"),
        (b"GG", "the magic needs 4 bytes"),
        (header(magic=b"FUGG"), "begins with b'FUGG'"),
        (header(version=1), "has version 1"),
        (header(version=0x03000000), "big-endian"),
        (header(tensors=1 << 63), "the number of tensors is 9223372036854775808"),
        (header(keys=1 << 60), "the number of key-value pairs is"),
        (header([struct.pack("<Q", 1 << 40) + b"x"]), "a key must have at most 65535 bytes"),
        (header([text("k") + struct.pack("<IQ", 8, 1 << 62)]), "k must have at most"),
        (header([text("k") + struct.pack("<IIQ", 9, 8, 1 << 62)]), "the length of k is"),
        (header([text("k") + struct.pack("<IIQ", 9, 12, 1 << 61)]), "the length of k is"),
        (header([text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 62)]), "and k needs 46116860184273879"),
        (header([text("k") + struct.pack("<IIQ", 9, 9, 1)]), "array of the type 9"),
        (header([text("k") + struct.pack("<I", 77)]), "k has the unknown type 77"),
        (header([number("k", 1), number("k", 2)]), "the key k stands in it twice"),
        (header([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)]), "no UTF-8"),
        (header([number("general.alignment", 0)]), "power of two"),
        (header([number("general.alignment", 48)]), "power of two"),
        (header([SPLIT]), "one of 3 parts: merge them"),
        (header(infos=[info("w", (), 0, 0)]), "1 to 4 dimensions, got 0"),
        (header(infos=[info("w", (1,) * 5, 0, 0)]), "1 to 4 dimensions, got 5"),
        (header(infos=[info("w", (4, 0), 0, 0)]), "whole blocks"),
        (header(infos=[info("w", (33,), 8, 0)]), "whole blocks of 32 columns"),
        (header(infos=[info("w", (1 << 40, 1 << 40), 0, 0)]), "larger than the file"),
        (header(infos=[info("w", (4,), 77, 0)]), "w has the unknown type 77"),
        (header(infos=[info("w", (4,), 0, 4)]), "no multiple of 32"),
        (header(infos=[info("w", (4,), 0, 64)]), "truncated or damaged"),
        (header(infos=[info("w", (4,), 0, 1 << 63)]), "truncated or damaged"),
        (header(infos=[info("v", (8,), 0, 0), info("w", (4,), 0, 0)]), "overlap"),
        (header(infos=[info("w", (4,), 0, 0), info("w", (4,), 0, 32)]), "the tensor w stands in it twice"),
    ],
)
def test_a_broken_header_is_refused(tmp_path, content, words):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no GGUF file that can be read") as caught:
        GGUFFile(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_became_shorter_is_refused(tmp_path, written):
    path = tmp_path / "model.gguf"
    path.write_bytes(written.read_bytes())
    file = GGUFFile(path)
    path.write_bytes(path.read_bytes()[: file.tensors["b.weight"].begin + 3])
    with pytest.raises(ValueError, match=r"b.weight of .* cannot be read: the file became shorter"):
        file.bytes_of(file.tensors["b.weight"])


def read_all(path: Path) -> None:
    """Everything that a header lets one read."""
    file = GGUFFile(path)
    for key, value in file.metadata.items():
        if value.kind == 9:
            file.array(key)
    for tensor in file.tensors.values():
        assert file.bytes_of(tensor).numel() == tensor.size


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_header_does_harm(tmp_path_factory, written, data):
    content = bytearray(written.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(content) - 9))
        size = data.draw(st.sampled_from((1, 4, 8)))
        huge = st.sampled_from([0, 1, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1])
        value = data.draw(st.one_of(huge, st.integers(0, (1 << 64) - 1)))
        content[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(content)
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_all(path)
    except ValueError as error:
        assert len(str(error)) < 2000
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # kB
