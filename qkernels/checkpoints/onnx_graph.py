"""The tensors and nodes of an ONNX file: sizes are checked before anything is read, and nothing outside its folder is.

What is large lies beside the file, as external data
(https://github.com/onnx/onnx/blob/main/docs/ExternalData.md).
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bits import unpack_codes

_STRING = 8
_MOST_BYTES = 1 << 31  # protobuf has no larger messages
# By the number of a type in TensorProto: dtype in memory, bits in the file, and whether those bits have a sign.
_TYPES = {
    1: (torch.float32, 32, True),
    2: (torch.uint8, 8, False),
    3: (torch.int8, 8, True),
    4: (torch.uint16, 16, False),
    5: (torch.int16, 16, True),
    6: (torch.int32, 32, True),
    7: (torch.int64, 64, True),
    9: (torch.bool, 8, False),
    10: (torch.float16, 16, True),
    11: (torch.float64, 64, True),
    12: (torch.uint32, 32, False),
    13: (torch.uint64, 64, False),
    16: (torch.bfloat16, 16, True),
    21: (torch.uint8, 4, False),
    22: (torch.int8, 4, True),
}


class ConstantInfo(NamedTuple):
    """What an ONNX file says of a constant: `bits` is 4 where two lie in a byte."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int

    @property
    def is_code(self) -> bool:
        """Whether it may be the integers of a quantized weight."""
        return self.dtype in (torch.int8, torch.uint8) and len(self.shape) >= 2


class OnnxGraph:
    """The nodes and constants of a model, those of its branches too.

    Args:
        path: of the .onnx file.

    Attributes:
        nodes: every node.
        consumers: by the name of a value: nodes that read it, and as which input.

    Raises:
        ImportError: if the library onnx is not installed.
        ValueError: if the file is none, or a tensor in it cannot be what it says.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnx
            from google.protobuf.message import DecodeError
        except ImportError as error:
            raise ImportError("reading an ONNX file requires the library onnx: pip install onnx") from error
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path} must be at most {_MOST_BYTES} bytes, got {path.stat().st_size}")
        try:
            model = onnx.load(path, load_external_data=False)
        except DecodeError as error:
            raise ValueError(f"{path} is no ONNX file: {error}") from error
        self._folder = path.parent.resolve()
        self._constants: dict[str, Any] = {}
        self.nodes: list[Any] = []
        self._add(model.graph)
        self.consumers: dict[str, list[tuple[Any, int]]] = defaultdict(list)
        for node in self.nodes:
            for index, name in enumerate(node.input):
                self.consumers[name].append((node, index))
        self.constants = {name: self._info(name, t) for name, t in self._constants.items() if t.data_type != _STRING}

    def _add(self, graph: Any) -> None:
        for tensor in graph.initializer:
            self._add_constant(tensor.name, tensor)
        for node in graph.node:
            value = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
            if node.op_type == "Constant" and value is not None and len(node.output) == 1:
                self._add_constant(node.output[0], value)
            self.nodes.append(node)
            for attribute in node.attribute:
                for branch in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
                    self._add(branch)

    def _add_constant(self, name: str, tensor: Any) -> None:
        if name in self._constants:
            raise ValueError(f"{name!r} is the name of two constants")
        self._constants[name] = tensor

    def _info(self, name: str, tensor: Any) -> ConstantInfo:
        if tensor.data_type not in _TYPES:
            raise ValueError(f"{name} has the type {tensor.data_type} of TensorProto, which is not read")
        dtype, bits, _ = _TYPES[tensor.data_type]
        shape = tuple(tensor.dims)
        if any(size < 0 for size in shape):
            raise ValueError(f"the shape of {name} must have no negative sizes, got {list(shape)}")
        return ConstantInfo(shape, dtype, bits)

    def info(self, name: str) -> ConstantInfo:
        """What the file says of a constant.

        Raises:
            ValueError: if there is no constant of this name.
        """
        if name not in self.constants:
            raise ValueError(f"{name!r} must be a constant of the file")
        return self.constants[name]

    def is_dequantized(self, name: str) -> bool:
        """Whether a `DequantizeLinear` makes floats of this constant."""
        return any(node.op_type == "DequantizeLinear" and index == 0 for node, index in self.consumers[name])

    def tensor(self, name: str) -> Tensor:
        """Read a constant; one of 4 bits is int8 or uint8.

        Raises:
            ValueError: if its data are not as large as its shape says, or lie outside the folder of the file.
        """
        info, stored = self.info(name), self._constants[name]
        dtype, bits, signed = _TYPES[stored.data_type]
        count = math.prod(info.shape)
        size = -(-count * bits // 8)
        data = self._bytes(name, stored, size)
        if len(data) != size:
            raise ValueError(f"{name} must have {size} bytes of data for shape {list(info.shape)}, got {len(data)}")
        if count == 0:
            return torch.empty(info.shape, dtype=dtype)
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if bits == 8 * dtype.itemsize:
            return flat.view(dtype).view(info.shape)
        codes = unpack_codes(flat, bits, count)
        return (((codes ^ 8).to(torch.int8) - 8) if signed else codes).view(info.shape)

    def _bytes(self, name: str, stored: Any, size: int) -> bytes:
        if stored.data_location == stored.EXTERNAL:
            return self._external(name, {entry.key: entry.value for entry in stored.external_data}, size)
        if stored.HasField("raw_data"):
            return bytes(stored.raw_data)
        fields = {1: stored.float_data, 7: stored.int64_data, 11: stored.double_data}
        values = fields.get(stored.data_type, stored.uint64_data if stored.uint64_data else stored.int32_data)
        of_bits = {8: np.uint8, 4: np.uint8, 16: np.uint16, 32: np.int32}
        floats = {1: np.float32, 7: np.int64, 11: np.float64}
        return np.asarray(values).astype(floats.get(stored.data_type) or of_bits[_TYPES[stored.data_type][1]]).tobytes()

    def _external(self, name: str, said: dict[str, str], size: int) -> bytes:
        location = said.get("location", "")
        file = (self._folder / location).resolve()
        if not location or not file.is_relative_to(self._folder):
            raise ValueError(f"{name} must lie in the folder of its file, got {location!r}")
        if not file.is_file():
            raise FileNotFoundError(2, f"no such file, which holds {name}", str(file))
        try:
            offset, length = int(said.get("offset") or 0), int(said.get("length") or size)
        except ValueError as error:
            raise ValueError(f"offset and length of {name} must be numbers, got {said}") from error
        end = file.stat().st_size
        if offset < 0 or length != size or offset + length > end:
            raise ValueError(f"{name} must be {size} bytes in the {end} of {location}, got {length} at {offset}")
        with file.open("rb") as opened:
            opened.seek(offset)
            return opened.read(size)


def attributes(node: Any) -> dict[str, Any]:
    """The attributes of a node that are numbers, or lists of integers."""
    kinds = {1: "f", 2: "i", 7: "ints"}
    return {a.name: getattr(a, kinds[a.type]) for a in node.attribute if a.type in kinds}
