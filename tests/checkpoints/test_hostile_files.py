"""Checkpoints that somebody broke, by accident or on purpose: each is read, or refused by one clear error, at once.

Every format is attacked alike: what `files/` holds, and what we write. Nothing but a `ValueError` (or the
`FileNotFoundError` of a file that is named and not there) may come out, nothing large may be allocated for what a
header only claims, and no pickle is ever loaded.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_files import BYTES, is_read_or_refused, little_memory, read_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qkernels.checkpoints.checkpoint import Checkpoint, CheckpointLayer, FloatTensor, LayerWeight
from qkernels.checkpoints.folder import FolderFormat
from qkernels.checkpoints.losses import Losses
from qkernels.checkpoints.registry import FORMATS
from qkernels.checkpoints.safetensors_files import INDEX, SINGLE, SafetensorsFiles
from qkernels.formats.rules import quantize_weight
from qkernels.formats.scheme import QuantScheme

FILES = Path(__file__).parent / "files"
CONFIG = "config.json"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

quickly = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def ours(folder: Path, name: str) -> None:
    """A folder that we write in the format of this name."""
    torch.manual_seed(0)
    scheme = QuantScheme.parse("w4a16-g32-asym")
    weight, norm = quantize_weight(torch.randn(32, 64), scheme), torch.randn(64)
    layer = CheckpointLayer("block.proj", 64, 32, scheme, "", (), lambda: LayerWeight(weight))
    floats = {"norm.weight": FloatTensor((64,), norm.dtype, lambda: norm)}
    checkpoint = Checkpoint("", {"model_type": "x"}, {layer.name: layer}, floats)
    FORMATS[name].write(checkpoint, folder, Losses("report"))


def folders() -> list[str]:
    """What can stand in a folder: all that we write, and what other libraries wrote."""
    written = [f"ours/{name}" for name, found in FORMATS.items() if found.writes and isinstance(found, FolderFormat)]
    files = [path.name for path in FILES.glob("*.safetensors") if "expected" not in path.name]
    return [*written, *sorted(path.parent.relative_to(FILES).as_posix() for path in FILES.glob(f"**/{CONFIG}")), *files]


@pytest.fixture(params=folders())
def sound(request, tmp_path) -> Path:
    """A folder that is read."""
    name = request.param
    folder = tmp_path / "sound" / name.replace("/", "-")
    if name.endswith(".safetensors"):
        folder.mkdir(parents=True)
        shutil.copyfile(FILES / name, folder / SINGLE)
        (folder / CONFIG).write_text(json.dumps({"model_type": "x"}))
    elif (FILES / name).is_dir():
        shutil.copytree(FILES / name, folder)
        for file in folder.glob("expected*"):
            file.unlink()
    else:
        ours(folder, name.removeprefix("ours/"))
    assert is_read_or_refused(folder) is None
    return folder


def copied(sound: Path) -> Path:
    """The folder of one example."""
    folder = sound.parent.parent / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(sound, folder)


def test_an_allocation_is_noticed():
    with little_memory(), pytest.raises(RuntimeError, match="memory"):
        torch.empty(2 * BYTES, dtype=torch.uint8)


numbers = st.sampled_from([-1, 0, 1, 3, 7, 16, 1 << 31, 1 << 40, 1 << 62, 10**300, 0.5, -0.0, 1e308, True])
texts = st.sampled_from(["", "x", "F32", "U8", "../x", "\0", "é" * 300, "re:(a+)+$", "w8a8", "w4a8-g32", "-1"])
plain = st.none() | numbers | texts
hostile = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(value, data):
    """The value with one place replaced, removed or doubled."""
    value = json.loads(json.dumps(value))
    path = data.draw(st.sampled_from(list(places(value))))
    if not path:
        return data.draw(hostile)
    *above, key = path
    parent = value
    for step in above:
        parent = parent[step]
    action = data.draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
    if action == "replace":
        parent[key] = data.draw(hostile)
    else:
        old = parent.pop(key)
        if action == "rename" and isinstance(parent, dict):
            parent[data.draw(texts) + str(key)] = old
    return value


@quickly
@given(data=st.data())
def test_a_changed_config(sound, data):
    folder = copied(sound)
    config = json.loads((folder / CONFIG).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        config = changed(config, data)
    (folder / CONFIG).write_text(json.dumps(config))
    is_read_or_refused(folder)


def split(file: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and the data."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file: Path, header: object, data: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@quickly
@given(data=st.data())
def test_a_changed_header(sound, data):
    folder = copied(sound)
    header, content = split(folder / SINGLE)
    join(folder / SINGLE, changed(header, data), content)
    is_read_or_refused(folder)


SIZES = {"U8": 1, "I8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= {"F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8}


@quickly
@given(data=st.data())
def test_tensors_of_another_shape_dtype_content_or_name_under_a_sound_header(sound, data):
    folder = copied(sound)
    header, content = split(folder / SINGLE)
    metadata = header.pop("__metadata__", {})
    tensors = {n: [e["dtype"], e["shape"], content[slice(*e["data_offsets"])]] for n, e in header.items()}
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        dtype, shape, raw = tensors[name]
        action = data.draw(st.sampled_from(["dtype", "shape", "cut", "bytes", "drop", "rename", "swap"]))
        count = len(raw) // SIZES[dtype]
        if action == "dtype":
            dtype = data.draw(st.sampled_from([d for d, size in SIZES.items() if len(raw) % size == 0]))
            shape = [len(raw) // SIZES[dtype]] if data.draw(st.booleans()) else [1, len(raw) // SIZES[dtype]]
        elif action == "shape":
            shape = data.draw(st.sampled_from([[count], [1, count], [count, 1], [1, count, 1]]))
        elif action == "cut":
            count = data.draw(st.integers(0, count))
            raw, shape = raw[: count * SIZES[dtype]], [count]
        elif action == "bytes" and raw:
            at = data.draw(st.integers(0, len(raw) - 1))
            new = data.draw(st.binary(min_size=1, max_size=16))[: len(raw) - at]
            raw = raw[:at] + new + raw[at + len(new) :]
        elif action == "drop" and len(tensors) > 1:
            del tensors[name]
            continue
        elif action == "rename":
            suffix = data.draw(st.sampled_from(["x", ".weight", ".qweight", ".scales", ".g_idx", ".weight_packed"]))
            del tensors[name]
            name = name.rpartition(".")[0] + suffix
        elif action == "swap":
            dtype, shape, raw = tensors[data.draw(st.sampled_from(sorted(tensors)))]
        tensors[name] = [dtype, shape, raw]
    header, joined = {"__metadata__": metadata}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(joined), len(joined) + len(raw)]}
        joined += raw
    join(folder / SINGLE, header, joined)
    is_read_or_refused(folder)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """The GGUF file of a model of one block, by the package gguf."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for key, value in (
        ("block_count", 1), ("context_length", 32), ("embedding_length", 64), ("feed_forward_length", 96),
        ("head_count", 2), ("head_count_kv", 1), ("layer_norm_rms_eps", 1e-6), ("rope_dimension_count", 32),
    ):  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{at}" for at in range(32)])
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()} | {"token_embd.weight": (32, 64)}
    for name, shape in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "attn" in name else gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quants.quantize(rng.standard_normal(shape, np.float32), kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    read_all(path)
    return path


@settings(quickly, max_examples=60)
@given(data=st.data())
def test_a_gguf_file_whose_numbers_or_names_changed(gguf_file, tmp_path, data):
    content = bytearray(gguf_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 1800))
        size = data.draw(st.sampled_from((1, 4, 8)))
        value = data.draw(st.sampled_from([0, 1, 2, 7, 0x7F, 0xFF, 458754, (1 << 31) - 1, 1 << 31, (1 << 63) - 1]))
        content[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    is_read_or_refused(path)


def test_a_gguf_file_of_more_blocks_than_tensors(gguf_file, tmp_path):
    content = bytearray(gguf_file.read_bytes())
    key = b"llama.block_count" + (4).to_bytes(4, "little")  # a number of 32 bits
    at = content.index(key) + len(key)
    content[at : at + 4] = ((1 << 31) - 1).to_bytes(4, "little")
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert "2147483647 blocks" in (is_read_or_refused(path) or "")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory) -> Path:
    """An ONNX file with a product of 4-bit weights."""
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    constants = {
        "proj.q": rng.integers(0, 256, (8, 2, 16), dtype=np.uint8),
        "proj.s": rng.random(16, np.float32),
        "proj.z": rng.integers(0, 256, 8, dtype=np.uint8),
    }
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        "/proj/MatMul",
        domain="com.microsoft",
        K=64,
        N=8,
        bits=4,
        block_size=32,
    )
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [1, size]) for name, size in (("x", 64), ("y", 8)))
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph([node], "g", [x], [y], initializers)
    path = tmp_path_factory.mktemp("onnx") / "sound.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    read_all(path)
    return path


