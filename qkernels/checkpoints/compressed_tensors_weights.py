"""The weight of a layer of compressed-tensors: from its tensors to the canonical storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats.storage import FLOAT_DTYPES, QuantizedWeight
from .bits import unpack_codes
from .grouped_codes import GroupedCodes, input_order
from .losses import Losses
from .safetensors_files import SafetensorsFiles

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


class WeightArguments(NamedTuple):
    """The `weights` of a config group."""

    bits: int
    symmetric: bool
    strategy: str  # "group", "channel" or "tensor"
    group_size: int | None

    def __str__(self) -> str:
        kind = f"groups of {self.group_size}" if self.group_size else f"one scale a {self.strategy}"
        return f"{self.bits} bits, {'symmetric' if self.symmetric else 'asymmetric'}, {kind}"

    @staticmethod
    def parse(group: str, weights: object) -> WeightArguments:
        """The arguments in a config group called `group`.

        Raises:
            ValueError: for others than integers of 1 to 8 bits with scales of groups, rows or all of the tensor.
        """

        def expect(ok: bool, field: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{group}.weights.{field} must be {what}, got {said.get(field)!r}")

        if not isinstance(weights, dict):
            raise ValueError(f"{group}.weights must be an object, got {weights!r}")
        said: dict[str, Any] = weights
        bits, size, strategy = said.get("num_bits", 8), said.get("group_size"), said.get("strategy")
        expect(said.get("type", "int") == "int", "type", "'int'; load it as floats with compressed-tensors")
        expect(type(bits) is int and 1 <= bits <= 8, "num_bits", "1 to 8")
        expect(type(said.get("symmetric", True)) is bool, "symmetric", "true or false")
        expect(not said.get("dynamic", False), "dynamic", "false")
        expect(size is None or (type(size) is int and (size > 0 or size == -1)), "group_size", "a positive number")
        if strategy is None:
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        expect(strategy in ("group", "channel", "tensor"), "strategy", "'group', 'channel' or 'tensor'")
        expect(strategy != "group" or (size or 0) > 0, "group_size", "a positive number")
        return WeightArguments(bits, said.get("symmetric", True), strategy, size if strategy == "group" else None)


class StoredLayer(NamedTuple):
    """What the headers of a layer say: where its weight is, and the scheme that holds it."""

    module: str
    own: Mapping[str, str]
    arguments: WeightArguments
    out_features: int
    in_features: int
    input_order: Tensor | None  # [K]: columns in the order of their groups

    @property
    def codes(self) -> GroupedCodes:
        return GroupedCodes(self.arguments.bits, self.arguments.group_size, self.arguments.symmetric)

    @staticmethod
    def open(tensors: SafetensorsFiles, module: str, own: Mapping[str, str], arguments: WeightArguments) -> StoredLayer:
        """Check the tensors `own` of a module, by their parts.

        Raises:
            ValueError: naming the tensor that is not there, or is not what the config group says.
        """

        def expect(part: str, ok: bool, what: str) -> None:
            if not ok:
                info = tensors.get(own.get(part, ""))
                got = f"{info.dtype} {list(info.shape)}" if info else "nothing"
                raise ValueError(f"{module}.{part} must be {what}, got {got}")

        def shape_of(part: str) -> tuple[int, ...]:
            return tensors[own[part]].shape if part in own else ()

        bits, packed = arguments.bits, "weight_packed" in own
        if packed:
            words = tensors[own["weight_packed"]]
            expect("weight_packed", words.dtype == torch.int32 and len(words.shape) == 2, "an int32 matrix")
            expect("weight_shape", shape_of("weight_shape") == (2,), "two integers")
            expect("weight_shape", tensors[own["weight_shape"]].dtype in _INTEGERS, "two integers")
            out_features, in_features = tensors.tensor(own["weight_shape"]).tolist()
            widths = {-(-in_features * bits // 32), -(-in_features // (32 // bits))}
            fits = in_features > 0 and words.shape[0] == out_features and words.shape[1] in widths
            what = f"{bits} bits of a weight {[out_features, in_features]}, as weight_shape says"
            expect("weight_packed", fits, what)
        else:
            info = tensors.get(own.get("weight", ""))
            expect("weight", info is not None and info.dtype == torch.int8 and len(info.shape) == 2, "an int8 matrix")
            out_features, in_features = shape_of("weight")
        size = arguments.group_size
        groups = -(-in_features // size) if size else 1
        shapes = {"tensor": [(1,), (), (1, 1)], "channel": [(out_features, 1), (out_features,)]}
        scales = shapes.get(arguments.strategy, [(out_features, groups)])
        expect("weight_scale", shape_of("weight_scale") in scales, f"float {list(scales[0])}")
        expect("weight_scale", tensors[own["weight_scale"]].dtype in FLOAT_DTYPES, f"float {list(scales[0])}")
        if not arguments.symmetric:
            dense = packed and arguments.strategy != "tensor"
            rows = {-(-out_features * bits // 32), -(-out_features // (32 // bits))}
            zeros = [(row, groups) for row in rows] if dense else scales
            expect("weight_zero_point", shape_of("weight_zero_point") in zeros, f"integers {list(zeros[0])}")
            dtype = torch.int32 if dense else torch.int8
            expect("weight_zero_point", tensors[own["weight_zero_point"]].dtype == dtype, str(dtype))
        order = None
        if "weight_g_idx" in own:
            expect("weight_g_idx", shape_of("weight_g_idx") == (in_features,), f"{in_features} numbers of groups")
            indices = tensors.tensor(own["weight_g_idx"]).to(torch.int64)
            if not bool((indices == -1).all()):  # the writer had no order
                order = input_order(f"{module}.weight_g_idx", indices, size or in_features)
        return StoredLayer(module, own, arguments, out_features, in_features, order)


def weight_values(stored: StoredLayer, tensors: SafetensorsFiles, losses: Losses) -> QuantizedWeight:
    """Read a layer's weight into the storage of its scheme.

    Raises:
        ValueError: for integers that have more bits than the config group says.
    """
    arguments, own = stored.arguments, stored.own
    bits = arguments.bits
    shape = (stored.out_features, stored.in_features)
    if "weight_packed" in own:
        words = tensors.tensor(own["weight_packed"])
        codes = _unpacked(f"{stored.module}.weight_packed", words, bits, stored.in_features)
    else:
        codes = _unsigned(f"{stored.module}.weight", tensors.tensor(own["weight"]), bits)
    scales = tensors.tensor(own["weight_scale"]).to(torch.float32).reshape(-1, _columns(arguments, shape))
    zeros = None if arguments.symmetric else _zeros(stored, tensors).expand(shape[0], -1)
    scales = scales.expand(shape[0], -1)
    if stored.input_order is not None:
        codes = codes[:, stored.input_order]
    return stored.codes.store(stored.module, codes, scales, zeros, losses)


def _columns(arguments: WeightArguments, shape: tuple[int, int]) -> int:
    """Scales in a row of a weight."""
    return -(-shape[1] // arguments.group_size) if arguments.group_size else 1


def _unpacked(name: str, words: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [R, count] of int32 words [R, W].

    Old writers let no code lie in two words: 10 of 3 bits, 6 of 5, 5 of 6, 4 of 7 in one. They need more words for it.

    Raises:
        ValueError: if the words may be of either kind.
    """
    dense, padded = -(-count * bits // 32), -(-count // (32 // bits))
    if words.shape[1] == dense and (dense != padded or 32 % bits == 0 or dense == 1):
        return unpack_codes(words, bits, count)
    per_word = 32 // bits
    if dense == padded:
        if bool((words[:, :-1] >> bits * per_word).any()):  # no old writer sets these bits
            return unpack_codes(words, bits, count)
        raise ValueError(f"{name} holds {count} codes of {bits} bits in {dense} words, which may be packed in two ways")
    places = torch.arange(0, bits * per_word, bits, dtype=torch.int32)
    codes = words.unsqueeze(-1) >> places & (1 << bits) - 1
    return codes.flatten(1)[:, :count].to(torch.uint8)


def _unsigned(name: str, integers: Tensor, bits: int) -> Tensor:
    """uint8 codes from 0 on of int8 integers around 0.

    Raises:
        ValueError: if some have more than `bits` bits.
    """
    half = 1 << bits - 1
    low, high = integers.aminmax()
    if int(low) < -half or int(high) >= half:
        raise ValueError(f"{name} must be in [{-half}, {half - 1}] for {bits} bits, got {int(low)} to {int(high)}")
    return (integers.to(torch.int16) + half).to(torch.uint8)


def _zeros(stored: StoredLayer, tensors: SafetensorsFiles) -> Tensor:
    """uint8 [N, groups], or [1, 1]: the code of 0."""
    name, bits = f"{stored.module}.weight_zero_point", stored.arguments.bits
    zeros = tensors.tensor(stored.own["weight_zero_point"])
    if zeros.dtype == torch.int32:  # the rows are packed, and not the columns
        return _unpacked(name, zeros.t().contiguous(), bits, stored.out_features).t().contiguous()
    return _unsigned(name, zeros, bits).reshape(-1, zeros.shape[-1] if zeros.dim() == 2 else 1)
