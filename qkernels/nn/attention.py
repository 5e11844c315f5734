"""`QuantMultiheadAttention`: `nn.MultiheadAttention` whose projections are quantized products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats.scheme import QuantScheme
from .adapters import CompositeAdapter, SplitLayer, adapter_of, register_adapter
from .linear import QuantLinear

if TYPE_CHECKING:
    from collections.abc import Mapping

_PARTS = ("q_proj", "k_proj", "v_proj")


class QuantMultiheadAttention(SplitLayer, nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762) in the place of an `nn.MultiheadAttention`.

    Its projections are layers of their own: `in_proj` [3 E, E] and `out_proj` [E, E], or `q_proj`, `k_proj`, `v_proj`
    and `out_proj` where kdim or vdim differ from E. Each is a `QuantLinear`, or the float layer if it was skipped.
    Self-attention is one product with `in_proj`; other calls multiply the rows of it that they need. Scores, softmax
    and sums over values are those of floats. `in_proj_weight` and the like can be read, as of the float layer.

    Shape: as of `nn.MultiheadAttention`, and so are the arguments of `forward`.

    Example:
        >>> layer = QuantMultiheadAttention.from_float(nn.MultiheadAttention(32, 4, batch_first=True), "w8a8")
        >>> x = torch.randn(2, 5, 32)
        >>> out, weights = layer(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 5]))
    """

    float_type = nn.MultiheadAttention
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    out_proj: nn.Module  # type: ignore[assignment]

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        """A twin of `layer`, on the same parameters, whose projections are float layers still."""
        nn.Module.__init__(self)
        for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
            setattr(self, name, getattr(layer, name))
        self._qkv_same_embed_dim = layer._qkv_same_embed_dim
        if self._qkv_same_embed_dim:
            self.in_proj = _linear(layer.in_proj_weight, layer.in_proj_bias)
        else:
            for name in _PARTS:
                setattr(self, name, _linear(getattr(layer, f"{name}_weight")))
            self.register_parameter("qkv_bias", layer.in_proj_bias)
        self.out_proj = layer.out_proj
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, getattr(layer, name))
        self.training = layer.training

    @classmethod
    def from_float(
        cls, layer: nn.MultiheadAttention, scheme: str | QuantScheme, **layer_options: Any
    ) -> QuantMultiheadAttention:
        """Quantize all projections of a float layer; biases are shared with it.

        Args:
            layer_options: mode, grad_dtype and weight_scale, as in `QuantLinear`.

        Raises:
            TypeError: for another kind of module, or a subclass that computes something else.
            ValueError: if a weight holds NaN or Inf, or the scheme does not fit.
        """
        if not isinstance(layer, nn.MultiheadAttention) or (why := AttentionAdapter().reason(layer)) is not None:
            raise TypeError(
                f"layer must be an nn.MultiheadAttention, got {type(layer).__name__}"
                + (f": {why}" if isinstance(layer, nn.MultiheadAttention) else "")
            )
        twin = cls(layer)
        for name, part in list(twin.named_children()):
            setattr(twin, name, adapter_of(part).quantize(part, scheme, **layer_options))
        return twin

    # What parents read of a float layer.

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        return self.in_proj.weight if self._qkv_same_embed_dim else None

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.in_proj.bias if self._qkv_same_embed_dim else self.qkv_bias

    @property
    def q_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        return None if self._qkv_same_embed_dim else self.q_proj.weight

    @property
    def k_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        return None if self._qkv_same_embed_dim else self.k_proj.weight

    @property
    def v_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        return None if self._qkv_same_embed_dim else self.v_proj.weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal: as of
                `nn.MultiheadAttention`.

        Returns:
            The output, of the shape of `query`, and the weights of attention, or None.

        Raises:
            RuntimeError: for nested tensors, shapes that do not fit, and `is_causal` without `attn_mask`.
        """
        batched = self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which must be given too")
        projected = self._project(query, key, value)
        if not batched:
            projected = tuple(x.unsqueeze(0) for x in projected)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            projected = tuple(x.transpose(0, 1) for x in projected)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in self._extended(projected))
        added = k.shape[2] - projected[1].shape[1]  # columns of bias_k and of zeros, which every query attends to
        mask = self._mask(q, k.shape[2] - added, key_padding_mask, attn_mask)
        hint = is_causal and key_padding_mask is None and not added and not need_weights
        if mask is not None and added:
            mask = F.pad(mask, (0, added))
        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            heads = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, None if hint else mask, dropout, is_causal=hint)
        out = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the inputs are batched."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise RuntimeError(
                f"a {type(self).__name__} takes no nested tensors, which need the fast path of float layers; pass "
                "padded tensors with key_padding_mask, and enable_nested_tensor=False to nn.TransformerEncoder"
            )
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise RuntimeError(
                "query, key and value must all be batched (3 dimensions) or all unbatched (2), "
                f"got {[list(x.shape) for x in (query, key, value)]}"
            )
        for name, x, features in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.shape[-1] != features:
                raise RuntimeError(f"{name} must have {features} features, got shape {list(x.shape)}")
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            raise RuntimeError(
                "key and value must have one length, and all three one batch size, "
                f"got {[list(x.shape) for x in (query, key, value)]}"
            )
        return query.dim() == 3

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each [..., E] with the leading dimensions of what it is computed from."""
        if not self._qkv_same_embed_dim:
            biases = (None, None, None) if self.qkv_bias is None else self.qkv_bias.chunk(3)
            projected = [getattr(self, name)(x) for name, x in zip(_PARTS, (query, key, value), strict=True)]
            return tuple(x if b is None else x + b.to(x.dtype) for x, b in zip(projected, biases, strict=True))
        if query is key and key is value:
            return self.in_proj(query).chunk(3, dim=-1)
        if key is value:
            q, (k, v) = self._rows(query, 0, 1)[0], self._rows(key, 1, 3)
            return q, k, v
        return tuple(self._rows(x, part, part + 1)[0] for part, x in enumerate((query, key, value)))

    def _rows(self, x: Tensor, start: int, end: int) -> Sequence[Tensor]:
        """Some of q, k and v, computed from x by their rows of `in_proj`."""
        layer, size = self.in_proj, self.embed_dim
        hooks = layer._forward_hooks or layer._forward_pre_hooks
        compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        trained = getattr(layer, "mode", "frozen") != "frozen"  # rows of that weight cannot be compiled
        whole = hooks or "weight_mask" in layer._buffers or (compiled and trained)
        if type(layer) not in (QuantLinear, nn.Linear) or whole:
            return layer(x).chunk(3, dim=-1)[start:end]  # an adapter, a mask or an observer has its part
        rows = slice(start * size, end * size)
        bias = None if layer.bias is None else layer.bias[rows]
        return F.linear(x, layer.weight[rows], bias).chunk(end - start, dim=-1)

    def _extended(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [batch, length, E]; k and v with the learned row `bias_k`, `bias_v` and the row of zeros, if any."""
        q, *others = projected
        for place, bias in enumerate((self.bias_k, self.bias_v)):
            x = others[place]
            if bias is not None:
                x = torch.cat([x, bias.to(x.dtype).expand(x.shape[0], 1, -1)], dim=1)
            others[place] = F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x
        return q, others[0], others[1]

    def _mask(self, q: Tensor, keys: int, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """What is added to the scores [batch, heads, queries, keys]; it broadcasts to that shape."""
        batch, heads, queries, _ = q.shape
        total = None
        if mask is not None:
            shapes = {2: (queries, keys), 3: (batch * heads, queries, keys)}
            if tuple(mask.shape) != shapes.get(mask.dim()):
                raise RuntimeError(f"attn_mask must have shape {shapes[2]} or {shapes[3]}, got {list(mask.shape)}")
            total = _additive("attn_mask", mask, q.dtype)
            total = total if mask.dim() == 2 else total.unflatten(0, (batch, heads))
        if padding is not None:
            if tuple(padding.shape) != (batch, keys):
                raise RuntimeError(f"key_padding_mask must have shape {(batch, keys)}, got {list(padding.shape)}")
            extra = _additive("key_padding_mask", padding, q.dtype)[:, None, None, :]
            total = extra if total is None else total + extra
        return total

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the weights of a float layer for those of the projections, where these are trained or in float."""
        names = {"in_proj_weight": "in_proj.weight", "in_proj_bias": "in_proj.bias"}
        if not self._qkv_same_embed_dim:
            names = {f"{name}_weight": f"{name}.weight" for name in _PARTS} | {"in_proj_bias": "qkv_bias"}
        for old, new in names.items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)  # type: ignore[index,attr-defined]
        super()._load_from_state_dict(state_dict, prefix, *args)