@quickly
@given(data=st.data())
def test_an_onnx_file_whose_bytes_changed_or_are_missing(onnx_file, tmp_path, data):
    content = bytearray(onnx_file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "broken.onnx"
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    is_read_or_refused(path)


@quickly
@given(data=st.data())
def test_bytes_that_changed_or_are_missing(sound, data):
    folder = copied(sound)
    file = folder / data.draw(st.sampled_from([SINGLE, CONFIG]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    is_read_or_refused(folder)


def entry(begin: int, end: int, **other) -> dict:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | other


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "b begins at byte 4 of the data, not at 8"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), "b begins at byte 0 of the data, not at 8"),
        ({"a": entry(0, 8), "b": entry(9, 12)}, bytes(12), "b begins at byte 9"),
        ({"a": entry(8, 0, shape=[8])}, bytes(8), "cannot lie in bytes 8 to 0"),
        ({"a": entry(0, 8)}, bytes(9), "9 bytes of data, its header says 8"),
        ({"a": entry(0, 1 << 62)}, bytes(8), "8 bytes of data"),
        ({"a": entry(0, 8, shape=[1 << 40, 1 << 40])}, bytes(8), "cannot lie"),
        ({"a": entry(0, 8, shape=[10**4000] * 16)}, bytes(8), "below 2**63"),
        ({"a": entry(0, 8, shape=[1] * 40)}, bytes(8), "at most 16 dimensions"),
        ({"a": entry(0, 8, shape=[True])}, bytes(8), "from 0 on"),
        ({"a": entry(0, 8, dtype=["U8"])}, bytes(8), "dtype"),
        ({"a": entry(0, 8, dtype="F4")}, bytes(8), "'F4'"),
        ({"a": 5}, bytes(8), "dtype, shape and data_offsets"),
        ({"__metadata__": {"a": {}}}, b"", "metadata"),
        (b'{"a":' + b"[" * 50_000, b"", "recursion"),
        (b"{" + b'"a":{},' * 100_000 + b'"b":{}}', b"", "'a' stands in it twice"),
        (
            b"{" + b",".join(b'"%d":0' % at for at in range(200_000)) + b',"199999":0}',
            b"",
            "'199999' stands in it twice",
        ),
    ],
)
def test_what_a_header_may_not_say(tmp_path, header, data, words):
    join(tmp_path / SINGLE, header, data)
    message = is_read_or_refused(tmp_path)
    assert message is not None and words in message and SINGLE in message, message


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "a/../model.safetensors", ".", "..", "", "a\0.safetensors"],
)
def test_an_index_that_points_elsewhere(tmp_path, name):
    save_file({"w": torch.ones(2)}, tmp_path / SINGLE)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    message = is_read_or_refused(folder)
    assert message is not None and INDEX in message, message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"w": 5}}', "[" * 50_000])
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    message = is_read_or_refused(tmp_path)
    assert message is not None and INDEX in message


