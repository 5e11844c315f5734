"""Tensor parallelism: layers whose parameters are DTensors on one mesh dimension, and their forward.

`torch.distributed.tensor.parallel.parallelize_module` and the plans of transformers make the parameters so. A layer
that is split by rows (a column plan: `ColwiseParallel`) has some of the output features on each process, one that is
split by columns (a row plan: `RowwiseParallel`) some of the input features. The canonical storage is cut where the
integers, scales and zero points of the parts are canonical storage again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..autograd.frozen import quant_linear
from ..autograd.int8_weight import Int8Weight
from ..autograd.layer_calls import autocast_dtype, check_input
from ..autograd.trained import trained_linear
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..formats.validate import STORAGE
from ..kernels import ops
from .dtensors import is_dtensor, with_local
from .row_parallel import Columns, quantize_weight, row_parallel_linear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

ROWS, COLUMNS = 0, 1


class StoredLayer(Protocol):
    """A `QuantLinear` or `QuantEmbedding`, of which this module reads what `nn` knows."""

    scheme: QuantScheme
    mode: str
    _parameters: dict[str, Any]

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


class ParallelLayer(StoredLayer, Protocol):
    """A `QuantLinear`."""

    grad_dtype: str
    weight_scale: str


class ParallelEmbedding(StoredLayer, Protocol):
    """A `QuantEmbedding`."""

    def look_up(self, indices: Tensor, weight: QuantizedWeight) -> Tensor: ...


def split_dimension(parameter: DTensor) -> int | None:
    """The dimension that the processes share out: `ROWS` or `COLUMNS`; None if each has everything.

    Raises:
        NotImplementedError: for a mesh of several dimensions, or another placement.
    """
    from torch.distributed.tensor import Replicate, Shard

    placements = parameter.placements
    if len(placements) == 1 and isinstance(placements[0], Replicate):
        return None
    if len(placements) == 1 and isinstance(placements[0], Shard):
        return placements[0].dim % parameter.dim()
    raise NotImplementedError(
        f"a quantized layer can be shared out along one dimension of a mesh, by Shard or Replicate; got {placements}"
    )


def check_rows(parameter: DTensor) -> None:
    """Raise ValueError for a parameter of an embedding that is split along its columns."""
    if split_dimension(parameter) == COLUMNS:
        raise ValueError(
            "the rows of a QuantEmbedding cannot be split; share its rows out (RowwiseParallel, or transformers' "
            "embedding_rowwise), or leave it whole"
        )


def check_columns(layer: ParallelLayer, processes: int) -> None:
    """Raise ValueError, naming what fits, unless the columns of a layer can be shared out among so many processes."""
    scheme, columns = layer.scheme, layer.in_features
    if layer.mode == "int8":
        raise ValueError(
            "a row plan (RowwiseParallel) cannot split a layer of mode 'int8', because the rows of its weight are "
            "rounded with one scale; use ColwiseParallel, mode='qat', or FSDP2 (fully_shard)"
        )
    if layer.weight_scale == "learned" and scheme.group_size is None:
        raise ValueError(
            "a row plan (RowwiseParallel) cannot split a layer whose rows have one learned scale; use a scheme with "
            "groups (-g32), weight_scale='absmax' or ColwiseParallel"
        )
    unit = math.lcm(scheme.weight_format.per_byte, scheme.group_size or 1, scheme.act_group_size or 1)
    if not _fits(columns, processes, unit):
        counts = [str(count) for count in range(1, 65) if _fits(columns, count, unit)]
        raise ValueError(
            f"a row plan (RowwiseParallel) cannot split {columns} input features of scheme {scheme} among {processes} "
            f"processes: each part but the last must be a multiple of {unit}, and none may be empty. "
            f"{', '.join(counts)} processes fit, or take a scheme of smaller groups, or ColwiseParallel"
        )


def _fits(columns: int, processes: int, unit: int) -> bool:
    """Whether parts of ceil(columns / processes), as torch cuts them, are multiples of `unit` and none is empty."""
    part = -(-columns // processes)
    return processes == 1 or (part % unit == 0 and part * (processes - 1) < columns)


def placement_of(layer: StoredLayer, name: str, dimension: int | None) -> Placement:
    """Where the parameter `name` of a layer lies, whose weight [N, K] is shared out along `dimension`."""
    from torch.distributed.tensor import Replicate, Shard

    if dimension == ROWS:
        return Shard(0)
    whole = name == "bias" or (name in ("scales", "zeros") and layer.scheme.group_size is None)
    return Replicate() if dimension is None or whole else Shard(1)


def distribute(
    layer: StoredLayer, name: str, mesh: DeviceMesh, dimension: int | None, source: int | None = 0
) -> DTensor:
    """The parameter `name` of a layer as a DTensor.

    Args:
        dimension: of the weight that is shared out, which `check_columns` has allowed.
        source: rank whose values all get; None: each process has them all.
    """
    from torch.distributed.tensor import distribute_tensor

    parameter = layer._parameters[name]
    with torch._C.DisableTorchFunctionSubclass():
        plain = parameter.detach()
        if not isinstance(plain, Int8Weight):
            plain = plain.as_subclass(Tensor)
    return distribute_tensor(plain, mesh, [placement_of(layer, name, dimension)], src_data_rank=source)


def _local(layer: StoredLayer, name: str, partial: bool = False) -> Tensor | None:
    """This process's part of a parameter.

    Args:
        partial: each process has a gradient of its own part of x, and the sum of these is meant.
    """
    from torch.distributed.tensor import Partial, Replicate

    local = layer._parameters.get(name)
    if is_dtensor(local):
        replicated = isinstance(local.placements[0], Replicate)
        local = local.to_local(grad_placements=[Partial()] if partial and replicated else None)
    if name in ("scales", "zeros", "x_scale") and local is not None and local.dtype == torch.int32:
        return local.view(torch.float32)
    return local


def _stored(layer: StoredLayer) -> QuantizedWeight:
    return QuantizedWeight(*(_local(layer, name) for name in STORAGE))  # type: ignore[arg-type]


def _column_scales(layer: ParallelLayer, stored: QuantizedWeight, columns: int) -> Tensor | None:
    """What an integer gradient of a grouped weight needs, of this process's part of it."""
    if layer.grad_dtype == "float" or layer.scheme.row_scaled:
        return None
    return ops.column_scales(*stored, columns, layer.scheme.name)