class AttentionAdapter(CompositeAdapter[nn.MultiheadAttention]):
    """Splits `nn.MultiheadAttention` into its projections."""

    def reason(self, layer: nn.MultiheadAttention) -> str | None:
        if (why := super().reason(layer)) is not None:
            return why
        names = ["in_proj_weight"] if layer._qkv_same_embed_dim else [f"{name}_weight" for name in _PARTS]
        return None if all(layer._parameters.get(name) is not None for name in names) else "parametrized weight"

    def split(self, layer: nn.MultiheadAttention) -> QuantMultiheadAttention:
        return QuantMultiheadAttention(layer)

    def join(self, twin: SplitLayer, float_type: type[nn.Module]) -> nn.MultiheadAttention:
        assert isinstance(twin, QuantMultiheadAttention)
        layer: Any = float_type.__new__(float_type)
        nn.Module.__init__(layer)
        layer._qkv_same_embed_dim = twin._qkv_same_embed_dim
        same = twin._qkv_same_embed_dim
        layer.register_parameter("in_proj_weight", twin.in_proj.weight if same else None)
        for name in _PARTS:
            layer.register_parameter(f"{name}_weight", None if same else getattr(twin, name).weight)
        layer.register_parameter("in_proj_bias", twin.in_proj_bias)
        layer.out_proj = twin.out_proj
        layer.register_parameter("bias_k", twin.bias_k)
        layer.register_parameter("bias_v", twin.bias_v)
        return layer


def _linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear layer on these parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores: of a bool one, -Inf where it is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise RuntimeError(f"{name} must be bool or float, got {mask.dtype}")
    return mask.to(dtype)


register_adapter(nn.MultiheadAttention, AttentionAdapter())
