"""The quantized weights of an ONNX graph, by the operators that multiply with them."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats.weight_format import INT4
from .bits import unpack_codes
from .checkpoint import CheckpointLayer, LayerWeight
from .grouped_codes import GroupedCodes, input_order, minima_of
from .losses import Losses
from .onnx_graph import ConstantInfo, OnnxGraph, attributes

_NBITS = (2, 4, 8)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ADDED = re.compile(r"(_Q[248](G\d+)?|_DQ_Q[248]|_DequantizeLinear|_quantized|_quant)$")  # to names, by quantizers
_OPERATOR = re.compile(r"[/.](MatMul|Gemm|Gather)(_\d+)?$")


class Weight(ABC):
    """A weight [N, K] of a graph, whose codes are unsigned: `w = (code - zero) * scale`.

    Attributes:
        codes_name, scales_name, zeros_name, order_name: of its constants.
        name: of the layer.
        details: what it is.
        bits: of a code.
        group_size: columns that share a scale.
        blocked: the file says blocks of columns, of which a row may have one.
    """

    blocked: bool = True
    order_name: str | None = None
    bits: int
    details: str
    in_features: int
    out_features: int
    group_size: int

    def __init__(self, graph: OnnxGraph, node: Any, codes: str, scales: str, zeros: str | None) -> None:
        self.graph = graph
        self.codes_name, self.scales_name, self.zeros_name = codes, scales, zeros
        self.name = module_name(codes, node.name)

    @abstractmethod
    def codes(self) -> Tensor:
        """uint8 [N, K]."""

    @abstractmethod
    def scales(self) -> Tensor:
        """float32 [N, groups]."""

    @abstractmethod
    def zeros(self) -> Tensor:
        """[N, groups], uint8 or floats."""

    def layer(self, losses: Losses) -> CheckpointLayer:
        """The layer; its zero points are read now, because its scheme depends on them.

        Raises:
            ValueError: naming the constant, if one is not what the operator takes.
            LossError: if no scheme has these groups or zero points, by the policy.
        """
        zeros = self.zeros()
        symmetric = bool((zeros == 1 << self.bits - 1).all())
        has_min = not symmetric and (self.bits == 8 or zeros.is_floating_point())
        group = None if self.group_size >= self.in_features and not self.blocked else self.group_size
        codes = GroupedCodes(self.bits, group, symmetric or has_min)
        if has_min and codes.problem is not None:
            raise ValueError(f"{self.codes_name} has zero points that no scheme has for these groups: {codes.problem}")
        if codes.problem is not None:
            losses.need_requantization(self.codes_name, codes.problem)
        order = None
        if self.order_name is not None:
            indices = self.graph.tensor(self.order_name).to(torch.int64).flatten()[: self.in_features]
            order = input_order(self.order_name, indices, self.group_size)
        names = (self.codes_name, self.scales_name, self.zeros_name, self.order_name)
        return CheckpointLayer(
            self.name,
            self.in_features,
            self.out_features,
            replace(codes.scheme, zeros="min") if has_min else codes.scheme,
            self.details,
            tuple(name for name in names if name is not None),
            partial(self._read, codes, has_min, order, losses),
            order is not None,
        )

    def _read(self, codes: GroupedCodes, has_min: bool, order: Tensor | None, losses: Losses) -> LayerWeight:
        stored, zeros = self.codes(), None if codes.symmetric else self.zeros()
        stored, scales = stored if order is None else stored[:, order], self.scales()
        weight = codes.store(self.codes_name, stored, scales, zeros, losses)
        if has_min:  # relative to what `store` made of the codes
            shift = (INT4.offset if self.bits < 8 else 0) - (1 << self.bits - 1)
            exact = (self.zeros().to(torch.float64) + shift) * -scales.to(torch.float64)
            minima = minima_of(self.codes_name, exact, losses)
            weight = weight._replace(zeros=codes.split(minima, self.in_features))
        return LayerWeight(weight, None, None if order is None else order.to(torch.int32))


class NBits(Weight):
    """The B [N, groups, bytes] of a `MatMulNBits`."""

    def __init__(self, graph: OnnxGraph, node: Any) -> None:
        inputs = [*node.input, "", "", ""]
        super().__init__(graph, node, inputs[1], inputs[2], inputs[3] or None)
        self.order_name, said = inputs[4] or None, attributes(node)
        self.bits, self.group_size = said.get("bits", 4), said.get("block_size", 0)
        self.in_features, self.out_features = said.get("K", 0), said.get("N", 0)
        if self.bits not in _NBITS:
            raise ValueError(f"bits of {self.codes_name} must be one of {_NBITS}, got {self.bits}")
        if self.group_size < 16 or self.group_size & self.group_size - 1:
            raise ValueError(
                f"block_size of {self.codes_name} must be a power of two from 16 on, got {self.group_size}"
            )
        if self.in_features < 1 or self.out_features < 1:
            raise ValueError(
                f"K and N of {self.codes_name} must be positive, got {self.in_features}, {self.out_features}"
            )
        self._groups = -(-self.in_features // self.group_size)
        self._packed_zeros = -(-self._groups * self.bits // 8)  # bytes of a row
        self._expect(self.codes_name, (torch.uint8,), self._groups * self.group_size * self.bits // 8)
        self._expect(self.scales_name, _FLOATS, self._groups)
        if self.zeros_name is not None:
            floats = graph.info(self.zeros_name).dtype in _FLOATS
            self._expect(self.zeros_name, (torch.uint8, *_FLOATS), self._groups if floats else self._packed_zeros)
        if self.order_name is not None and math.prod(graph.info(self.order_name).shape) < self.in_features:
            raise ValueError(f"{self.order_name} must have a group for each of {self.in_features} columns")
        level = said.get("accuracy_level", 0)
        self.details = f"MatMulNBits, {self.bits} bits, blocks of {self.group_size}, accuracy_level {level}"

    def _expect(self, name: str, dtypes: tuple[torch.dtype, ...], in_row: int) -> None:
        info, count = self.graph.info(name), self.out_features * in_row
        if info.dtype not in dtypes or math.prod(info.shape) != count:
            got = f"{info.dtype} {list(info.shape)}"
            raise ValueError(f"{name} must be {count} values of {' or '.join(map(str, dtypes))}, got {got}")

    def codes(self) -> Tensor:
        stream = self.graph.tensor(self.codes_name).reshape(self.out_features, -1)
        return unpack_codes(stream, self.bits, self.in_features)

    def scales(self) -> Tensor:
        return self.graph.tensor(self.scales_name).reshape(self.out_features, -1).to(torch.float32)

    def zeros(self) -> Tensor:
        if self.zeros_name is None:
            return torch.full((self.out_features, self._groups), 1 << self.bits - 1, dtype=torch.uint8)
        stored = self.graph.tensor(self.zeros_name).reshape(self.out_features, -1)
        if stored.dtype == torch.uint8:
            return unpack_codes(stored, self.bits, self._groups)
        exact = stored.to(torch.float32)
        whole = exact.clamp(0, (1 << self.bits) - 1).to(torch.uint8)
        return whole if torch.equal(whole.to(torch.float32), exact) else exact


class _Use(NamedTuple):
    """How a product reads a matrix: as [K, N], or as [N, K], and first in the shape `view`, if that is not None."""

    inputs_first: bool
    view: tuple[int, int] | None


def _uses(graph: OnnxGraph, value: str, use: _Use) -> Iterator[_Use | None]:
    """The uses of a value that is a matrix; None for each that is not known."""
    for node, index in graph.consumers[value]:
        said, kind = attributes(node), (node.op_type, index)
        if kind in (("Cast", 0), ("Identity", 0)):
            yield from _uses(graph, node.output[0], use)
        elif kind == ("Transpose", 0) and list(said.get("perm", [1, 0])) == [1, 0]:
            yield from _uses(graph, node.output[0], use._replace(inputs_first=not use.inputs_first))
        elif kind == ("Reshape", 0) and use == _Use(True, None) and node.input[1] in graph.constants:
            shape = graph.tensor(node.input[1]).flatten().tolist()
            known = len(shape) == 2 and min(shape) > 0
            yield from _uses(graph, node.output[0], _Use(True, tuple(shape))) if known else (None,)
        elif kind == ("MatMul", 1):
            yield use
        elif kind == ("Gemm", 1):
            yield use._replace(inputs_first=use.inputs_first != bool(said.get("transB", 0)))
        elif kind == ("Gather", 0) and said.get("axis", 0) == 0:
            yield use._replace(inputs_first=not use.inputs_first)
        else:
            yield None


class Dequantized(Weight):
    """A matrix that `DequantizeLinear` makes floats of, as `use` says."""

    def __init__(self, graph: OnnxGraph, node: Any, use: _Use) -> None:
        inputs = [*node.input, ""]
        super().__init__(graph, node, inputs[0], inputs[1], inputs[2] or None)
        said, info = attributes(node), graph.info(self.codes_name)
        self.bits, self._signed, self._use = info.bits, info.dtype == torch.int8, use
        rows, columns = info.shape
        axis, block = said.get("axis", 1), said.get("block_size", 0)
        self._shape = (rows, columns) if use.view is None else use.view
        self.blocked = bool(block) or use.view is not None
        self._repeats = self._layout(graph.info(self.scales_name), rows, columns, axis, block)
        size = self._shape[::-1] if use.inputs_first else self._shape
        self.out_features, self.in_features = size
        self._by_rows, self.group_size = self._repeats[::-1] if use.inputs_first else self._repeats
        if self.zeros_name is not None and graph.info(self.zeros_name).shape != graph.info(self.scales_name).shape:
            raise ValueError(f"{self.zeros_name} must have the shape of {self.scales_name}")
        kind = f"{'' if self._signed else 'u'}int{self.bits}"
        self.details = f"DequantizeLinear of {kind}" + (f", blocks of {block}" if block else "")

    def _layout(self, info: ConstantInfo, rows: int, columns: int, axis: int, block: int) -> tuple[int, int]:
        """Rows and columns of the matrix that share a scale."""
        if axis not in (-2, -1, 0, 1) or block < 0:
            raise ValueError(f"axis and block_size of {self.codes_name} must fit a matrix, got {axis} and {block}")
        sizes, axis = (rows, columns), axis % 2
        if info.dtype not in _FLOATS:
            raise ValueError(f"{self.scales_name} must be floats, got {info.dtype}")
        if math.prod(info.shape) == 1 and not block:
            expected, repeats = info.shape, self._shape
            self._scale_shape = (1, 1)
        elif block:
            groups = -(-sizes[axis] // block)
            expected = (groups, columns) if axis == 0 else (rows, groups)
            self._scale_shape, repeats = expected, (block, 1) if axis == 0 else (1, block)
        else:
            expected = (sizes[axis],)
            self._scale_shape, repeats = ((rows, 1), (1, columns)) if axis == 0 else ((1, columns), (rows, 1))
        if info.shape != expected:
            raise ValueError(f"{self.scales_name} must have the shape {list(expected)}, got {list(info.shape)}")
        if self._shape != sizes and self._scale_shape != (1, 1):
            whole = self._scale_shape == (rows, 1) and self._shape[1] % columns == 0
            if not whole or math.prod(self._shape) != rows * columns:
                raise ValueError(f"{self.codes_name} of {list(sizes)} cannot be read as {list(self._shape)}")
            self._scale_shape = (self._shape[0], self._shape[1] // columns)
        return repeats

    def _oriented(self, matrix: Tensor) -> Tensor:
        return matrix.t() if self._use.inputs_first else matrix

    def _unsigned(self, stored: Tensor) -> Tensor:
        return (stored.to(torch.int16) + (1 << self.bits - 1)).to(torch.uint8) if self._signed else stored

    def codes(self) -> Tensor:
        stored = self._unsigned(self.graph.tensor(self.codes_name)).view(self._shape)
        return self._oriented(stored).contiguous()

    def _by_groups(self, name: str) -> Tensor:
        oriented = self._oriented(self.graph.tensor(name).view(self._scale_shape))
        return oriented.repeat_interleave(self._by_rows, dim=0)[: self.out_features].contiguous()

    def scales(self) -> Tensor:
        return self._by_groups(self.scales_name).to(torch.float32)

    def zeros(self) -> Tensor:
        if self.zeros_name is None:
            groups = -(-self.in_features // self.group_size)
            return torch.full((self.out_features, groups), self._signed << self.bits - 1, dtype=torch.uint8)
        return self._unsigned(self._by_groups(self.zeros_name))


class Bias(NamedTuple):
    """A vector of integers that `DequantizeLinear` makes floats of."""

    graph: OnnxGraph
    name: str
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.graph.info(self.names[0]).shape

    @property
    def dtype(self) -> torch.dtype:
        return self.graph.info(self.names[1]).dtype

    def read(self) -> Tensor:
        integers, scales, *zeros = (self.graph.tensor(name) for name in self.names)
        for zero in zeros:
            integers = integers.to(torch.int32) - zero.to(torch.int32)
        return integers.to(torch.float32).mul(scales.to(torch.float32)).to(self.dtype)


def _dequantizing(graph: OnnxGraph, dimensions: int) -> Iterator[Any]:
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.constants:
            if len(graph.constants[node.input[0]].shape) == dimensions:
                yield node


def biases(graph: OnnxGraph) -> list[Bias]:
    """The biases of a graph that are stored as integers."""
    found = []
    for node in _dequantizing(graph, 1):
        names = tuple(name for name in node.input if name)
        found.append(Bias(graph, _ADDED.sub("", names[0]), names))
    return found


def weights(graph: OnnxGraph) -> list[Weight]:
    """The weights of a graph, each once; they have different names.

    Raises:
        ValueError: naming the constant, if it is not what its operator takes, or products read it in different ways.
    """
    found: dict[str, Weight] = {}
    for node in graph.nodes:
        if node.op_type == "MatMulNBits":
            weight: Weight = NBits(graph, node)
            found.setdefault(weight.codes_name, weight)
    for node in _dequantizing(graph, 2):
        if not graph.constants[node.input[0]].is_code:
            continue
        uses = list(_uses(graph, node.output[0], _Use(True, None)))
        known = {use for use in uses if use is not None}
        if not known or None in uses:
            continue
        weight = Dequantized(graph, node, known.pop())
        first = found.setdefault(weight.codes_name, weight)
        if known or (first.out_features, first.in_features) != (weight.out_features, weight.in_features):
            raise ValueError(f"{weight.codes_name} is read as [N, K] by one product and as [K, N] by another")
    names = [weight.name for weight in found.values()]
    for weight in found.values():
        if names.count(weight.name) > 1:
            weight.name = weight.codes_name
    return list(found.values())


def module_name(constant: str, node: str) -> str:
    """The module that a weight belongs to, as far as the file says it: by its own name, or by that of the node.

    >>> module_name("model.layers.0.mlp.up_proj.weight", "node_linear_3")
    'model.layers.0.mlp.up_proj'
    >>> module_name("onnx::MatMul_801_Q4G32", "/model/layers.0/mlp/up_proj/MatMul_Q4")
    'model.layers.0.mlp.up_proj'
    """
    name = _ADDED.sub("", constant)
    for suffix in (".weight", ".qweight"):
        if name.endswith(suffix):
            return _OPERATOR.sub("", name.removesuffix(suffix))
    path = _ADDED.sub("", node)
    if path.startswith("/") and _OPERATOR.search(path):
        return _OPERATOR.sub("", path)[1:].replace("/", ".")
    return name
