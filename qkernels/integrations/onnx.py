"""`torch.onnx.export(model, ..., dynamo=True)`: quantized layers in standard ONNX operators, with the same results.

An `a8` scheme becomes rules 1 to 5 of docs/numerics.md around `MatMulInteger`; a `Scan` adds the sums of groups, for it
says in which order. An `a16` scheme becomes `DequantizeLinear` and `Gemm`, or what `onnx_weights` says. The integers of
a weight are stored: for integer products those of 8 bits with zero point 128, because onnxruntime saturates products
with signed bytes on CPUs without VNNI; those of 4 bits as uint4 from opset 21 on, and in a byte each before.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.onnx._internal.exporter import _core

from ..autograd.int8_weight import Int8Weight
from ..checkpoints.onnx_packing import dequantized_tensors, nbits_tensors
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight, StoredWeight
from ..formats.weight_format import INT4
from ..kernels.arguments import ConvGeometry
from .onnx_nodes import OFFSET, GraphNodes
from .onnx_weights import chosen

_ops = torch.ops.qkernels
_UINT4_OPSET = 21
_MICROSOFT = "com.microsoft"
_FLOAT, _UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


class _Translator:
    """Translates our operators in one exported program, whose constants it knows.

    Args:
        program: after the decompositions of the exporter.
        opset: the version of the operators that the file is to have.
    """

    def __init__(self, program: torch.export.ExportedProgram, opset: int) -> None:
        signature = program.graph_signature
        tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
        targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self._form, self._domains = chosen(), set[str]()
        self._opset, self._graph_of_inputs = opset, program.graph_module.graph
        self._inputs = {name: (target, tensors[target]) for name, target in targets.items() if target in tensors}
        self._folded: dict[int, tuple[ir.Value, Tensor]] = {}  # by the id of the value
        self._stored: dict[tuple[Any, ...], ir.Value] = {}  # by the tensor that it is made of, and its kind
        self._consumed: set[str] = set()
        self._graphs = 0

    def register(self, registry: Any) -> None:
        """Let `registry` translate the operators of this program."""
        own: dict[str, Callable[..., Any]] = {
            "quantize_weight": self.quantize_weight,
            "quantize_weight_scaled": self.quantize_weight_scaled,
            "dequantize_weight": self.dequantize_weight,
            "linear": self.linear,
            "conv": self.conv,
        }
        registry.register_op(torch.ops.aten.view.dtype, self.view)
        registry.register_op(torch.ops.aten.alias.default, self.alias)
        registry.register_op(torch.ops.aten.detach.default, self.alias)
        for full_name in torch._C._dispatch_get_all_op_names():
            namespace, _, name = full_name.partition("::")
            if namespace == "qkernels":
                function = own.get(name, functools.partial(_refuse, full_name))
                registry.register_op(getattr(_ops, name).default, function)

    def add_initializers(self, graph: ir.Graph) -> None:
        """Give `graph` the constants that its nodes read, and take out the stored weights that they were made of."""
        for value in (*self._stored.values(), *(value for value, _ in self._folded.values())):
            if value.uses():
                graph.initializers[str(value.name)] = value
        graph.opset_imports.update(dict.fromkeys(self._domains, 1))
        for name in self._consumed & set(graph.initializers):
            if not graph.initializers[name].uses():
                del graph.initializers[name]

    # The translations take the arguments of the schemas: values of the graph, and numbers.

    def view(self, x: ir.Value, dtype: int) -> ir.Value:
        """Translate `aten.view.dtype` of a constant: the scales of a layer are stored as their bits."""
        to = next(key for key, code in _core._TORCH_DTYPE_TO_ONNX.items() if code == dtype)
        return self._fold(self._tensor(x, "what tensor.view(dtype) is called on").view(to))

    def alias(self, x: ir.Value) -> ir.Value:
        """Translate `aten.alias` and `aten.detach`."""
        if id(x) in self._folded or self._is_input(x):
            return self._fold(self._tensor(x, "x"))
        graph = self._graph()
        return graph.done(graph.add("Identity", x))

    def quantize_weight(self, weight: ir.Value, scheme: int) -> list[ir.Value]:
        """Translate the operator: of mode "qat"."""
        return [self._fold(part) for part in _ops.quantize_weight(self._tensor(weight, "weight"), scheme)]

    def quantize_weight_scaled(self, weight: ir.Value, scales: ir.Value, scheme: int) -> ir.Value:
        """Translate the operator: of mode "qat" with learned scales."""
        return self._fold(
            _ops.quantize_weight_scaled(self._tensor(weight, "weight"), self._tensor(scales, "scales"), scheme)
        )

    def dequantize_weight(
        self, qweight: ir.Value, scales: ir.Value, zeros: ir.Value | None, in_features: int, scheme: int
    ) -> ir.Value:
        """Translate the operator: of rows that an embedding looked up, say."""
        parsed, graph = QuantScheme.from_code(scheme), self._graph()
        minima, zeros = (zeros, None) if parsed.has_min else (None, None if parsed.symmetric else zeros)
        groups = None if parsed.group_size is None else graph.integers(*np.arange(in_features) // parsed.group_size)

        def by_column(per_group: ir.Value) -> ir.Value:
            return per_group if groups is None else graph.add("Gather", per_group, groups, axis=1)

        if parsed.weight_format is INT4:
            low = graph.add("BitwiseAnd", qweight, graph.constant(15, np.uint8))
            high = graph.add("BitShift", qweight, graph.constant(4, np.uint8), direction="RIGHT")
            last = graph.integers(-1)
            pairs = graph.add("Concat", *(graph.add("Unsqueeze", part, last) for part in (low, high)), axis=-1)
            nibbles = graph.add("Reshape", pairs, graph.integers(-1, 2 * parsed.packed_features(in_features)))
            stored = graph.add("Slice", nibbles, graph.integers(0), graph.integers(in_features), last)
            integers = graph.cast(stored, _FLOAT)
            if minima is None:
                offset = graph.constant(8.0) if zeros is None else by_column(graph.cast(zeros, _FLOAT))
                integers = graph.add("Sub", integers, offset)
        else:
            integers = graph.cast(qweight, _FLOAT)
        values = graph.add("Mul", integers, by_column(scales))
        return graph.done(values if minima is None else graph.add("Add", values, by_column(minima)))

    def linear(
        self,
        x: ir.Value,
        qweight: ir.Value,
        scales: ir.Value,
        zeros: ir.Value | None,
        bias: ir.Value | None,
        scheme: int,
        out_dtype: int | None = None,
        x_scale: ir.Value | None = None,
    ) -> ir.Value:
        """Translate the operator."""
        weight, graph = self._weight(qweight, scales, zeros, int(x.shape[1]), scheme, x_scale), self._graph()
        parsed = weight.scheme
        if not parsed.int_activations:
            products = {"matmul_nbits": self._nbits_product, "qdq": self._blocked_product}
            product = products.get(self._form.form, self._float_product)
        else:
            product = self._sum_of_groups if parsed.group_size or parsed.act_group_size else self._int_product
        return self._finished(graph, product(graph, graph.cast(x, _FLOAT), weight), bias, x, out_dtype)

    def conv(
        self,
        x: ir.Value,
        qweight: ir.Value,
        scales: ir.Value,
        zeros: ir.Value | None,
        bias: ir.Value | None,
        scheme: int,
        geometry: list[int],
        out_dtype: int | None = None,
        x_scale: ir.Value | None = None,
    ) -> ir.Value:
        """Translate the operator, whose images are [N, H, W, C], to `ConvInteger` or `Conv` of [N, C, H, W]."""
        of, channels = ConvGeometry(*geometry), int(x.shape[3])
        weight = self._weight(qweight, scales, zeros, of.in_features(channels), scheme, x_scale)
        graph, kernel = self._graph(), (of.kernel_height, of.kernel_width, channels // of.groups)
        attributes = {
            "kernel_shape": kernel[:2],
            "strides": [of.stride_height, of.stride_width],
            "dilations": [of.dilation_height, of.dilation_width],
            "pads": [of.top, of.left, of.bottom, of.right],
            "group": of.groups,
        }
        images = graph.cast(x, _FLOAT)
        to_channels_first, to_channels_last = [0, 3, 1, 2], [0, 2, 3, 1]
        if not weight.scheme.int_activations:
            matrix = self._dequantized(graph, weight)
            if _columns(weight) != weight.in_features:
                end = graph.integers(weight.in_features)
                matrix = graph.add("Slice", matrix, graph.integers(0), end, graph.integers(-1))
            filters = graph.add("Reshape", matrix, graph.integers(weight.out_features, *kernel))
            operands = [graph.add("Transpose", value, perm=to_channels_first) for value in (images, filters)]
            out = graph.add("Transpose", graph.add("Conv", *operands, **attributes), perm=to_channels_last)
            return self._finished(graph, out, bias, x, out_dtype)
        if weight.scheme.group_size or weight.scheme.act_group_size:
            raise ValueError(
                f"a convolution of scheme {weight.scheme} has no translation to ONNX: ConvInteger has no groups of "
                "products; quantize it with a scheme of one scale a row, such as w8a8"
            )
        integers, x_scales, faults = graph.quantize(images, weight.x_scale, (1, 2, 3))
        if weight.zeros is not None:  # onnxruntime wants one zero point for all filters
            weight = weight._replace(qweight=weight.integers(), zeros=None, scheme=QuantScheme.parse("w8a8"))
        filters = self._initializer(
            weight,
            "weight",
            lambda: _unsigned(weight).view(-1, *kernel).permute(*to_channels_first),
            packed=_uint4_of(weight),
        )
        operands = [graph.add("Transpose", integers, perm=to_channels_first), graph.cast(filters, _UINT8)]
        operands += [graph.offset, self._zero_points(graph, weight, torch.flatten)]
        sums = graph.cast(graph.add("ConvInteger", *operands, **attributes), _FLOAT)
        sums = graph.add("Add", graph.add("Transpose", sums, perm=to_channels_last), faults)
        w_scales = self._initializer(weight, "weight_scale", lambda: weight.scales.flatten())
        out = graph.add("Mul", sums, graph.add("Mul", x_scales, w_scales))
        return self._finished(graph, out, bias, x, out_dtype)

    def _weight(
        self,
        qweight: ir.Value,
        scales: ir.Value,
        zeros: ir.Value | None,
        in_features: int,
        scheme: int,
        x_scale: ir.Value | None,
    ) -> StoredWeight:
        parsed = QuantScheme.from_code(scheme)
        if parsed.has_min and parsed.int_activations:
            raise ValueError(
                f"a layer of scheme {parsed} cannot be exported to ONNX, whose integer products know no minima; call "
                "qkernels.dequantize_ before, or quantize it with an a16 scheme, or one without -min"
            )
        return StoredWeight(
            self._tensor(qweight, "qweight"),
            self._tensor(scales, "scales"),
            None if parsed.symmetric or zeros is None else self._tensor(zeros, "zeros"),
            in_features,
            parsed,
            None if x_scale is None else self._tensor(x_scale, "x_scale"),
        )

    def _finished(
        self, graph: GraphNodes, out: ir.Value, bias: ir.Value | None, x: ir.Value, out_dtype: int | None
    ) -> ir.Value:
        """Rule 5."""
        if bias is not None:
            out = graph.add("Add", out, graph.cast(bias, _FLOAT))
        dtype = x.dtype if out_dtype is None else ir.DataType(out_dtype)
        return graph.done(out if dtype == _FLOAT else graph.add("Cast", out, to=int(dtype)))

    def _float_product(self, graph: GraphNodes, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """`Gemm` with the dequantized weight."""
        x = graph.pad_columns(x, weight.in_features, _columns(weight))
        return graph.add("Gemm", x, self._dequantized(graph, weight), transB=1)

    def _nbits_product(self, graph: GraphNodes, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """`MatMulNBits` of onnxruntime."""
        tensors = nbits_tensors(_canonical(weight), weight.in_features, weight.scheme)
        parts = [
            self._initializer(weight, "weight", lambda: tensors.codes),
            self._initializer(weight, "weight_scale", lambda: tensors.scales),
        ]
        if (zeros := tensors.zeros) is not None:
            parts.append(self._initializer(weight, "weight_zero_point", lambda: zeros))
        sizes = {"K": weight.in_features, "N": weight.out_features, "bits": tensors.bits}
        sizes |= {"block_size": tensors.block_size, "accuracy_level": self._form.accuracy_level}
        self._domains.add(_MICROSOFT)
        return graph.add_of(_MICROSOFT, "MatMulNBits", x, *parts, **sizes)

    def _blocked_product(self, graph: GraphNodes, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """`MatMul` with what `DequantizeLinear` makes of blocks of columns."""
        if weight.scheme.has_min:
            raise ValueError(f"DequantizeLinear has no minima of {weight.scheme}; write it with the form 'dequantize'")
        if self._opset < _UINT4_OPSET:
            raise ValueError(f"opset_version must be {_UINT4_OPSET} or more for blocks of columns, got {self._opset}")
        tensors = dequantized_tensors(_canonical(weight), weight.in_features, weight.scheme)
        packed = None
        if weight.scheme.weight_format is INT4:
            packed = ml_dtypes.int4 if tensors.zeros is None else ml_dtypes.uint4
        parts = [
            self._initializer(weight, "weight", lambda: tensors.integers, packed),
            self._initializer(weight, "weight_scale", lambda: tensors.scales),
        ]
        if (zeros := tensors.zeros) is not None:
            parts.append(self._initializer(weight, "weight_zero_point", lambda: zeros, packed))
        blocks = {"block_size": tensors.block_size} if tensors.block_size else {}
        return graph.add("MatMul", x, graph.add("DequantizeLinear", *parts, axis=tensors.axis, **blocks))

    def _dequantized(self, graph: GraphNodes, weight: StoredWeight) -> ir.Value:
        """What `DequantizeLinear` makes of the groups [N * groups, group], as rows [N, K], padded to whole groups.

        Not in blocks of columns: those, with `MatMul`, onnxruntime fuses to a product of quantized activations.
        """
        group, is_int4 = weight.scheme.group_size or weight.in_features, weight.scheme.weight_format is INT4
        columns = _columns(weight)
        stored = self._initializer(
            weight, "weight", lambda: _padded(_unpacked(weight), columns).reshape(-1, group), packed=_uint4_of(weight)
        )
        scales = self._initializer(weight, "weight_scale", lambda: weight.scales.flatten())
        parts = [stored, scales]
        if is_int4 and not weight.scheme.has_min:
            zeros = torch.full_like(weight.scales, 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros
            parts.append(
                self._initializer(weight, "weight_zero_point", lambda: zeros.flatten(), packed=ml_dtypes.uint4)
            )
        matrix = graph.add("DequantizeLinear", *parts, axis=0)
        if weight.scheme.has_min and (minima := weight.zeros) is not None:
            offsets = self._initializer(weight, "weight_min", lambda: minima.view(torch.float32).reshape(-1, 1))
            matrix = graph.add("Add", matrix, offsets)
        if columns == group:
            return matrix
        return graph.add("Reshape", matrix, graph.integers(weight.out_features, columns))

    def _int_product(self, graph: GraphNodes, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """Rule 4 with one group a row."""
        integers, x_scales, faults = graph.quantize(x, weight.x_scale)
        stored = self._initializer(weight, "weight", lambda: _unsigned(weight).t(), packed=_uint4_of(weight))
        zeros = self._zero_points(graph, weight, torch.flatten)
        sums = graph.add("Add", graph.matmul_integer(integers, graph.cast(stored, _UINT8), zeros), faults)
        scales = self._initializer(weight, "weight_scale", lambda: weight.scales.flatten())
        return graph.add("Mul", sums, graph.add("Mul", x_scales, scales))

    def _sum_of_groups(self, graph: GraphNodes, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """Rule 4 with groups: a `Scan` over them, in order."""
        group, act_group = weight.scheme.group_size, weight.scheme.act_group_size
        sizes = [size for size in (group, act_group) if size is not None]
        step, columns = min(sizes), _round_up(weight.in_features, max(sizes))
        steps = columns // step

        def by_step(per_group: Tensor) -> Tensor:  # [N, groups] -> [steps, N]
            whole = per_group.expand(-1, steps) if group is None else per_group.repeat_interleave(group // step, dim=1)
            return _padded(whole, steps).t()

        x = graph.pad_columns(x, weight.in_features, columns)
        if act_group is not None:
            x = graph.add("Reshape", x, graph.integers(0, columns // act_group, act_group))
        integers, x_scales, faults = graph.quantize(x, weight.x_scale)
        integers = graph.add("Reshape", integers, graph.integers(0, steps, step))
        stored = self._initializer(
            weight,
            "weight",
            lambda: _padded(_unsigned(weight), columns).t().reshape(steps, step, -1),
            packed=_uint4_of(weight),
        )
        zeros = self._zero_points(graph, weight, by_step)
        # By name, what each step reads a slice of.
        slices = {"x": graph.add("Transpose", integers, perm=[1, 0, 2]), "weight": graph.cast(stored, _UINT8)}
        if weight.zeros is not None:
            slices["zeros"] = zeros
        if group is not None:
            slices["scales"] = self._initializer(weight, "weight_scale", lambda: by_step(weight.scales))
        if act_group is not None:
            places = graph.integers(*np.arange(steps) // (act_group // step))
            for name, per_group in (("x_scales", x_scales), ("faults", faults)):  # [M, groups, 1]
                slices[name] = graph.add("Transpose", graph.add("Gather", per_group, places, axis=1), perm=[1, 0, 2])

        body = GraphNodes(f"{graph.prefix}_step")
        inputs = {name: ir.Value(name=f"{body.prefix}_{name}") for name in ("total", *slices)}
        sums = body.matmul_integer(inputs["x"], inputs["weight"], inputs.get("zeros", zeros), graph.offset)
        if "faults" in inputs:
            sums = body.add("Add", sums, inputs["faults"])
        scales = [inputs[name] for name in ("x_scales", "scales") if name in inputs]
        scale = scales[0] if len(scales) == 1 else body.add("Mul", *scales)
        total = body.add("Add", inputs["total"], body.add("Mul", sums, scale))
        loop = ir.Graph([*inputs.values()], [total], nodes=body.nodes, name=body.prefix)
        rows = graph.add("Shape", x, start=0, end=1)
        shape = graph.add("Concat", rows, graph.integers(weight.out_features), axis=0)
        zero = graph.add("Expand", graph.constant(0.0), shape)
        out = graph.add("Scan", zero, *slices.values(), body=loop, num_scan_inputs=len(slices))
        if group is None:
            return graph.add("Mul", out, self._initializer(weight, "weight_scale", lambda: weight.scales.flatten()))
        return out if act_group is not None else graph.add("Mul", graph.add("Add", out, faults), x_scales)

    def _zero_points(self, graph: GraphNodes, weight: StoredWeight, of_groups: Callable[[Tensor], Tensor]) -> ir.Value:
        """The zero points of `_unsigned(weight)`: uint8, one for all, or what `of_groups` makes of [N, groups]."""
        zeros = weight.zeros
        if zeros is None:
            return graph.constant(8 if weight.scheme.weight_format is INT4 else OFFSET, np.uint8)
        return self._initializer(weight, "weight_zero_point", lambda: of_groups(zeros))

    def _initializer(
        self, weight: StoredWeight, kind: str, make: Callable[[], Tensor], packed: type | None = None
    ) -> ir.Value:
        """The value of the tensor `make()`, one for all uses of a weight; of type `packed` where the opset has it."""
        key = (weight.qweight.data_ptr(), weight.qweight.shape, weight.scheme, kind)
        if key not in self._stored:
            tensor = make().contiguous()
            owner = next((target for target, t in self._inputs.values() if t.data_ptr() == key[0]), "quantized.qweight")
            name = f"{owner.rpartition('.')[0]}.{kind}"
            if any(value.name == name for value in self._stored.values()):
                name += f"_{len(self._stored)}"
            if packed is not None and self._opset >= _UINT4_OPSET:
                stored: Any = ir.tensor(tensor.numpy().astype(packed), name=name)
            else:
                stored = _core.TorchTensor(tensor, name=name)
            self._stored[key] = ir.Value(
                name=name, const_value=stored, shape=ir.Shape(stored.shape), type=ir.TensorType(stored.dtype)
            )
        return self._stored[key]

    def _graph(self) -> GraphNodes:
        self._graphs += 1
        return GraphNodes(f"quantized_{self._graphs}")

    def _fold(self, tensor: Tensor) -> ir.Value:
        """A value for a tensor that was computed from constants; the exporter names it, and tells its shape."""
        value = ir.Value(const_value=_core.TorchTensor(tensor.contiguous()))
        self._folded[id(value)] = (value, tensor)
        return value

    def _is_input(self, value: ir.Value) -> bool:
        """Whether it is a parameter or buffer, and not an input of a branch that has the same name."""
        node = value.meta.get("node")
        return value.name in self._inputs and node is not None and node.graph is self._graph_of_inputs

    def _tensor(self, value: ir.Value, argument: str) -> Tensor:
        """The tensor of a constant."""
        if id(value) in self._folded:
            return self._folded[id(value)][1]
        if not self._is_input(value):
            raise ValueError(
                f"{argument} must be a parameter or buffer of the model, so that the ONNX file can store it, and not "
                f"be computed or belong to a branch or loop (torch.cond): {value.name}"
            )
        target, tensor = self._inputs[value.name]
        self._consumed.add(target)
        return tensor.detach()


def _refuse(name: str, *args: Any) -> NoReturn:
    raise ValueError(
        f"{name} has no translation to ONNX; leave the layers that call it in float (skip= of quantize_), or "
        "qkernels.dequantize_ the model"
    )


def _canonical(weight: StoredWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.qweight, weight.scales, weight.zeros)


def _uint4_of(weight: StoredWeight) -> type | None:
    """The type of the stored integers, plus an offset, of a weight of 4 bits."""
    return ml_dtypes.uint4 if weight.scheme.weight_format is INT4 else None


def _columns(weight: StoredWeight) -> int:
    """K, and what fills the last group of a grouped weight."""
    return _round_up(weight.in_features, weight.scheme.group_size or 1)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(matrix: Tensor, columns: int) -> Tensor:
    return pad(matrix, (0, columns - matrix.shape[1]))


def _unpacked(weight: StoredWeight) -> Tensor:
    """The stored integers [N, K]: int8, or uint8 of 0..15."""
    return weight.scheme.weight_format.unpack(weight.qweight, weight.in_features)


def _unsigned(weight: StoredWeight) -> Tensor:
    """The stored integers as uint8 [N, K], those of 8 bits plus 128."""
    return (_unpacked(weight).to(torch.int16) + (0 if weight.scheme.weight_format is INT4 else OFFSET)).to(torch.uint8)


def _without_saved_input(program: torch.export.ExportedProgram) -> None:
    """Replace products that save their input for a gradient, in a graph where nothing reads that, by plain ones."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not _ops.linear_with_saved_input.default:
            continue
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
            continue
        with graph.inserting_before(node):
            plain = graph.call_function(_ops.linear.default, node.args, node.kwargs)
        plain.meta = {**node.meta, "val": node.meta["val"][0]}
        for user in list(node.users):
            user.replace_all_uses_with(plain)
            program.graph_signature.replace_all_uses(user.name, plain.name)
            graph.erase_node(user)
        graph.erase_node(node)