def parallel_linear(layer: ParallelLayer, x: Tensor) -> DTensor:
    """The forward of a layer whose parameters are DTensors.

    Args:
        layer: a layer that `distribute` has shared out.
        x: a DTensor [..., K] on the same mesh.

    Returns:
        [..., N]: split along the last dimension if the weight is split by rows; on each process if it is split by
        columns; split as x is, if each process has the whole weight.

    Raises:
        RuntimeError: if x is not a DTensor, or has another number of features.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    check_input(x, layer.in_features)
    weight = layer._parameters["qweight" if layer.mode == "frozen" else "weight"]
    if not is_dtensor(x):
        raise RuntimeError(
            "the input of a layer whose parameters are DTensors must be a DTensor, as parallelize_module and the "
            "plans of transformers make it, got a plain tensor"
        )
    dimension, last = split_dimension(weight), x.dim() - 1
    if dimension == COLUMNS:
        return _split_by_columns(layer, x.redistribute(placements=[Shard(last)]))
    kept = x.placements[0]
    spread = dimension is None and isinstance(kept, Shard) and kept.dim != last
    if not spread:
        x = x.redistribute(placements=[Replicate()])
    local_x = x.to_local(grad_placements=[Partial()] if dimension == ROWS else None)
    local = _by_mode(layer, local_x, partial=spread)
    if dimension == ROWS:
        from torch.distributed.tensor import DTensor

        shape = torch.Size((*x.shape[:-1], layer.out_features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, x.device_mesh, [Shard(last)], run_check=False, shape=shape, stride=stride)
    return with_local(x, local, layer.out_features)


def _by_mode(layer: ParallelLayer, x: Tensor, partial: bool) -> Tensor:
    """The forward on local tensors, of some rows of the weight."""
    bias, dtype = _local(layer, "bias", partial), autocast_dtype(x.device.type)
    if layer.mode == "frozen":
        stored = _stored(layer)
        needed = torch.is_grad_enabled() and x.requires_grad
        column_scales = _column_scales(layer, stored, layer.in_features) if needed else None
        args = (bias, layer.scheme.name, dtype, layer.grad_dtype, column_scales)
        return quant_linear(x, stored, *args, x_scale=_local(layer, "x_scale"))
    weight, scales = _local(layer, "weight", partial), _local(layer, "scales", partial)
    assert weight is not None
    x_scale = _local(layer, "x_scale")
    return trained_linear(x, weight, bias, layer.scheme, dtype, layer.grad_dtype, scales, x_scale)


def _split_by_columns(layer: ParallelLayer, x: DTensor) -> DTensor:
    from torch.distributed.tensor import DTensor, Replicate

    mesh, scheme = x.device_mesh, layer.scheme
    local, bias, trained = x.to_local(), _local(layer, "bias"), None
    if layer.mode == "frozen":
        stored = _stored(layer)
    else:
        weight, scales = _local(layer, "weight"), _local(layer, "scales")
        assert weight is not None
        with torch.no_grad():
            if scales is None:
                stored = quantize_weight(weight.detach(), scheme, mesh.get_group())
            else:
                stored = QuantizedWeight(ops.quantize_weight_scaled(weight, scales, scheme), scales.detach(), None)
        trained = (weight, scales)
    columns = local.shape[-1]
    if stored.qweight.shape[1] != scheme.packed_features(columns):
        raise RuntimeError(
            f"the input is split into parts of {columns} features, the weight into parts of "
            f"{stored.qweight.shape[1] * scheme.weight_format.per_byte}"
        )
    needed = torch.is_grad_enabled() and local.requires_grad
    column_scales = _column_scales(layer, stored, columns) if needed else None
    part = Columns(stored, scheme, mesh.get_group(), column_scales, _local(layer, "x_scale"))
    dtype = autocast_dtype(local.device.type)
    out = row_parallel_linear(local, part, bias, dtype, layer.grad_dtype, trained)
    return DTensor.from_local(out, mesh, [Replicate()], run_check=False)


def parallel_embedding(layer: ParallelEmbedding, indices: Tensor) -> DTensor:
    """The rows at `indices` [...] of a layer whose rows are shared out: each process adds those that it has.

    Raises:
        RuntimeError: if the indices are not a DTensor.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    weight = layer._parameters["qweight"]
    if not is_dtensor(indices):
        raise RuntimeError("the input of a layer whose parameters are DTensors must be a DTensor, got a plain tensor")
    if split_dimension(weight) is None:
        return with_local(indices, layer.look_up(indices.to_local(), _stored(layer)), layer.in_features)
    mesh = indices.device_mesh
    whole, stored = indices.redistribute(placements=[Replicate()]).to_local(), _stored(layer)
    first = mesh.get_local_rank() * -(-layer.out_features // mesh.size())
    here = (whole >= first) & (whole < first + len(stored.qweight))
    padded = stored if len(stored.qweight) else stored.map(lambda t: t.new_zeros(1, t.shape[1]))
    rows = layer.look_up(torch.where(here, whole - first, 0), padded)
    return DTensor.from_local(torch.where(here.unsqueeze(-1), rows, 0.0), mesh, [Partial()], run_check=False)
