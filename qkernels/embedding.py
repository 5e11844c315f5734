"""`QuantEmbedding`: an embedding on the canonical storage, which a tied head can share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import ops, quantize
from .frozen_weight import FrozenWeight
from .nn import QuantLinear, leave_out_marker
from .products import refuse_script, refuse_write, traced
from .quantize import FLOAT_DTYPES, QuantizedWeight
from .schemes import QuantScheme

_STORAGE = ("qweight", "scales", "zeros")


def is_embedding(module: nn.Module) -> bool:
    """True for `nn.Embedding` and transformers' embeddings that multiply it by a number (`...ScaledWordEmbedding`)."""
    return type(module) is nn.Embedding or (
        isinstance(module, nn.Embedding)
        and type(module).__module__.startswith("transformers.models.")
        and type(module).__name__.endswith("ScaledWordEmbedding")
    )


class QuantEmbedding(nn.Embedding):
    """An embedding whose rows are dequantized as they are looked up.

    The weight is frozen and gets no gradient. The state dict holds `qweight`, `scales` and `zeros`
    (asymmetric schemes) as that of a `QuantLinear` with num_embeddings output features does, and a tied head shares
    the parameters (`quantize_` with `embeddings=True`). Only the format of the scheme's weight matters.

    Shape: input int64 or int32 [...] of indices; output [..., embedding_dim] of `compute_dtype`.

    Args:
        num_embeddings: N.
        embedding_dim: K.
        scheme: scheme name or `QuantScheme`.
        padding_idx: kept as an attribute; it concerns gradients only.
        embed_scale: the rows are multiplied by it in `compute_dtype`.
        device, dtype: of the parameters, and the `compute_dtype`. The scales are float32 always.

    Raises:
        ValueError: for an unknown scheme.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: str | QuantScheme = "w8a8",
        *,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.scheme = QuantScheme.parse(scheme)
        self.mode = "frozen"
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.embed_scale = embed_scale
        self.compute_dtype = dtype or torch.get_default_dtype()
        if self.compute_dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        empty = QuantLinear(embedding_dim, num_embeddings, False, self.scheme, device=device)
        self.set_weight(QuantizedWeight(empty.qweight, empty.scales, empty.zeros))

    __prepare_scriptable__ = refuse_script

    @property
    def weight(self) -> Tensor:
        """A read-only `FrozenWeight` [N, K]: the rows before `embed_scale`, without a copy."""
        return FrozenWeight(self.quantized_weight(), self.scheme.name, self.embedding_dim, self.compute_dtype)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if isinstance(value, FrozenWeight) and value.is_of(self):  # layer.weight = layer.weight
            return
        raise refuse_write("weight = ...")

    @weight.deleter
    def weight(self) -> None:
        raise refuse_write("del weight")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`, but a `weight` is refused with RuntimeError."""
        if name == "weight" or isinstance(param, FrozenWeight):
            raise refuse_write(f"parameter {name!r}")
        super().register_parameter(name, param)

    def quantized_weight(self) -> QuantizedWeight:
        """The canonical storage."""
        return QuantizedWeight(self.qweight, self.scales, self.zeros)

    @property
    def in_features(self) -> int:
        """K, by the name it has in a linear layer on the same storage."""
        return self.embedding_dim

    @property
    def out_features(self) -> int:
        """N, by the name it has in a linear layer on the same storage."""
        return self.num_embeddings

    @classmethod
    def from_float(cls, embedding: nn.Embedding, scheme: str | QuantScheme) -> QuantEmbedding:
        """Quantize an `nn.Embedding`, or a transformers embedding that multiplies it by a number.

        Raises:
            TypeError: for another module.
            ValueError: if the weight holds NaN or Inf.
        """
        layer = cls.like(embedding, scheme)
        layer.set_weight(quantize.quantize_weight(embedding.weight.detach(), layer.scheme))
        return layer

    @classmethod
    def like(cls, embedding: nn.Module, scheme: str | QuantScheme) -> QuantEmbedding:
        """An embedding of that shape and dtype on the meta device; `set_weight` gives it a weight.

        Raises:
            TypeError: for a module that is not an embedding, or does more than looking up rows.
        """
        if not is_embedding(embedding):
            raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
        if (reason := embedding_reason(embedding)) is not None:
            raise TypeError(f"embedding cannot be quantized: {reason}")
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            scheme,
            padding_idx=embedding.padding_idx,
            embed_scale=embed_scale(embedding),
            device="meta",
            dtype=embedding.weight.dtype,
        )
        layer.float_type = type(embedding)  # what `dequantize_` makes of it again
        return layer.train(embedding.training)

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Take over the storage of a quantized weight [N, K]; parameters are shared with the layer that owns them.

        Raises:
            RuntimeError: naming the tensor that does not fit.
        """
        if weight.qweight.shape[0] != self.num_embeddings:
            raise RuntimeError(f"qweight must have {self.num_embeddings} rows, got shape {list(weight.qweight.shape)}")
        ops.check_weight(*weight, self.embedding_dim, self.scheme)
        for name, tensor in zip(_STORAGE, weight, strict=True):
            shared = tensor is None or isinstance(tensor, nn.Parameter)
            self.register_parameter(name, tensor if shared else nn.Parameter(tensor, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return traced(self, input)
        indices = input.reshape(-1)
        rows = (None if t is None else t.index_select(0, indices) for t in (self.qweight, self.scales, self.zeros))
        out = ops.dequantize_weight(*rows, self.embedding_dim, self.scheme.name).to(self.compute_dtype)
        if self.embed_scale is not None:
            out = out * torch.tensor(self.embed_scale, dtype=self.compute_dtype, device=out.device)
        return out.reshape(*input.shape, self.embedding_dim)

    def dequantize(self) -> Tensor:
        """The weight as it is looked up, before `embed_scale`: float32 [num_embeddings, embedding_dim]."""
        return ops.dequantize_weight(self.qweight, self.scales, self.zeros, self.embedding_dim, self.scheme.name)

    def storage_bytes(self) -> int:
        """Bytes of the quantized weight."""
        return sum(t.numel() * t.element_size() for t in (self.qweight, self.scales, self.zeros) if t is not None)

    def extra_repr(self) -> str:
        scale = "" if self.embed_scale is None else f", embed_scale={self.embed_scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}{scale}"

    def _apply(self, fn, recurse=True):
        """Move everything, but keep the scales float32 when `fn` casts, as `QuantLinear` does."""
        scales = self.scales.detach()
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.scales.device)).dtype
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales.data = scales.to(self.scales.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Check the tensors before anything is copied, as `QuantLinear` does."""
        errors = [
            f"{prefix}{name} {problem}"
            for name in _STORAGE
            if (problem := self._problem(name, state_dict.get(prefix + name), getattr(self, name))) is not None
        ]
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        leave_out_marker(state_dict, prefix, unexpected_keys)

    _problem = QuantLinear._problem


def embedding_reason(embedding: nn.Embedding) -> str | None:
    """Why the embedding must stay in float; None: it need not."""
    if not is_embedding(embedding):
        return f"{type(embedding).__name__} is a subclass of nn.Embedding"
    if parametrize.is_parametrized(embedding) or set(embedding._parameters) != {"weight"}:
        return "parametrized weight"
    if "forward" in vars(embedding):
        return "forward is replaced on the instance"
    if embedding.max_norm is not None:
        return "max_norm changes the weight"
    if embedding.weight.dtype not in FLOAT_DTYPES:
        return f"{embedding.weight.dtype} weight"
    return "no columns" if embedding.embedding_dim == 0 else None


def embed_scale(embedding: nn.Module) -> float | None:
    """The number by which a transformers embedding multiplies its rows."""
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return None if scale is None else float(scale)
