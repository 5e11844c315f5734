"""GGUF files: the header, checked before anything is believed, and the bytes of one tensor, or of some of its rows.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts, key-value
pairs, what the header says of each tensor, padding, data.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_MOST_KEY = 65535  # bytes of a key, by the specification
_MOST_NAME = 1024  # bytes of a tensor's name; ggml has 64
_MOST_TEXT = 1 << 24  # bytes of a text that stands alone, such as a chat template
_CHUNK = 1 << 20  # bytes of a header that are read at once
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@functools.cache
def quantization_types() -> dict[int, tuple[str, int, int]]:
    """Of each tensor type by its number: name, values in a block, bytes of a block.

    Raises:
        ImportError: if the package gguf, which has the table, is not installed.
    """
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise ImportError(f"GGUF files need the package gguf ({error}): pip install gguf") from error
    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def type_number(name: str) -> int:
    """The number of a tensor type, such as 8 of "Q8_0"."""
    return next(number for number, (known, _, _) in quantization_types().items() if known == name)


class Value(NamedTuple):
    """A value of the metadata.

    Attributes:
        kind: the number of its type.
        value: a number, a bool or a text; of an array the number of its elements, which stay in the file.
        begin, end: where it lies in the file, after its type.
        element: the number of the type of an array's elements.
    """

    kind: int
    value: int | float | bool | str
    begin: int
    end: int
    element: int = -1


@dataclass(frozen=True)
class GGUFTensor:
    """What a header says of a tensor.

    Attributes:
        shape: in the order of torch, the columns last.
        kind: the name of its type, such as "Q4_K".
        block: values in a block.
        block_bytes: bytes of a block.
        begin: its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    block: int
    block_bytes: int
    begin: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block * self.block_bytes

    @property
    def size(self) -> int:
        return self.rows * self.row_bytes


