"""`QuantEmbedding`: an embedding on the canonical storage, which a tied head can share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.frozen_weight import FrozenWeight
from ..autograd.layer_calls import refuse_script, refuse_write, traced
from ..distributed.dtensors import is_dtensor
from ..formats.scheme import QuantScheme
from ..formats.storage import FLOAT_DTYPES, QuantizedWeight
from ..kernels import ops
from ..kernels.quantizers import quantize_weight
from .adapters import find_adapter
from .matrix_layer import leave_out_marker
from .nested import over_values
from .storage import Storage


class QuantEmbedding(Storage, nn.Embedding):
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
        ValueError: for an unknown scheme, or one of static activations.
    """

    COMPUTE_DTYPES = (*FLOAT_DTYPES, torch.float64)
    float_type: type[nn.Module] = nn.Embedding

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
        if self.scheme.static_activations:
            raise ValueError(f"scheme must be {self.scheme.of_dynamic}: an embedding has no activations, got {scheme}")
        self.mode = "frozen"
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.embed_scale = embed_scale
        self.compute_dtype = dtype or torch.get_default_dtype()
        if self.compute_dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self._allocate(device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every row to zeros."""
        self._set_to_zero()

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
        """Do as `nn.Module`, but refuse a `weight` with RuntimeError, and DTensors that split rows with ValueError."""
        if is_dtensor(param):
            from ..distributed.tensor_parallel import check_rows

            check_rows(param)
        if name == "weight" or isinstance(param, FrozenWeight):
            raise refuse_write(f"parameter {name!r}")
        super().register_parameter(name, param)

    @property
    def in_features(self) -> int:  # type: ignore[override]  # an attribute of a linear layer
        """K, by the name it has in a linear layer on the same storage."""
        return self.embedding_dim

    @property
    def out_features(self) -> int:  # type: ignore[override]
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
        with torch.inference_mode(False):
            layer._keep(quantize_weight(embedding.weight, layer.scheme))
        return layer

    @classmethod
    def like(cls, embedding: nn.Embedding, scheme: str | QuantScheme) -> QuantEmbedding:
        """An embedding of that shape and dtype on the meta device; `set_weight` gives it a weight.

        Raises:
            TypeError: for a module that is not an embedding, or does more than looking up rows.
        """
        adapter = find_adapter(embedding)
        if adapter is None or not adapter.lookup:
            raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
        if (reason := adapter.reason(embedding, QuantScheme.parse(scheme))) is not None:
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

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return traced(self, input)
        if input.is_nested:
            return over_values(self.forward, input, trailing=0)
        if is_dtensor(self._parameters["qweight"]):
            from ..distributed.tensor_parallel import parallel_embedding

            return parallel_embedding(self, input)
        return self.look_up(input, self._frozen_weight())

    def look_up(self, indices: Tensor, weight: QuantizedWeight) -> Tensor:
        """The rows of a weight at `indices` [...], which may be a part of this layer's: [..., K]."""
        rows = weight.map(lambda tensor: tensor.index_select(0, indices.reshape(-1)))
        out = ops.dequantize_weight(*rows, self.embedding_dim, self.scheme.name).to(self.compute_dtype)
        if self.embed_scale is not None:
            out = out * torch.tensor(self.embed_scale, dtype=self.compute_dtype, device=out.device)
        return out.reshape(*indices.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        scale = "" if self.embed_scale is None else f", embed_scale={self.embed_scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}{scale}"

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check the tensors before anything is copied, as `QuantLinear` does."""
        errors = self._storage_errors(state_dict, prefix)
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        leave_out_marker(state_dict, prefix, unexpected_keys)


def embed_scale(embedding: nn.Module) -> float | None:
    """The number by which a transformers embedding multiplies its rows."""
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return None if scale is None else float(scale)