def _has_quantized(program: torch.export.ExportedProgram) -> bool:
    """Whether one of our operators is called, in a branch or loop too."""
    graphs = (m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    targets = (node.target for graph in graphs for node in graph.nodes)
    return any(isinstance(target, torch._ops.OpOverload) and target.namespace == "qkernels" for target in targets)


def _translating(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The exporter's conversion of a program to ONNX, for which `_Translator` translates our operators."""

    @functools.wraps(convert)
    def converted(exported_program: torch.export.ExportedProgram, *, registry: Any, **options: Any) -> Any:
        if options.get("lower") == "none" or not _has_quantized(exported_program):
            return convert(exported_program, registry=registry, **options)
        _without_saved_input(exported_program)
        translator = _Translator(exported_program, registry.opset_version)
        translator.register(registry)
        program = convert(exported_program, registry=registry, **options)
        translator.add_initializers(program.model.graph)
        return program

    return converted


def _with_int8_weights(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """The exporter's decomposition of a program, which takes apart an `Int8Weight` only if it needs no gradient."""

    @functools.wraps(prepare)
    def prepared(exported_program: torch.export.ExportedProgram, **options: Any) -> Any:
        state = exported_program.state_dict
        trained = {name: tensor for name, tensor in state.items() if isinstance(tensor, Int8Weight)}
        state.update({name: nn.Parameter(tensor.detach(), requires_grad=False) for name, tensor in trained.items()})
        try:
            return prepare(exported_program, **options)
        finally:
            state.update(trained)

    return prepared


for _name in ("_prepare_exported_program_for_export", "_exported_program_to_onnx_program"):
    if not hasattr(_core, _name):
        raise ImportError(f"quantized layers cannot be exported to ONNX: this torch has no {_core.__name__}.{_name}")
_core._prepare_exported_program_for_export = _with_int8_weights(_core._prepare_exported_program_for_export)
_core._exported_program_to_onnx_program = _translating(_core._exported_program_to_onnx_program)