def test_a_link_is_followed_as_the_cache_of_the_hub_is_made_of_them(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "blob")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / SINGLE).symlink_to(tmp_path / "blob")
    assert is_read_or_refused(folder) is None


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / SINGLE)
    assert is_read_or_refused(tmp_path) is not None
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).mkdir()
    assert is_read_or_refused(tmp_path) is not None


class Bomb:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "qmodel.pt", "model.npz", "model.pkl", "model.ckpt"]
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_pickle_is_refused_by_name_and_never_run(tmp_path, name, inside):
    exploded = tmp_path / "exploded"
    folder = tmp_path / "model"
    folder.mkdir()
    if name.endswith(".npz"):
        np.savez(folder / name, np.array([Bomb(exploded)], dtype=object), allow_pickle=True)
    else:
        (folder / name).write_bytes(pickle.dumps(Bomb(exploded)))
    (folder / CONFIG).write_text(json.dumps({"model_type": "llama"}))
    message = is_read_or_refused(folder if inside else folder / name)
    assert not exploded.exists()
    assert message is not None and name in message and "pickle" in message and "safetensors" in message, message


def test_a_pickle_under_the_name_of_safetensors(tmp_path):
    exploded = tmp_path / "exploded"
    (tmp_path / SINGLE).write_bytes(pickle.dumps(Bomb(exploded)))
    assert "no safetensors file" in (is_read_or_refused(tmp_path) or "") and not exploded.exists()


def test_the_same_tensor_in_two_files(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"w": torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
    weight_map = {"w": "a.safetensors", "v": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert is_read_or_refused(tmp_path) is not None


def test_reading_gives_the_values_that_the_header_names(tmp_path):
    tensors = {"a": torch.arange(4, dtype=torch.int8), "b": torch.randn(2, 3)}
    save_file(tensors, tmp_path / SINGLE)
    files = SafetensorsFiles(tmp_path)
    assert all(torch.equal(files.tensor(name), tensor) for name, tensor in tensors.items())
