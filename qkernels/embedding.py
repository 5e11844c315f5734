"""`QuantEmbedding`: an embedding on the canonical storage, which a tied head can share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops, quantize
from .nn import QuantLinear
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

    The weight is frozen and gets no gradient. `weight` is None; the state dict holds `qweight`, `scales` and `zeros`
    (asymmetric schemes) as that of a `QuantLinear` with num_embeddings output features does, which can share them:
    `tie(head)`. Only the format of the scheme's weight matters.

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
        self.register_parameter("weight", None)
        head = QuantLinear(embedding_dim, num_embeddings, False, self.scheme, device=device)
        self.tie(head)

    @property
    def in_features(self) -> int:
        """K, the name it has in a linear layer on the same storage."""
        return self.embedding_dim

    @classmethod
    def from_float(cls, embedding: nn.Embedding, scheme: str | QuantScheme) -> QuantEmbedding:
        """Quantize an `nn.Embedding`, or a transformers embedding that multiplies it by a number.

        Raises:
            TypeError: for another module.
            ValueError: for `max_norm`, or a weight that is not finite.
        """
        if not is_embedding(embedding):
            raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError(f"embedding must not have max_norm, got {embedding.max_norm}")
        weight = embedding.weight.detach()
        layer = cls(
            *weight.shape,
            scheme,
            padding_idx=embedding.padding_idx,
            embed_scale=embed_scale(embedding),
            device="meta",
            dtype=weight.dtype,
        )
        layer.set_weight(quantize.quantize_weight(weight, layer.scheme))
        return layer

    def set_weight(self, weight: QuantizedWeight) -> None:
        """Take over the storage of a quantized weight [num_embeddings, embedding_dim]."""
        ops.check_weight(*weight, self.embedding_dim, self.scheme)
        for name, tensor in zip(_STORAGE, weight, strict=True):
            setattr(self, name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def tie(self, head: QuantLinear | QuantEmbedding) -> None:
        """Share the parameters of `head`, whose weight [N, K] has the same format."""
        for name in _STORAGE:
            self.register_parameter(name, getattr(head, name))

    def forward(self, input: Tensor) -> Tensor:
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
            if (problem := self._problem(name, state_dict.get(prefix + name))) is not None
        ]
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    _problem = QuantLinear._problem


def embed_scale(embedding: nn.Module) -> float | None:
    """The number by which a transformers embedding multiplies its rows."""
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return None if scale is None else float(scale)
