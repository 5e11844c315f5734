"""Tensors in safetensors files, read one at a time after their headers were checked.

The layout is that of https://huggingface.co/docs/safetensors: the length of a JSON header, the header, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import shortened

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MOST_HEADER = 100_000_000  # bytes, as the library has it
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_PICKLES = {".bin", ".ckpt", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorInfo(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, without names that stand in it twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands in it twice")
        found[name] = value
    return found


def pickle_hint(path: Path) -> str:
    """What to say where nothing was found to read, if pickles are there; else nothing."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    name = next((file.name for file in files if file.suffix in _PICKLES), None)
    if name is None:
        return ""
    what = "may hold pickles, which can" if name.endswith(".npz") else "is a pickle, which can"
    return f"; {name} {what} run any program, and is not read: save the model as safetensors with what wrote it"


def read_json(path: Path, most_bytes: int = _MOST_HEADER) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"{path} must be at most {most_bytes} bytes, got {path.stat().st_size}")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file that can be read: {shortened(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; nothing but the header is read.

    Raises:
        ValueError: naming the file, if the header is none, or does not fit the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"{path} is no safetensors file: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
            if not isinstance(header, dict):
                raise ValueError(f"its header is a {type(header).__name__}")
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its metadata are not texts")
            spans = [(*_span(name, entry), name) for name, entry in header.items()]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no safetensors file: {shortened(error)}") from error
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            where = f"{shortened(name)} begins at byte {begin} of the data, not at {at}"
            raise ValueError(f"{path} is no safetensors file: {where}")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"{path} is truncated or damaged: {size - 8 - length} bytes of data, its header says {at}")
    infos = {name: TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]], path) for name, entry in header.items()}
    return infos, metadata


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where the bytes of a tensor begin and end in the data."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} has the dtype {dtype!r}; known are {', '.join(_DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"{what} of {name} must be a list of numbers from 0 on, below 2**63, got {numbers!r}")
    if len(offsets) != 2 or len(shape) > 16:
        raise ValueError(f"{name} must have two offsets and at most 16 dimensions")
    begin, end = offsets
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name}, {dtype} of shape {shape}, cannot lie in bytes {begin} to {end}")
    return begin, end


class SafetensorsFiles(Mapping[str, TensorInfo]):
    """The tensors of a file or folder: what headers say, by name, and `tensor`, which reads one.

    Args:
        path: a .safetensors file, or a folder with `model.safetensors` or an index of several files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a broken header, an index that names a file elsewhere, or a tensor that is not where it says.
    """

    def __init__(self, path: Path) -> None:
        self._infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        if path.is_file():
            self._add(path)
        elif (path / INDEX).is_file():
            self._add_index(path)
        elif (path / SINGLE).is_file():
            self._add(path / SINGLE)
        else:
            raise FileNotFoundError(2, f"no {SINGLE} and no {INDEX}{pickle_hint(path)}", str(path))

    def _add(self, file: Path) -> None:
        infos, metadata = read_header(file)
        self._infos.update(infos)
        self.metadata.update(metadata)

    def _add_index(self, folder: Path) -> None:
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{folder / INDEX} must have a weight_map from tensors to files")
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
                own = f"must name .safetensors files of its own folder, got {shortened(repr(name))}"
                raise ValueError(f"{folder / INDEX} {own}")
            self._add(folder / name)
        lost = [name for name, file in weight_map.items() if self._infos.get(name, (0, 0, folder))[2].name != file]
        if lost:
            raise ValueError(
                f"{folder / INDEX} says that {shortened(lost[0])} is in {weight_map[lost[0]]}, where it is not"
            )

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            KeyError: if there is none of that name.
            ValueError: if the library does not read the file.
        """
        from safetensors import SafetensorError, safe_open

        path = self._infos[name].file
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {shortened(error)}") from error