class _Cursor:
    """Reads a header from its first byte to its last, no more of the file than a chunk ahead."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._data, self._begin, self.at = b"", 0, 0

    @property
    def left(self) -> int:
        return self._size - self.at

    def skip(self, count: int, what: str) -> None:
        if count > self.left:
            raise ValueError(f"it ends at byte {self._size}, and {what} needs {count} bytes from byte {self.at} on")
        self.at += count

    def take(self, count: int, what: str) -> bytes:
        self.skip(count, what)
        begin = self.at - count - self._begin
        if self.at > self._begin + len(self._data) or begin < 0:
            self._file.seek(self.at - count)
            self._data, self._begin, begin = self._file.read(max(count, _CHUNK)), self.at - count, 0
            if len(self._data) < count:
                raise ValueError(f"{what} cannot be read: the file became shorter")
        return self._data[begin : begin + count]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, most: int, what: str) -> str:
        length = self.number("Q", what)
        if length > most:
            raise ValueError(f"{what} must have at most {most} bytes, got {length}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is no UTF-8 text: {error.reason}") from error

    def count(self, least_bytes: int, what: str) -> int:
        """A number of things, each of which takes at least so many bytes of the rest of the file."""
        count = self.number("Q", what)
        if count * least_bytes > self.left:
            raise ValueError(f"{what} is {count}, for which its {self._size} bytes are too few")
        return count

    def _skip_texts(self, count: int, what: str) -> None:
        """Pass over a vocabulary, a quarter of a million texts, without a call for each."""
        done = 0
        while done < count:
            self.take(8, what)
            at, last = self.at - 8 - self._begin, len(self._data) - 8
            while done < count and at <= last:
                at += 8 + int.from_bytes(self._data[at : at + 8], "little")
                done += 1
            self.at = self._begin
            self.skip(at, what)

    def value(self, what: str) -> Value:
        kind, begin = self.number("I", what), self.at
        if kind in _SCALARS:
            return Value(kind, self.number(_SCALARS[kind], what), begin, self.at)
        if kind == _STRING:
            return Value(kind, self.text(_MOST_TEXT, what), begin, self.at)
        if kind != _ARRAY:
            raise ValueError(f"{what} has the unknown type {kind}")
        element = self.number("I", what)
        if element in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[element])
            count = self.count(size, f"the length of {what}")
            self.skip(count * size, what)
        elif element == _STRING:
            count = self.count(8, f"the length of {what}")
            self._skip_texts(count, what)
        else:
            raise ValueError(f"{what} is an array of the type {element}, which is not read")
        return Value(kind, count, begin, self.at, element)


class GGUFFile:
    """A GGUF file whose header was read and checked.

    Args:
        path: of the file.

    Attributes:
        metadata: the key-value pairs by key; arrays stay in the file until `array` reads one.
        tensors: by name, in the order of the header.
        alignment: of the data of each tensor, in bytes.
        pairs: where the key-value pairs begin and end in the file.

    Raises:
        FileNotFoundError: if there is none.
        ImportError: without the package gguf.
        ValueError: naming the file and what in it is not as the specification says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as file:
            try:
                self._read(_Cursor(file, self.size))
            except ValueError as error:
                raise ValueError(f"{path} is no GGUF file that can be read: {error}") from error

    def _read(self, cursor: _Cursor) -> None:
        magic = cursor.take(4, "the magic")
        if magic != MAGIC:
            raise ValueError(f"it begins with {magic!r}, not with {MAGIC!r}")
        version = cursor.number("I", "the version")
        if version and not version & 0xFFFF:
            raise ValueError("it is big-endian, which is not read: convert it with gguf-convert-endian of gguf-py")
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are read")
        tensors = cursor.count(33, "the number of tensors")
        pairs = cursor.count(14, "the number of key-value pairs")
        begin = cursor.at
        self.metadata: dict[str, Value] = {}
        for _ in range(pairs):
            key = cursor.text(_MOST_KEY, "a key")
            if key in self.metadata:
                raise ValueError(f"the key {key} stands in it twice")
            self.metadata[key] = cursor.value(key)
        self.pairs = begin, cursor.at
        self._check_parts()
        self.alignment = self._alignment()
        infos = [self._info(cursor) for _ in range(tensors)]
        data = -(-cursor.at // self.alignment) * self.alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise ValueError(f"the tensor {name} stands in it twice")
            self.tensors[name] = GGUFTensor(name, shape, *kind, data + offset)
        end, last = data, "the header"
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.begin):
            if tensor.begin < end:
                raise ValueError(f"the bytes of {tensor.name} overlap those of {last}")
            end, last = tensor.begin + tensor.size, tensor.name
            if end > self.size:
                raise ValueError(f"{last} ends at byte {end} of a file of {self.size}: it is truncated or damaged")

    def _check_parts(self) -> None:
        parts = self.metadata.get("split.count")
        if parts is not None and parts.value not in (0, 1):
            raise ValueError(f"it is one of {parts.value} parts: merge them with llama-gguf-split --merge")

    def _alignment(self) -> int:
        found = self.metadata.get("general.alignment")
        if found is None:
            return 32
        number = found.value
        if found.kind != 4 or not isinstance(number, int) or not 8 <= number <= 1 << 20 or number & number - 1:
            raise ValueError(f"general.alignment must be a power of two from 8 to 2^20, got {number!r}")
        return number

    def _info(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], tuple[str, int, int], int]:
        name = cursor.text(_MOST_NAME, "the name of a tensor")
        dimensions = cursor.number("I", f"the number of dimensions of {name}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} must have 1 to {_MOST_DIMENSIONS} dimensions, got {dimensions}")
        shape = tuple(cursor.number("Q", f"the shape of {name}") for _ in range(dimensions))[::-1]
        number = cursor.number("I", f"the type of {name}")
        kind = quantization_types().get(number)
        if kind is None:
            raise ValueError(f"{name} has the unknown type {number}")
        _, block, block_bytes = kind
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"{name} of {kind[0]} must have whole blocks of {block} columns, got shape {list(shape)}")
        if math.prod(shape) // block * block_bytes > self.size:
            raise ValueError(
                f"{name} of shape {list(shape)} and {kind[0]} is larger than the file of {self.size} bytes"
            )
        offset = cursor.number("Q", f"the offset of {name}")
        if offset % self.alignment:
            raise ValueError(f"{name} begins at byte {offset} of the data, no multiple of {self.alignment}")
        return name, shape, kind, offset

    def value(self, key: str) -> int | float | bool | str | None:
        """A value of the metadata that is no array; None where there is none."""
        found = self.metadata.get(key)
        return None if found is None or found.kind == _ARRAY else found.value

    def array(self, key: str) -> list[Any]:
        """The elements of an array of the metadata.

        Raises:
            KeyError: if there is none of this key.
            ValueError: if it is no array, or a text of it is no UTF-8.
        """
        found = self.metadata[key]
        if found.kind != _ARRAY:
            raise ValueError(f"{key} of {self.path} must be an array, got {found.value!r}")
        with self.path.open("rb") as file:
            cursor = _Cursor(file, self.size)
            cursor.at = found.begin + 12
            if found.element == _STRING:
                return [cursor.text(_MOST_TEXT, key) for _ in range(int(found.value))]
            code = f"{found.value}{_SCALARS[found.element]}"
            return list(struct.unpack("<" + code, cursor.take(found.end - cursor.at, key)))

    def bytes_of(self, tensor: GGUFTensor, rows: slice | None = None) -> Tensor:
        """The bytes of some rows of a tensor, all of them by default.

        Returns:
            uint8 [rows, bytes of a row]; the rows of a tensor of several dimensions are those of all its matrices.

        Raises:
            ValueError: if the file has become shorter than its header said.
        """
        first, last, _ = (rows or slice(None)).indices(tensor.rows)
        out = torch.empty((last - first, tensor.row_bytes), dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(tensor.begin + first * tensor.row_bytes)
            view, done = out.numpy().reshape(-1).data, 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{tensor.name} of {self.path} cannot be read: the file became shorter")
                done += count
        return out


@dataclass(frozen=True)
class GGUFSource:
    """Where the bytes of a layer or a float tensor lie, for a writer of GGUF that keeps them.

    Attributes:
        file, tensor: the file and what its header says.
        matrix: the number of the expert in a tensor of several matrices.
    """

    file: GGUFFile
    tensor: GGUFTensor
    matrix: int = 0


class Written(NamedTuple):
    """A tensor that is to be written.

    Attributes:
        shape: in the order of torch.
        kind: the name of its type.
        chunks: gives its bytes, uint8 tensors one after the other.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    chunks: Callable[[], Iterator[Tensor]]


def write_gguf(path: Path, pairs: bytes, count: int, tensors: Sequence[Written], alignment: int = 32) -> Iterator[str]:
    """Write a GGUF file, of version 3; no more than a chunk of its data is in memory.

    Args:
        path: of the file.
        pairs: the key-value pairs, encoded.
        count: how many they are.
        tensors: in the order in which they are to lie in the file.
        alignment: that the pairs say, or 32.

    Yields:
        The name of each tensor, once it is written.
    """
    types = {name: (number, block, size) for number, (name, block, size) in quantization_types().items()}
    header = [MAGIC, struct.pack("<IQQ", 3, len(tensors), count), pairs]
    offset, sizes = 0, []
    for tensor in tensors:
        number, block, block_bytes = types[tensor.kind]
        name = tensor.name.encode("utf-8")
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        header.append(struct.pack("<Q", len(name)) + name + dims + struct.pack("<IQ", number, offset))
        sizes.append(math.prod(tensor.shape) // block * block_bytes)
        offset += -(-sizes[-1] // alignment) * alignment
    with path.open("wb") as file:
        file.writelines(header)
        file.write(bytes(-file.tell() % alignment))
        for tensor, size in zip(tensors, sizes, strict=True):
            begin = file.tell()
            for chunk in tensor.chunks():
                file.write(chunk.contiguous().numpy().data)
            if file.tell() - begin != size:
                raise ValueError(f"{tensor.name} must have {size} bytes, got {file.tell() - begin}")
            file.write(bytes(-size % alignment))
            yield tensor.name
