"""The same checkpoint with other schemes: layers that a format cannot hold, or that a user wants otherwise.

Nothing is read before the writer asks for it. What the other scheme holds exactly keeps its integers: other
activations, finer groups with repeated scales, 4 bits in 8, a zero point of 8 for symmetric integers. All else is
dequantized and quantized again (docs/numerics.md), which is a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..formats.rules import quantize_weight
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight, dequantize_weight, restore_features, weight_integers
from ..formats.weight_format import WEIGHT_FORMATS
from .checkpoint import Checkpoint, CheckpointLayer, FloatTensor, LayerWeight
from .losses import Losses


def requantized(
    checkpoint: Checkpoint,
    schemes: Mapping[str, str | QuantScheme],
    losses: Losses,
    *,
    ordered: bool = False,
) -> Checkpoint:
    """A checkpoint some of whose weights have other schemes.

    Args:
        checkpoint: it stays as it is.
        schemes: by the name of a quantized layer, or of a module with a float matrix `weight` [N, K].
        losses: the policy. Quantizing floats is what the caller asks for, and no loss; integers that change are one.
        ordered: columns that are stored in another order (`input_order`) are put in that of the input, where a scheme
            is given; with groups of columns that is a loss.

    Returns:
        A checkpoint that reads, converts and forgets one layer at a time.

    Raises:
        ValueError: for a name that has no such weight, or static activations where the layer has none.
        LossError: for integers that would change, unless the policy is "requantize".

    Example:
        >>> import torch
        >>> from qkernels.checkpoints.checkpoint import Checkpoint, FloatTensor
        >>> from qkernels.checkpoints.losses import Losses
        >>> weight = FloatTensor((8, 64), torch.float32, lambda: torch.ones(8, 64))
        >>> found = requantized(Checkpoint("float", {}, {}, {"up.weight": weight}), {"up": "w8a8"}, Losses())
        >>> found.layers["up"].read().weight.qweight.dtype
        torch.int8
    """
    layers, floats = dict(checkpoint.layers), dict(checkpoint.floats)
    for name, asked in schemes.items():
        scheme, weight = QuantScheme.parse(asked), f"{name}.weight"
        if name in layers:
            layers[name] = _changed(layers[name], scheme, losses, ordered)
        elif weight in floats and len(floats[weight].shape) == 2 and floats[weight].dtype.is_floating_point:
            layers[name] = _quantized(name, weight, floats.pop(weight), scheme)
        else:
            raise ValueError(f"schemes must name quantized layers or modules with a float matrix, got {name!r}")
    return replace(checkpoint, layers=layers, floats=floats)


def keeps_integers(old: QuantScheme, new: QuantScheme) -> bool:
    """Whether each weight of `old` is one of `new`, to the bit."""
    finer = old.group_size == new.group_size or (
        new.group_size is not None and (old.group_size is None or old.group_size % new.group_size == 0)
    )
    if new.has_min:  # integers of 8 bits have a minimum of 0
        zeros = old.has_min or new.weight_bits == 8
    else:
        wider = (old.weight_bits, new.weight_bits) == (4, 8)
        zeros = not old.has_min and (old.symmetric or not new.symmetric or wider)
    return finer and zeros and old.weight_bits <= new.weight_bits


def quantize_again(name: str, exact: Tensor, scheme: QuantScheme, losses: Losses) -> QuantizedWeight:
    """Quantize the float32 values [N, K] of the weight called `name`, and account for what they lost."""
    weight = quantize_weight(exact, scheme)
    kept = dequantize_weight(*weight, exact.shape[1], scheme)
    losses.changed(name, f"weights that were quantized again as {scheme.of_floats}", exact, kept)
    return weight


def dequantize(values: LayerWeight, in_features: int, scheme: QuantScheme) -> Tensor:
    """float32 [N, K] of a layer, its columns in the order of the input's features."""
    return restore_features(dequantize_weight(*values.weight, in_features, scheme), values.input_order)


def _changed(layer: CheckpointLayer, scheme: QuantScheme, losses: Losses, ordered: bool) -> CheckpointLayer:
    if scheme.static_activations and not layer.scheme.static_activations:
        raise ValueError(f"{layer.name} has no scale for the static activations of {scheme}: calibrate the model")
    exact = keeps_integers(layer.scheme, scheme) and not (ordered and layer.has_input_order)
    if not exact:
        why = f"{layer.scheme.of_floats} does not keep its integers as {scheme.of_floats}"
        losses.need_requantization(f"{layer.name}.weight", why)
    return replace(
        layer,
        scheme=scheme,
        reader=partial(_read, layer, scheme, losses, exact),
        has_input_order=layer.has_input_order and exact,
        source=None,
    )


def _read(layer: CheckpointLayer, scheme: QuantScheme, losses: Losses, exact: bool) -> LayerWeight:
    values = layer.read()
    x_scale = values.x_scale if scheme.static_activations else None
    if exact:
        weight = _same_integers(values.weight, layer.in_features, layer.scheme, scheme)
        return LayerWeight(weight, x_scale, values.input_order)
    floats = dequantize(values, layer.in_features, layer.scheme)
    return LayerWeight(quantize_again(f"{layer.name}.weight", floats, scheme, losses), x_scale)


def _same_integers(weight: QuantizedWeight, in_features: int, old: QuantScheme, new: QuantScheme) -> QuantizedWeight:
    """The weight in a scheme that `keeps_integers`."""
    qweight, scales, zeros = weight
    if old.weight_bits != new.weight_bits:
        integers = weight_integers(qweight, zeros, in_features, old)
        qweight = WEIGHT_FORMATS[new.weight_bits].pack(integers)
        zeros = zeros if old.has_min else None
    if new.has_min and not old.has_min:
        zeros = torch.zeros_like(scales)
    elif old.symmetric and not new.symmetric:
        zeros = torch.full_like(scales, old.weight_format.offset, dtype=torch.uint8)
    if old.group_size != new.group_size:
        assert new.group_size is not None
        groups = new.weight_groups(in_features)
        times = old.group_size // new.group_size if old.group_size else groups
        scales = scales.repeat_interleave(times, dim=1)[:, :groups].contiguous()
        zeros = None if zeros is None else zeros.repeat_interleave(times, dim=1)[:, :groups].contiguous()
    return QuantizedWeight(qweight, scales, zeros)


def _quantized(name: str, weight: str, tensor: FloatTensor, scheme: QuantScheme) -> CheckpointLayer:
    if scheme.static_activations:
        raise ValueError(f"{name} has no scale for the static activations of {scheme}: calibrate the model")
    out_features, in_features = tensor.shape
    details = f"quantized from {str(tensor.dtype).removeprefix('torch.')}"
    return CheckpointLayer(
        name,
        in_features,
        out_features,
        scheme,
        details,
        (weight,),
        lambda: LayerWeight(quantize_weight(tensor.read(), scheme)),
    )
