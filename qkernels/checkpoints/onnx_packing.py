"""The canonical storage as the constants of ONNX operators: what `onnx_weights` reads, every value kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight, weight_integers
from .bits import pack_codes
from .grouped_codes import stored_codes

_ROW_BLOCK = 128  # of a scale a row, repeated: a block is a power of two, and those of 512 are not computed right


class NBitsTensors(NamedTuple):
    """The constants of a `MatMulNBits`.

    Attributes:
        codes: uint8 [N, blocks, block_size * bits / 8], the last block padded with zeros.
        scales: float32 [N, blocks].
        zeros: float32 [N, blocks], of minima; uint8 [N, ceil(blocks * bits / 8)], of which a missing last one is 8, as
            onnxruntime's quantizer has it; or None for the half of the range of codes.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block_size: int


def nbits_tensors(weight: QuantizedWeight, in_features: int, scheme: QuantScheme) -> NBitsTensors:
    """A weight for `MatMulNBits` of onnxruntime.

    Args:
        weight: the canonical storage of [N, K].
        in_features: K.
        scheme: of the weight; the activations do not matter.

    Raises:
        ValueError: for minima of 8 bits, or such that are no product of the scale and a float32 zero point.
    """
    block, bits = scheme.group_size or _ROW_BLOCK, scheme.weight_bits
    blocks = -(-in_features // block)
    codes = pad(stored_codes(weight, in_features, scheme), (0, blocks * block - in_features))
    packed = pack_codes(codes.view(len(codes), blocks, block), bits).view(torch.uint8)
    scales = weight.scales if scheme.group_size else weight.scales.expand(-1, blocks)
    if weight.zeros is None:
        return NBitsTensors(packed, scales.contiguous(), None, bits, block)
    if scheme.has_min:
        floats = (-weight.zeros / weight.scales).expand(-1, blocks).contiguous()
        back = floats.to(torch.float64) * -scales.to(torch.float64)
        if bits == 8 or not torch.equal(back, weight.zeros.expand(-1, blocks).to(torch.float64)):
            raise ValueError(f"MatMulNBits cannot hold minima of {scheme} exactly; write it with the form 'dequantize'")
        return NBitsTensors(packed, scales.contiguous(), floats, bits, block)
    points = weight.zeros if scheme.group_size else weight.zeros.expand(-1, blocks)
    points = pad(points, (0, -blocks % (8 // bits)), value=1 << bits - 1)
    zeros = pack_codes(points, bits).view(torch.uint8)[:, : points.shape[1] * bits // 8]
    return NBitsTensors(packed, scales.contiguous(), zeros.contiguous(), bits, block)


class DequantizedTensors(NamedTuple):
    """The constants of a `DequantizeLinear` before `MatMul`.

    Attributes:
        integers: int8 or uint8 [K, N]; of 4 bits in the file, if the scheme has 4.
        scales: float32 [groups, N], or [N] for one a row.
        zeros: uint8 of the shape of `scales`, or None for 0.
        axis: of the attributes of the operator.
        block_size: likewise; 0 for one scale a row.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor | None
    axis: int
    block_size: int


def dequantized_tensors(weight: QuantizedWeight, in_features: int, scheme: QuantScheme) -> DequantizedTensors:
    """A weight for `DequantizeLinear`, as `nbits_tensors`: int8 or int4, and uint4 where it has zero points."""
    if weight.zeros is None:
        integers = weight_integers(weight.qweight, None, in_features, scheme)
    else:
        integers = stored_codes(weight, in_features, scheme)
    parts = (weight.scales, weight.zeros)
    if scheme.group_size is None:
        scales, zeros = (None if part is None else part.flatten() for part in parts)
    else:
        scales, zeros = (None if part is None else part.t().contiguous() for part in parts)
    assert scales is not None
    return DequantizedTensors(
        integers.t().contiguous(), scales, zeros, 1 if scheme.group_size is None else 0, scheme.group_size or 0
    )
