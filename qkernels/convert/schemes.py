"""`SchemeRules`: which scheme each layer gets, and the patterns that name layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch

from ..formats.scheme import QuantScheme
from ..nn.linear import QuantLinear
from .layers import Layer

# One scheme for all layers, or one by pattern: a mapping, or a list of its items, as JSON keeps them in order.
Schemes: TypeAlias = str | QuantScheme | Mapping[str, str | QuantScheme | None] | list[list[str | None]]

SKIPPED = "skipped by pattern"
NOT_INCLUDED = "not included"


class SchemeRules:
    """The scheme of each layer: that of the first pattern that names it; None leaves it in float.

    >>> rules = SchemeRules({"head": None, "*.mlp.*": "w4a8-g32", "*": "w8a8"})
    >>> rules.of(["model.mlp.up"]).name, rules.of(["head"]), rules.label
    ('w4a8-g32', None, 'w4a8-g32, w8a8')

    Args:
        schemes: a scheme for all layers, or a mapping from patterns to schemes, in the order in which they are tried.

    Raises:
        TypeError: if `schemes` is something else, or a pattern is no string.
        ValueError: for an unknown scheme, or if no pattern has one.
    """

    def __init__(self, schemes: Schemes) -> None:
        self.by_pattern = isinstance(schemes, Mapping | list)
        self.rules: list[tuple[str, QuantScheme | None]] = []
        if not isinstance(schemes, Mapping | list):
            self.rules.append(("*", QuantScheme.parse(schemes)))
            return
        for item in schemes.items() if isinstance(schemes, Mapping) else schemes:
            if isinstance(item, str) or len(item) != 2 or not isinstance(item[0], str):
                raise TypeError(f"scheme must map patterns of layer names, such as '*.mlp.*', to schemes, got {item!r}")
            pattern, scheme = str(item[0]), item[1]
            self.rules.append((pattern, None if scheme is None else QuantScheme.parse(scheme)))
        if not self.schemes:
            raise ValueError(f"scheme must give a scheme to at least one pattern, got {schemes!r}")

    @property
    def schemes(self) -> list[QuantScheme]:
        """Each scheme that a layer may get, once."""
        return [*dict.fromkeys(scheme for _, scheme in self.rules if scheme is not None)]

    @property
    def label(self) -> str:
        """The names of the schemes."""
        return ", ".join(scheme.name for scheme in self.schemes)

    def check(self, layer_options: Mapping[str, str], embeddings: bool | str | QuantScheme = False) -> None:
        """Raise ValueError if there is no layer of one of the schemes with these options, or no such embedding.

        Args:
            layer_options: mode, grad_dtype and weight_scale, as in `QuantLinear`.
            embeddings: as in `quantize_`.
        """
        for scheme in self.schemes:
            QuantLinear(1, 1, False, scheme, **layer_options, device="meta", dtype=torch.float32)
        if embeddings and (mode := layer_options["mode"]) != "frozen":
            raise ValueError(
                f"embeddings must be False for mode={mode!r}: the weight of a QuantEmbedding is not trained"
            )

    def plain(self) -> str | list[list[str | None]]:
        """What JSON can hold, and `SchemeRules` takes again: the name of the scheme, or pairs in order."""
        if not self.by_pattern:
            return self.label
        return [[pattern, None if scheme is None else scheme.name] for pattern, scheme in self.rules]

    def of(self, names: Iterable[str]) -> QuantScheme | None:
        """The scheme of a layer with these names; None: it stays in float."""
        names = list(names)
        return next((scheme for pattern, scheme in self.rules if any(matches(pattern, name) for name in names)), None)

    def assign(self, layers: Sequence[Layer], of_embeddings: QuantScheme | None = None) -> list[str]:
        """Give each layer its scheme, or the reason to stay in float, if it has none yet.

        Args:
            of_embeddings: a scheme of their own, which a pattern can only refuse.

        Returns:
            A warning for each pattern that decides about no layer.
        """
        named: set[str] = set()
        deciding: set[str] = set()
        for layer in layers:
            hits = [rule for rule in self.rules if any(matches(rule[0], name) for name in layer.all_names)]
            named.update(pattern for pattern, _ in hits)
            refused = bool(hits) and hits[0][1] is None
            if hits:
                deciding.add(hits[0][0])
                layer.scheme = hits[0][1]
            if of_embeddings is not None and layer.is_lookup and not refused:
                layer.scheme = of_embeddings
            if layer.scheme is None and layer.reason is None:
                layer.reason = SKIPPED if hits else NOT_INCLUDED
        if not self.by_pattern:
            return []
        messages = [f"scheme pattern {pattern!r} matches no layer" for pattern, _ in self.rules if pattern not in named]
        messages += [
            f"scheme pattern {pattern!r} decides about no layer: patterns before it match all of its layers, and the "
            "first one wins"
            for pattern, _ in self.rules
            if pattern in named - deciding and pattern != "*"
        ]
        return messages


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the name of a layer, the last part of it, the name of a module around it, or a glob of it.

    >>> [matches(pattern, "model.mlp.up") for pattern in ("model.mlp.up", "up", "model.mlp", "*.mlp.*", "mlp")]
    [True, True, True, True, False]
    """
    return pattern in (name, name.rpartition(".")[2]) or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
