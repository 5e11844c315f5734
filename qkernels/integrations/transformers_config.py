"""transformers: `QKernelsConfig`, the arguments of `from_pretrained(..., quantization_config=...)`."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints.losses import Losses, OnLoss
from ..convert.schemes import Schemes
from ..formats.scheme import QuantScheme
from ..system.deprecation import renamed_keywords
from .checkpoint_layers import ACTIVATIONS, Activations
from .config_options import ConfigOptions
from .folders import METHOD, current_names

_OF_LOADING = ("as_stored", "activations", "on_loss")  # what no saved model says


@register_quantization_config(METHOD)
class QKernelsConfig(ConfigOptions, QuantizationConfigMixin):
    """How to quantize a transformers model: `from_pretrained(path, quantization_config=QKernelsConfig("w8a8"))`.

    A float checkpoint is quantized while it is read. Of one that is quantized already, by any library that
    `qkernels.load` knows, the layers take the very integers.

    Args:
        scheme: scheme name or `QuantScheme`, or a mapping from patterns to those, as in `quantize_`. It is kept as a
            list of pairs, because its order counts and JSON loses it. None: what a quantized checkpoint says, and
            "w8a8" of a float one. Another weight than the stored one is refused, unless `on_loss` is "requantize";
            other activations are not. None for a pattern: its layers are in float.
        skip: patterns of the layers to leave in float; see `quantize_`. A layer that `quantize_` would leave in float
            (such as a head tied to the embedding) is left here too.
        mode, grad_dtype, weight_scale: of the layers; see `QuantLinear`.
        embeddings: quantize embeddings too, and the head that is tied to one, to `scheme` (True) or to the scheme given
            here; see `quantize_`.
        include: patterns of the layers to quantize; None: all.
        modules_to_not_convert: another name of `skip`, that of transformers' own configurations.
        layers: name -> scheme of the quantized layers of a saved model, or a mapping with scheme, mode, grad_dtype and
            weight_scale; filled in when a model is quantized or saved.
        activations: of layers whose weight comes from another library, without a `scheme`: "int8", "float", or None:
            what the checkpoint says, which is float for one that quantizes weights alone.
        on_loss: what becomes of what our storage cannot hold exactly: "refuse", "report" or "requantize"; see
            `qkernels.load`.

    Raises:
        ValueError: for an unknown scheme, mode, grad_dtype, weight_scale, activations or on_loss.
        TypeError: if `skip` is a single string, or for an unknown argument.
    """

    @renamed_keywords(grad="grad_dtype")
    def __init__(
        self,
        scheme: Schemes | None = None,
        skip: list[str] | None = None,
        mode: str = "frozen",
        grad_dtype: str = "float",
        *,
        weight_scale: str = "absmax",
        embeddings: bool | str | QuantScheme = False,
        include: list[str] | None = None,
        modules_to_not_convert: list[str] | None = None,
        layers: dict[str, str | dict[str, object]] | None = None,
        activations: Activations | None = None,
        on_loss: OnLoss = "refuse",
        **unknown: object,
    ) -> None:
        super().__init__(
            "w8a8" if scheme is None else scheme,
            skip,
            mode,
            grad_dtype,
            weight_scale=weight_scale,
            embeddings=embeddings,
            include=include,
            modules_to_not_convert=modules_to_not_convert,
            layers=layers,
            **unknown,
        )
        if activations not in (None, *ACTIVATIONS):
            raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)} or None, got {activations!r}")
        self.as_stored, self.activations = scheme is None, activations
        self.on_loss = Losses(on_loss).on_loss

    def to_dict(self) -> dict[str, object]:
        """What a saved model says; how this one was loaded is no part of it."""
        return {key: value for key, value in super().to_dict().items() if key not in _OF_LOADING}

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        given = current_names(config_dict)
        arguments = {key: value for key, value in given.items() if key not in ("quant_method", "as_stored")}
        return super().from_dict(arguments, return_unused_kwargs, **kwargs)
