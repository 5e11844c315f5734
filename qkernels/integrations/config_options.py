"""What `QKernelsConfig` of transformers and `DiffusersConfig` of diffusers have in common: their arguments."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping

from ..convert.schemes import SchemeRules, Schemes
from ..formats.scheme import QuantScheme
from ..system.deprecation import renamed_keywords
from .folders import METHOD


class ConfigOptions:
    """The arguments of `quantize_` that a configuration holds, as plain data; `QKernelsConfig` documents them."""

    @renamed_keywords(grad="grad_dtype")
    def __init__(
        self,
        scheme: Schemes = "w8a8",
        skip: list[str] | None = None,
        mode: str = "frozen",
        grad_dtype: str = "float",
        *,
        weight_scale: str = "absmax",
        embeddings: bool | str | QuantScheme = False,
        include: list[str] | None = None,
        modules_to_not_convert: list[str] | None = None,
        layers: dict[str, str | dict[str, object]] | None = None,
        **unknown: object,
    ) -> None:
        if unknown:
            raise TypeError(self._unknown_arguments(unknown))
        if modules_to_not_convert is not None:
            if skip is not None:
                raise TypeError("modules_to_not_convert is another name of skip: give one of them")
            skip = modules_to_not_convert
        for argument, patterns in (("skip", skip), ("include", include)):
            if isinstance(patterns, str):
                raise TypeError(f"{argument} must be a list of patterns, got the string {patterns!r}")
        self.quant_method = METHOD
        rules = SchemeRules(scheme)
        self.scheme = rules.plain()
        self.skip = list(skip or ())
        self.include = None if include is None else list(include)
        self.mode, self.grad_dtype, self.weight_scale = mode, grad_dtype, weight_scale
        self.embeddings = embeddings if isinstance(embeddings, bool) else QuantScheme.parse(embeddings).name
        if layers is not None and not isinstance(layers, Mapping):
            raise TypeError(f"layers must map names of layers to schemes, got {type(layers).__name__}")
        self.layers = dict(layers or {})
        rules.check(self.layer_options, embeddings)

    @property
    def layer_options(self) -> dict[str, str]:
        """The keywords of `QuantLinear`."""
        return {"mode": self.mode, "grad_dtype": self.grad_dtype, "weight_scale": self.weight_scale}

    @classmethod
    def _unknown_arguments(cls, unknown: Iterable[str]) -> str:
        """The message about arguments that there are none of."""
        known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "unknown")]
        parts = []
        for name in unknown:
            if name == "calibration":
                parts.append(
                    "calibration needs the float model: load it in float and call quantize_(..., calibration=...)"
                )
                continue
            near = difflib.get_close_matches(name, known, n=1)
            parts.append(f"{name} is unknown" + (f"; did you mean {near[0]}?" if near else ""))
        return f"{cls.__name__} has the arguments {', '.join(known)}: {'; '.join(parts)}"
