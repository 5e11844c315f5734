"""Smoothing: move the outliers of a layer's input channels into its weight, without changing what the model computes.

An int8 row of activations has one scale, so a few large channels take the resolution from all others. SmoothQuant (Xiao
et al. 2022, arXiv:2211.10438) divides input channel k by s[k] and multiplies column k of the weight by it, with

    s[k] = max|x[k]|^alpha / max|W[:, k]|^(1 - alpha).

The division is folded into what produces the input: the norm before q, k, v and before gate and up, the rows of up
before down, the rows of v before o (there one factor serves all query heads of a key-value head). Factors are powers of
two, so that weights keep their bits but for the exponent; only norms that multiply by 1 + weight (Gemma) are rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..system.deprecation import renamed_keywords
from .inputs import run_watched
from .observers import is_watched

# Decoders of transformers whose blocks compute o(attention(q, k, v)) and down(act(gate) * up) on norms that nothing
# else reads; tests/ptq/test_smoothquant.py checks each.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
LEAST_RANGE = 1e-5  # below this magnitude a channel counts as this large


class _Attention(Protocol):
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int


class _Mlp(Protocol):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


class _Block(Protocol):
    """A block of a decoder of `MODEL_TYPES`."""

    self_attn: _Attention
    mlp: _Mlp
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module


@renamed_keywords(inputs="calibration")
def smooth_(
    model: nn.Module, calibration: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]], alpha: float = 0.7
) -> list[str]:
    """Smooth the inputs of the linear layers of a decoder of transformers, in place; call it before `quantize_`.

    The function of the model stays the same up to rounding.

    Args:
        model: a float model of one of `MODEL_TYPES`.
        calibration: an iterable of sample inputs: tensors, mappings of keyword arguments, or tuples and lists that
            begin with the inputs as tensors, as a `DataLoader` yields them.
        alpha: in [0, 1]: how much of the range is moved from the activations to the weights (0.5 in the paper).

    Returns:
        The names of the layers whose inputs were smoothed.

    Raises:
        TypeError: for sample inputs of another kind.
        ValueError: for another model type, a model that `prepare_` has prepared, layers that are not plain `nn.Linear`
            (quantized, adapted), alpha out of range, or sample inputs that do not reach every layer with finite values.
            The model is then as it was.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if is_watched(model):
        raise ValueError("model must not be prepared yet, for its inputs change: call smooth_ first, then prepare_")
    config: Any = getattr(model, "config", None)
    model_type = config.get_text_config().model_type if hasattr(config, "get_text_config") else type(model).__name__
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model type must be one of {', '.join(MODEL_TYPES)}, got {model_type}")
    names = {module: name for name, module in model.named_modules()}
    decoder_blocks = [module for module in names if hasattr(module, "self_attn") and hasattr(module, "mlp")]
    blocks = cast(list[_Block], decoder_blocks)
    layers = [layer for block in blocks for layer in _linears(block)]
    for layer in layers:
        if type(layer) is not nn.Linear:
            raise ValueError(f"{names[layer]} must be an nn.Linear, got {type(layer).__name__}")
    ranges = _input_ranges(model, layers, calibration)
    for layer in layers:
        if layer not in ranges or not ranges[layer].isfinite().all():
            raise ValueError(f"calibration must reach {names[layer]} with finite values; nothing was changed")
    with torch.no_grad():
        for block in blocks:
            _smooth_block(block, ranges, alpha)
    return [names[layer] for layer in layers]


def _linears(block: _Block) -> list[nn.Linear]:
    attention, mlp = block.self_attn, block.mlp
    heads = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*heads, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _input_ranges(
    model: nn.Module, layers: Sequence[nn.Module], inputs: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]]
) -> dict[nn.Module, Tensor]:
    """max|x| of each input channel [K] of the layers, over all tokens; the model runs in evaluation mode."""
    ranges: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, x: Tensor) -> None:
        seen = x.abs().amax(dim=0)
        ranges[layer] = torch.maximum(ranges[layer], seen) if layer in ranges else seen

    run_watched(model, layers, inputs, watch)
    return ranges


def _smooth_block(block: _Block, ranges: Mapping[nn.Module, Tensor], alpha: float) -> None:
    attention, mlp = block.self_attn, block.mlp
    # Gemma 2 and 3 have norms around both halves; elsewhere the norm after the attention is the one before the MLP.
    before_mlp = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
    for norm, consumers in (
        (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (before_mlp, (mlp.gate_proj, mlp.up_proj)),
    ):
        column_ranges = torch.stack([_column_range(layer) for layer in consumers]).amax(dim=0)
        factors = _factors(ranges[consumers[0]], column_ranges, alpha)
        offset = _offset(norm)
        weight = norm.get_parameter("weight")
        weight.copy_((weight.to(torch.float32) + offset) / factors - offset)
        for layer in consumers:
            layer.weight.mul_(factors)
    factors = _factors(ranges[mlp.down_proj], _column_range(mlp.down_proj), alpha)
    _divide_rows(mlp.up_proj, factors)
    mlp.down_proj.weight.mul_(factors)
    # Query heads of a group read the same values, channel by channel: one factor for all of them.
    size, kv_heads = attention.head_dim, attention.v_proj.out_features // attention.head_dim
    per_head = (kv_heads, -1, size)
    seen, column_ranges = (
        values.view(per_head).amax(dim=1).flatten()
        for values in (ranges[attention.o_proj], _column_range(attention.o_proj))
    )
    factors = _factors(seen, column_ranges, alpha)
    _divide_rows(attention.v_proj, factors)
    queries = attention.o_proj.in_features // (kv_heads * size)
    attention.o_proj.weight.mul_(factors.view(kv_heads, 1, size).expand(-1, queries, -1).flatten())


def _column_range(layer: nn.Linear) -> Tensor:
    return layer.weight.abs().amax(dim=0).to(torch.float32)


def _factors(inputs: Tensor, column_ranges: Tensor, alpha: float) -> Tensor:
    """Powers of two near s, whose geometric mean is made 1: only their ratios matter."""
    exponents = alpha * inputs.clamp(min=LEAST_RANGE).log2() - (1 - alpha) * column_ranges.clamp(min=LEAST_RANGE).log2()
    return (exponents - exponents.mean()).round().exp2()


def _divide_rows(layer: nn.Linear, factors: Tensor) -> None:
    layer.weight.div_(factors.unsqueeze(1))
    if layer.bias is not None:
        layer.bias.div_(factors)


def _offset(norm: nn.Module) -> float:
    """The number that the norm adds to its weight before it multiplies by it: 1 for Gemma's, else 0."""
    weight = norm.get_parameter("weight").detach()
    ones = torch.ones(1, weight.numel(), dtype=weight.dtype, device=weight.device)
    zero_weight = {"weight": torch.zeros_like(weight)}
    return 1.0 if torch.func.functional_call(norm, zero_weight, ones).any() else 0.0
