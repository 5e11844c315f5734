"""Folders that bitsandbytes quantized: int8 rows with their largest magnitudes, and blocks of a table of 16 values.

The tables NF4 and FP4 are those of QLoRA (https://arxiv.org/abs/2305.14314), the int8 rows those of LLM.int8()
(https://arxiv.org/abs/2208.07339). No scheme here has a table: its values become 8-bit integers, a reported loss.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats.rules import quantize_weight
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight, dequantize_weight
from ..formats.weight_format import INT8
from .checkpoint import CheckpointLayer, LayerWeight
from .checkpoint_format import Variant
from .folder import FolderFormat
from .losses import Losses
from .safetensors_files import SafetensorsFiles

_STATE = ".quant_state.bitsandbytes__"
_INT8 = ("weight", "SCB", "weight_format")
_ROW_MAJOR = 0  # of weight_format; the others are layouts of GPUs that bitsandbytes itself reads no more
_MOST_STATE = 1 << 16  # bytes
_WHY = (
    "its table of 16 values has no scheme here; as 8-bit integers they change by about 0.5 % (NF4) or 0.4 % (FP4) of "
    "their root mean square"
)


class BitsAndBytes(FolderFormat):
    """Folders of transformers with `load_in_8bit` or `load_in_4bit`."""

    name = "bitsandbytes"
    title = "bitsandbytes"
    quant_methods = ("bitsandbytes",)
    writes = False
    variants = (
        Variant("int8", "w8a8", "exact", "no", "scale = SCB / 127; outlier columns are quantized like the others"),
        Variant("NF4, FP4", "w8a16-gN", "with a report", "no", "the table's values as 8-bit integers"),
        Variant("NF4, FP4 whose blocks cross rows", "w8a16-g64", "requantized", "no", "K is no multiple of 16"),
    )

    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        found = {}
        for name in tensors:
            if name.endswith(".SCB"):
                layer = _int8_layer(tensors, name.removesuffix(".SCB"))
            elif _STATE in name:
                layer = _table_layer(tensors, name, losses)
            else:
                continue
            found[layer.name] = layer
        threshold = config.get("llm_int8_threshold", 6.0)
        if threshold and any(layer.scheme.int_activations for layer in found.values()):
            warnings.warn(
                f"llm_int8_threshold is {threshold}: bitsandbytes multiplies columns of the activations with larger "
                "values in float; these layers have no such path, and quantize them like the others",
                stacklevel=3,
            )
        consumed = {name for layer in found.values() for name in layer.tensors}
        for name in tensors:
            module = name.rpartition(".")[0]
            stray = tensors[name].dtype in (torch.int8, torch.uint8) or module.endswith(".weight")
            if stray and name not in consumed:
                raise ValueError(f"{name} is quantized, but {module} has neither SCB nor a quant_state of its own")
        return found


def _int8_layer(tensors: SafetensorsFiles, module: str) -> CheckpointLayer:
    own = {part: f"{module}.{part}" for part in _INT8 if f"{module}.{part}" in tensors}
    weight, largest = tensors.get(f"{module}.weight"), tensors[own["SCB"]]
    if weight is None or weight.dtype != torch.int8 or len(weight.shape) != 2:
        raise ValueError(f"{module}.weight must be an int8 matrix, as {module}.SCB says; got {weight}")
    out_features, in_features = weight.shape
    if largest.dtype != torch.float32 or largest.shape != (out_features,):
        raise ValueError(f"{module}.SCB must be float32 [{out_features}], got {largest.dtype} {list(largest.shape)}")
    if "weight_format" in own:
        info = tensors[own["weight_format"]]
        order = tensors.tensor(own["weight_format"]).tolist() if math.prod(info.shape) == 1 else info
        if order not in (_ROW_MAJOR, [_ROW_MAJOR]):
            raise ValueError(f"{module}.weight_format must be {_ROW_MAJOR} (rows), got {order}")

    def read() -> LayerWeight:
        scales = tensors.tensor(own["SCB"]).unsqueeze(1) / torch.tensor(127.0)
        return LayerWeight(QuantizedWeight(tensors.tensor(own["weight"]), scales, None))

    details, scheme = "bitsandbytes int8, outlier columns in int8 too", QuantScheme.parse("w8a8")
    return CheckpointLayer(module, in_features, out_features, scheme, details, tuple(own.values()), read)


class _State(NamedTuple):
    """What the quant_state of a weight says."""

    quant_type: str
    out_features: int
    in_features: int
    blocksize: int
    nested_blocksize: int | None
    nested_offset: float


def _state(tensors: SafetensorsFiles, name: str) -> _State:
    """The quant_state in a tensor of JSON.

    Raises:
        ValueError: naming the tensor, if it is none.
    """

    def number(entry: object, field: str) -> int:
        if type(entry) is not int or not 0 < entry < 1 << 40:
            raise ValueError(f"{field} must be a positive number, got {entry!r}")
        return entry

    info = tensors[name]
    try:
        if info.dtype != torch.uint8 or math.prod(info.shape) > _MOST_STATE:
            raise ValueError(f"it is {info.dtype} {list(info.shape)}")
        said = json.loads(bytes(tensors.tensor(name).flatten().tolist()).decode("utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"it is a {type(said).__name__}")
        shape, nested = said.get("shape"), said.get("nested_blocksize")
        if said.get("quant_type") not in ("nf4", "fp4"):
            raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {said.get('quant_type')!r}")
        if not isinstance(shape, list) or len(shape) != 2:
            raise ValueError(f"shape must be that of a matrix, got {shape!r}")
        offset = said.get("nested_offset", 0.0)
        if not isinstance(offset, float | int) or not math.isfinite(offset):
            raise ValueError(f"nested_offset must be a finite number, got {offset!r}")
        return _State(
            said["quant_type"],
            number(shape[0], "shape[0]"),
            number(shape[1], "shape[1]"),
            number(said.get("blocksize"), "blocksize"),
            None if nested is None else number(nested, "nested_blocksize"),
            float(offset),
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no quant_state that can be read: {error}") from error


def _expected(state: _State) -> dict[str, tuple[tuple[torch.dtype, ...], int]]:
    """By name: the dtypes that a tensor beside the weight may have, and how many values it must have."""
    blocks = -(-state.out_features * state.in_features // state.blocksize)
    floats = (torch.float32,)
    if state.nested_blocksize is None:
        return {"absmax": ((*floats, torch.float16, torch.bfloat16), blocks), "quant_map": (floats, 16)}
    return {
        "absmax": ((torch.uint8,), blocks),
        "quant_map": (floats, 16),
        "nested_absmax": (floats, -(-blocks // state.nested_blocksize)),
        "nested_quant_map": (floats, 256),
    }


def _table_layer(tensors: SafetensorsFiles, state_name: str, losses: Losses) -> CheckpointLayer:
    parameter = state_name.partition(_STATE)[0]
    module, _, last = parameter.rpartition(".")
    if last != "weight":
        raise ValueError(f"{parameter} must be the weight of a module; a fused one is not read")
    state, own = _state(tensors, state_name), {"weight": parameter, "state": state_name}
    for part, (dtypes, count) in _expected(state).items():
        own[part] = f"{parameter}.{part}"
        info = tensors.get(own[part])
        if info is None or info.dtype not in dtypes or math.prod(info.shape) != count:
            got = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise ValueError(f"{own[part]} must be {count} values of {' or '.join(map(str, dtypes))}, got {got}")
    values, info = state.out_features * state.in_features, tensors.get(parameter)
    size = 0 if info is None else math.prod(info.shape) * info.dtype.itemsize
    if not -(-values // 2) <= size < -(-values // 2) + 16:  # a quant_storage of several bytes may be padded
        raise ValueError(f"{parameter} must hold {values} codes of 4 bits, got {size} bytes")
    losses.need_report(parameter, _WHY)
    groups = [g for g in INT8.group_sizes if state.in_features % g == 0 and state.blocksize % g == 0]
    if not groups:
        why = f"its blocks of {state.blocksize} cross rows of {state.in_features}, and no group of a scheme fits both"
        losses.need_requantization(parameter, why)
    scheme = QuantScheme.parse(f"w8a16-g{groups[-1] if groups else 64}")
    read = partial(_read_table if groups else _read_requantized, tensors, own, state, scheme, losses)
    nested = "" if state.nested_blocksize is None else ", nested absmax"
    details = f"bitsandbytes {state.quant_type} in blocks of {state.blocksize}{nested}"
    return CheckpointLayer(module, state.in_features, state.out_features, scheme, details, tuple(own.values()), read)


def _codes(tensors: SafetensorsFiles, own: Mapping[str, str], state: _State) -> Tensor:
    """uint8 [N, K] of 0..15: the first of two lies in the high bits."""
    stream = tensors.tensor(own["weight"]).flatten().view(torch.uint8)
    codes = torch.stack((stream >> 4, stream & 15), dim=-1).flatten()
    return codes[: state.out_features * state.in_features].view(state.out_features, state.in_features)


def _absmax(tensors: SafetensorsFiles, own: Mapping[str, str], state: _State) -> Tensor:
    """float32, one a block."""
    absmax = tensors.tensor(own["absmax"]).flatten()
    if state.nested_blocksize is None:
        return absmax.to(torch.float32)
    outer = tensors.tensor(own["nested_absmax"]).flatten().repeat_interleave(state.nested_blocksize)[: len(absmax)]
    return tensors.tensor(own["nested_quant_map"]).flatten()[absmax.to(torch.int64)] * outer + state.nested_offset


def table_as_integers(table: Tensor) -> tuple[Tensor, float]:
    """The integers of a table of values, and what they are divided by.

    That is chosen among 64 to 127 so that the largest value is nearly exact and the sum of squared errors least: 112
    for NF4, and 120 for FP4, where all but one value are exact.

    Args:
        table: float32 [n], largest magnitude 1.

    Returns:
        int8 [n] and a number m: `integers / m` is nearest to `table`.
    """
    exact, steps = table.to(torch.float64), torch.arange(64, 128, dtype=torch.float64).unsqueeze(1)
    integers = (exact * steps).round()
    best = int((integers / steps - exact).square().sum(dim=1).argmin())
    return integers[best].to(torch.int8), float(steps[best])


def _read_table(
    tensors: SafetensorsFiles, own: Mapping[str, str], state: _State, scheme: QuantScheme, losses: Losses
) -> LayerWeight:
    """Each value of the table as an integer: the blocks are groups, or several groups."""
    table, codes = tensors.tensor(own["quant_map"]).flatten(), _codes(tensors, own, state).to(torch.int32)
    peak = table.abs().max()
    if not (peak.isfinite() and peak > 0):
        raise ValueError(f"{own['quant_map']} must have a finite value that is not 0, got {table.tolist()}")
    integers, step = table_as_integers(table / peak)
    assert scheme.group_size is not None
    parts = state.blocksize // scheme.group_size
    absmax = _absmax(tensors, own, state).repeat_interleave(parts)
    absmax = absmax[: state.out_features * scheme.weight_groups(state.in_features)].view(state.out_features, -1)
    scales = absmax * peak / torch.tensor(step)
    weight = QuantizedWeight(integers[codes], scales, None)
    exact = (table[codes].unflatten(1, (-1, scheme.group_size)) * absmax.unsqueeze(-1)).flatten(1)
    kept = dequantize_weight(*weight, state.in_features, scheme)
    losses.changed(own["weight"], "weights of a table of 16 that 8 bits cannot hold", exact, kept)
    return LayerWeight(weight)


def _read_requantized(
    tensors: SafetensorsFiles, own: Mapping[str, str], state: _State, scheme: QuantScheme, losses: Losses
) -> LayerWeight:
    """The float values, quantized again."""
    table, codes = tensors.tensor(own["quant_map"]).flatten(), _codes(tensors, own, state).to(torch.int32)
    absmax = _absmax(tensors, own, state).repeat_interleave(state.blocksize)[: codes.numel()]
    exact = table[codes] * absmax.view_as(codes)
    weight = quantize_weight(exact, scheme)
    kept = dequantize_weight(*weight, state.in_features, scheme)
    losses.changed(own["weight"], "weights that were quantized again", exact, kept)
    return LayerWeight(weight)
