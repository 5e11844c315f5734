"""transformers: the scale of static activations of fused experts, in folders that are split by expert.

In memory it is one number for all experts of a matrix. In a folder every tensor of the experts passes through the
mapping of the float weight, which splits it by expert and, of a fused gate, in two. So the scale is written as
`[E, parts, 1]`, with the dimensions of the weight: each matrix of the folder finds its own beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..formats.validate import x_scale_problem
from ..nn.grouped_linear import QuantGroupedLinear


def _static_experts(model: nn.Module) -> Iterator[tuple[str, QuantGroupedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantGroupedLinear) and module.scheme.static_activations:
            yield name, module


def _shape(name: str, layer: QuantGroupedLinear) -> tuple[int, int, int]:
    return layer.num_experts, 2 if name.endswith("gate_up_proj") else 1, 1


def split_x_scales(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `model` with the scales of its experts as a folder holds them."""
    keys = {f"{name}.x_scale": _shape(name, layer) for name, layer in _static_experts(model)}
    split = {
        key: state_dict[key].reshape(-1)[:1].expand(size).contiguous()
        for key, size in keys.items()
        if key in state_dict
    }
    return {**state_dict, **split}


def expect_split_x_scale(name: str, layer: nn.Module) -> None:
    """Let a layer without values be given the scale of a folder; `join_x_scale` makes it one number again."""
    if isinstance(layer, QuantGroupedLinear) and layer.scheme.static_activations:
        x_scale = torch.ones(_shape(name, layer), dtype=torch.float32, device="meta")
        layer.register_parameter("x_scale", nn.Parameter(x_scale, layer._learns_x_scale))


def join_x_scale(layer: nn.Module) -> str | None:
    """Make the scale that was read one number for all experts.

    Returns:
        Why it is none; None: it is, or the layer has no such scale.
    """
    if not isinstance(layer, QuantGroupedLinear) or not layer.scheme.static_activations:
        return None
    x_scale = layer.x_scale
    assert x_scale is not None
    if x_scale.is_meta:
        return "cannot be left on disk: give the experts another place in device_map"
    every = x_scale.detach().flatten()
    if not bool((every == every[0]).all()):
        return f"must be the same for all experts of a matrix, got {every.min().item()} to {every.max().item()}"
    if (problem := x_scale_problem(every[:1], layer.scheme)) is None:
        layer.set_x_scale(every[:1])
    return problem
