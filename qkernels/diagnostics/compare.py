"""What one model lost against another on the same text: divergence of predictions, perplexity, error of each layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ..nn.adapters import SplitLayer, find_adapter, find_composite
from ..system.text_table import aligned
from .outputs import Output, counted, evaluating, first_tensor, is_causal, keyword_arguments, output_of

# Values that are taken to float64 at once, a few rows of logits: all of them would be larger than the models, and what
# does not fit into the cache is ten times as slow.
_CHUNK = 1 << 18


class LayerError(NamedTuple):
    """How far a layer of model b is from the layer of the same name of model a, on the inputs that it has in model a.

    Attributes:
        name: in model a.
        error: |y_b - y_a| / |y_a|, with norms over all outputs y of the layer on the text.
        kinds: of the layer in a and in b, such as ("float32", "w8a8").
    """

    name: str
    error: float
    kinds: tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `str()` is a plain-text table.

    Attributes:
        kl: float64 [n], the Kullback-Leibler divergence KL(a || b) of each predicted distribution, in nats; empty for
            models that predict none, such as a regression.
        agreement: of the n distributions, the share whose most probable entry is the same.
        loss_a, loss_b: float64 [n], minus the log probability of each token of the text; empty unless causal.
        output_error: |z_b - z_a| / |z_a|, with norms over all outputs (logits) z.
        layers: each layer that both models have and that ran, in the order of model a.
        unmatched: names of layers that only one of the models has, or that did not run, with the reason.
    """

    kl: Tensor
    agreement: float
    loss_a: Tensor
    loss_b: Tensor
    output_error: float
    layers: tuple[LayerError, ...] = ()
    unmatched: Mapping[str, str] = field(default_factory=dict)

    @property
    def perplexity_a(self) -> float | None:
        """exp of the mean of `loss_a`; None unless causal."""
        return _perplexity(self.loss_a)

    @property
    def perplexity_b(self) -> float | None:
        """exp of the mean of `loss_b`; None unless causal."""
        return _perplexity(self.loss_b)

    def kl_quantile(self, share: float) -> float:
        """The divergence that this share of the distributions does not exceed."""
        return float(self.kl.quantile(share))

    def to_dict(self) -> dict[str, Any]:
        """As plain data; JSON can hold it. Numbers that were not measured, or are infinite, are None."""
        kl = None
        if len(self.kl):
            kl = {"mean": _finite(self.kl.mean()), "standard_error": _finite(standard_error(self.kl))}
            kl |= {"median": _finite(self.kl.median()), "quantile_99": _finite(self.kl_quantile(0.99))}
            kl |= {"largest": _finite(self.kl.max())}
        result: dict[str, Any] = {"tokens": len(self.kl), "kl": kl, "output_error": _finite(self.output_error)}
        if len(self.kl):
            result["top_1_agreement"] = self.agreement
        for side, loss in (("a", self.loss_a), ("b", self.loss_b)):
            if len(loss):
                values = {"value": _finite(_perplexity(loss)), "standard_error": _finite(_perplexity_error(loss))}
                result[f"perplexity_{side}"] = values
        if len(self.loss_a):
            change = self.loss_b - self.loss_a
            values = {"mean": _finite(change.mean()), "standard_error": _finite(standard_error(change))}
            result["loss_change"] = values
        result["layers"] = [
            {"name": row.name, "error": _finite(row.error), "a": row.kinds[0], "b": row.kinds[1]} for row in self.layers
        ]
        return result | {"unmatched": dict(self.unmatched)}

    def rows(self) -> list[tuple[str, str, str]]:
        """The few rows to print: what was measured, its value, and what it means in one line."""
        rows = []
        if len(self.kl):
            kl = f"{self.kl.mean():.3g} ± {standard_error(self.kl):.2g}"
            rows = [
                ("KL divergence, mean", kl, "nats between the predictions; 0: equal"),
                ("median", f"{self.kl.median():.3g}", "half of the tokens are closer"),
                ("99 %", f"{self.kl_quantile(0.99):.3g}", "1 token in 100 is further away"),
                ("same first choice", f"{100 * self.agreement:.1f} %", "both prefer the same next token"),
            ]
        if len(self.loss_a):
            change = self.loss_b - self.loss_a
            percent = f"{100 * _exp_minus_1(change.mean()):+.1f} ± {100 * standard_error(change):.1f} %"
            rows += [
                ("perplexity of A", _with_error(self.loss_a), "how many tokens it wavers between"),
                ("perplexity of B", _with_error(self.loss_b), f"{percent} of A's"),
            ]
        else:
            rows.append(("output error", f"{self.output_error:.3g}", "relative change of the outputs"))
        if self.layers:
            worst = max(self.layers, key=lambda row: -1.0 if math.isnan(row.error) else row.error)
            middle = statistics.median(row.error for row in self.layers)
            meaning = f"of {len(self.layers)}: relative change of the output"
            rows += [("layer error, median", f"{middle:.3g}", meaning), ("largest", f"{worst.error:.3g}", worst.name)]
        return rows

    def __str__(self) -> str:
        lines = aligned(self.rows())
        if self.unmatched:
            first = next(iter(self.unmatched))
            lines.append(f"not compared: {len(self.unmatched)} layers, such as {first} ({self.unmatched[first]})")
        return "\n".join(lines)


@dataclass(frozen=True)
class MergeLoss:
    """What `compare_merge` found; `str()` is a plain-text table.

    Attributes:
        merged: the merged model beside the model with its adapter.
        base: the model without its adapter beside the model with it: how much the adapter changes.
        kept: the share of the adapter's change of the outputs that is in the merged model: 1, all of it, whatever noise
            the rounding adds; 0, none. It is the coefficient of the regression of one change on the other, weighted by
            the probabilities; not a number if the adapter changes nothing.
        kept_error: the standard error of `kept`.
    """

    merged: Comparison
    base: Comparison
    kept: float
    kept_error: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data; JSON can hold it."""
        kept = {"share": _finite(self.kept), "standard_error": _finite(self.kept_error)}
        return {"kept": kept, "merged": self.merged.to_dict(), "base": self.base.to_dict()}

    def rows(self) -> list[tuple[str, str, str]]:
        """The few rows to print: what was measured, its value, and what it means in one line."""
        value = f"{100 * self.kept:.0f} ± {100 * self.kept_error:.0f} %"
        if math.isnan(self.kept):
            value, meaning = "-", "the adapter changes nothing on this text"
        elif not self.kept_error < 0.2:
            meaning = "too noisy to tell: give more text"
        elif self.kept < 0.5:
            meaning = "MERGING LOSES WHAT THE ADAPTER LEARNED"
        else:
            meaning = "of the change that the adapter makes"
        name, without, _ = self.base.rows()[0]
        return [("adapter kept", value, meaning), *self.merged.rows(), ("the adapter's change", without, name)]

    def __str__(self) -> str:
        return "\n".join(aligned(self.rows()))


def compare(
    a: nn.Module,
    b: nn.Module,
    inputs: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    layers: bool = True,
    causal: bool | None = None,
) -> Comparison:
    """Run two models on the same inputs and measure how far `b` is from `a`.

    Both are run in evaluation mode, without gradients, one input after the other. In each run of `a`, every layer of
    `b` is also given the inputs of the layer of `a` with the same name: its error is its own, not that of the layers
    before it. Memory is that of the models, the outputs of one input and a few numbers for each token. Divergences and
    losses are computed in float64 from the outputs as they are.

    A causal language model is compared by the distributions that it predicts for all tokens but the first of each
    input, a masked one by those for all tokens that `attention_mask` shows, and a classifier by those of its classes. A
    model whose output has other names than `logits`, and a regression, have an `output_error` alone.

    Args:
        a: the reference, such as the float model.
        b: what came of it. Layers of any kind are matched by their names; those of a PEFT model have the names that
            they have without its adapter.
        inputs: token ids, int64 [T] or [1, T], or the keyword arguments of both models.
        layers: measure the layers, too; it takes about the time of another run of `b`.
        causal: whether logits [1, T, V] predict the next token; None: for the models of transformers that generate text
            and have no encoder.

    Raises:
        TypeError: if an input is neither a tensor nor a mapping, or a model gives no output that can be compared.
        ValueError: if there is no input, an input is too short, the outputs have other shapes (the vocabularies
            differ), or hold NaN.

    Example:
        >>> import copy
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> quantized = copy.deepcopy(model)
        >>> report = qk.quantize_(quantized, "w8a8")
        >>> found = qk.compare(model, quantized, [torch.randn(8, 64)])
        >>> [row.name for row in found.layers], 0 < found.kl.mean() < 1e-3
        (['0', '2'], tensor(True))
    """
    predictions = _Predictions(is_causal(a) if causal is None else causal)
    errors = _LayerErrors(a, b, layers)
    with evaluating(a, b):
        for number, kwargs in enumerate(keyword_arguments(inputs)):
            with errors.watching():
                reference = output_of(a, kwargs, "a")
            predictions.add(reference, output_of(b, kwargs, "b"), kwargs, f"inputs[{number}]")
    return predictions.result(*errors.result())


def compare_merge(
    adapted: nn.Module,
    merged: nn.Module,
    inputs: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    layers: bool = False,
    causal: bool | None = None,
) -> MergeLoss:
    """Measure what merging an adapter lost, and how much of what the adapter changes is left.

    Args:
        adapted: the PEFT model with its adapter, not merged.
        merged: the model that the adapter was merged into, in any format.
        inputs, layers, causal: as in `compare`.

    Raises:
        TypeError: if `adapted` has no `disable_adapter`, as a PEFT model has; else as `compare`.
        ValueError: as `compare`.
    """
    disable_adapter: Callable[[], AbstractContextManager[None]] | None = getattr(adapted, "disable_adapter", None)
    if disable_adapter is None:
        raise TypeError(f"adapted must be a PEFT model with its adapter, got {type(adapted).__name__}")
    causal = is_causal(adapted) if causal is None else causal
    of_merged, of_base, kept = _Predictions(causal), _Predictions(causal), _Kept(causal)
    errors = _LayerErrors(adapted, merged, layers)
    with evaluating(adapted, merged):
        for number, kwargs in enumerate(keyword_arguments(inputs)):
            where = f"inputs[{number}]"
            with errors.watching():
                reference = output_of(adapted, kwargs, "adapted")
            after = output_of(merged, kwargs, "merged")
            of_merged.add(reference, after, kwargs, where)
            with disable_adapter():
                base = output_of(adapted, kwargs, "adapted without its adapter")
            of_base.add(reference, base, kwargs, where)
            kept.add(reference, base, after, kwargs, where)
    return MergeLoss(of_merged.result(*errors.result()), of_base.result(), *kept.result())


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values; not a number for less than two."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


class _Predictions:
    """Sums up the outputs of two models, one input after the other."""

    def __init__(self, causal: bool) -> None:
        self._causal = causal
        self._kl: list[Tensor] = []
        self._losses: tuple[list[Tensor], list[Tensor]] = [], []
        self._agreeing, self._change, self._size = 0, 0.0, 0.0

    def add(self, of_a: Output, of_b: Output, kwargs: Mapping[str, Any], where: str) -> None:
        """Account for the outputs of one input."""
        if of_a.values.shape != of_b.values.shape:
            shapes = [list(output.values.shape) for output in (of_a, of_b)]
            differ = "the vocabularies differ: " if shapes[0][:-1] == shapes[1][:-1] else ""
            raise ValueError(f"{differ}a gives outputs of shape {shapes[0]} for {where}, b {shapes[1]}")
        keep, targets = counted(of_a, kwargs, self._causal, where)
        self._add_rows(of_a.rows(keep), of_b.rows(keep).to(of_a.values.device), of_a.predicts, targets, where)

    def _add_rows(self, a: Tensor, b: Tensor, predicts: bool, targets: Tensor | None, where: str) -> None:
        rows = max(1, _CHUNK // a.shape[-1])
        for at in range(0, len(a), rows):
            p, q = a[at : at + rows].to(torch.float64), b[at : at + rows].to(torch.float64)
            change, size = _squares(q - p), _squares(p)
            if not math.isfinite(change + size):  # a masked entry of a vocabulary is minus infinity
                for name, values in (("a", p), ("b", q)):
                    if values.isnan().any():
                        raise ValueError(f"the outputs of {name} for {where} hold NaN")
                finite = p.isfinite() & q.isfinite()
                change, size = _squares((q - p)[finite]), _squares(p[finite])
            self._change, self._size = self._change + change, self._size + size
            if not predicts:
                continue
            self._agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            log_p, log_q = log_softmax(p, -1), log_softmax(q, -1)
            if targets is not None:
                of_rows = targets[at : at + rows].unsqueeze(-1)
                for losses, logarithms in zip(self._losses, (log_p, log_q), strict=True):
                    losses.append(-logarithms.gather(-1, of_rows).squeeze(-1).cpu())
            apart = log_q.neg_().add_(log_p)
            probability = log_p.exp_()
            terms = apart.mul_(probability)
            kl = terms.sum(-1)
            if kl.isnan().any():  # 0 * infinity, which counts as 0
                kl = terms.masked_fill_(probability == 0, 0).sum(-1)
            self._kl.append(kl.clamp(min=0).cpu())  # below 0 is rounding

    def result(self, layers: tuple[LayerError, ...] = (), unmatched: Mapping[str, str] | None = None) -> Comparison:
        kl, loss_a, loss_b = (_joined(parts) for parts in (self._kl, *self._losses))
        agreement = self._agreeing / len(kl) if len(kl) else math.nan
        error = _relative(self._change, self._size)
        return Comparison(kl, agreement, loss_a, loss_b, error, layers, unmatched or {})


class _Kept:
    """How much of the change that an adapter makes to the outputs is in those of the merged model."""

    def __init__(self, causal: bool) -> None:
        self._causal = causal
        self._products: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, adapted: Output, base: Output, merged: Output, kwargs: Mapping[str, Any], where: str) -> None:
        """Account for the outputs of one input."""
        keep, _ = counted(adapted, kwargs, self._causal, where)
        outputs = [output.rows(keep).to(adapted.values.device) for output in (adapted, base, merged)]
        rows = max(1, _CHUNK // outputs[0].shape[-1])
        for at in range(0, len(outputs[0]), rows):
            z, without, after = (output[at : at + rows].to(torch.float64) for output in outputs)
            weight = log_softmax(z, -1).exp_() if adapted.predicts else torch.ones_like(z)
            change, found = (torch.where(weight > 0, other - without, 0) for other in (z, after))
            if adapted.predicts:  # logits are what they are up to a number for all of them
                change, found = (x - (weight * x).sum(-1, keepdim=True) for x in (change, found))
            weighted = weight.mul_(change)
            self._products.append((weighted * found).sum(-1).cpu())
            self._squares.append((weighted * change).sum(-1).cpu())

    def result(self) -> tuple[float, float]:
        """The share and its standard error; not numbers if the adapter changes nothing."""
        products, squares = _joined(self._products), _joined(self._squares)
        total = float(squares.sum())
        if total == 0:
            return math.nan, math.nan
        share = float(products.sum()) / total
        return share, float((products - share * squares).square().sum().sqrt()) / total


class _LayerErrors:
    """Gives the layers of `b` the inputs that the layers of `a` get, and sums up how far their outputs are apart."""

    def __init__(self, a: nn.Module, b: nn.Module, wanted: bool) -> None:
        of_a, of_b = (dict(_layers(model)) if wanted else {} for model in (a, b))
        self._pairs = {name: (layer, of_b[name]) for name, layer in of_a.items() if name in of_b}
        self._unmatched = {name: "only in a" for name in of_a if name not in of_b}
        self._unmatched |= {name: "only in b" for name in of_b if name not in of_a}
        self._sums: dict[str, tuple[float, float]] = {}
        self._in_twin = False  # the models may share layers

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(self._hook(name, twin), with_kwargs=True)
            for name, (layer, twin) in self._pairs.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, twin: nn.Module) -> Callable[..., None]:
        dtype = _dtype(twin)

        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            expected = first_tensor(output)
            if expected is None or self._in_twin:
                return
            args = tuple(_cast(value, dtype) for value in args)
            self._in_twin = True
            try:
                actual = first_tensor(twin(*args, **{key: _cast(value, dtype) for key, value in kwargs.items()}))
            finally:
                self._in_twin = False
            if actual is None or actual.shape != expected.shape:
                shape = None if actual is None else list(actual.shape)
                raise ValueError(f"layer {name} gives an output of shape {list(expected.shape)} in a, {shape} in b")
            change, size = self._sums.get(name, (0.0, 0.0))
            expected, actual = expected.reshape(-1), actual.reshape(-1).to(expected.device)
            for at in range(0, expected.numel(), _CHUNK):
                exact = expected[at : at + _CHUNK].to(torch.float64)
                change += _squares(actual[at : at + _CHUNK].to(torch.float64) - exact)
                size += _squares(exact)
            self._sums[name] = change, size

        return hook

    def result(self) -> tuple[tuple[LayerError, ...], dict[str, str]]:
        rows = tuple(
            LayerError(name, _relative(*self._sums[name]), (_kind(layer), _kind(twin)))
            for name, (layer, twin) in self._pairs.items()
            if name in self._sums
        )
        return rows, self._unmatched | {name: "did not run" for name in self._pairs if name not in self._sums}


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that conversions know, and those of PEFT around them; not what is inside of one."""
    if (base := getattr(model, "get_base_model", None)) is not None:
        model = base()
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if module is model and next(module.children(), None) is not None:
            continue
        wraps = isinstance(module._modules.get("base_layer"), nn.Module)
        known = find_adapter(module) is not None or find_composite(type(module)) is not None
        if wraps or known or isinstance(module, SplitLayer):
            inside = f"{name}."
            yield name, module


def _kind(layer: nn.Module) -> str:
    """The scheme of a layer, or its dtype; of one with a PEFT adapter, both parts."""
    if isinstance(base := layer._modules.get("base_layer"), nn.Module):
        return f"{_kind(base)} + adapter"
    schemes = {str(part.scheme): None for part in layer.modules() if hasattr(part, "scheme")}
    return ", ".join(schemes) or str(_dtype(layer)).removeprefix("torch.")


def _dtype(layer: nn.Module) -> torch.dtype | None:
    """The dtype of floats that a layer takes."""
    while isinstance(base := layer._modules.get("base_layer"), nn.Module):
        layer = base
    if (adapter := find_adapter(layer)) is not None:
        return adapter.dtype(layer)
    for part in layer.modules():
        if part is not layer and (adapter := find_adapter(part)) is not None:
            return adapter.dtype(part)
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), None)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None else value


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def _squares(values: Tensor) -> float:
    """The sum of the squares."""
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))


def _relative(change: float, size: float) -> float:
    if size == 0:
        return 0.0 if change == 0 else math.inf
    return math.sqrt(change / size)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _exp_minus_1(value: Tensor) -> float:
    return _exp(float(value)) - 1


def _perplexity(losses: Tensor) -> float | None:
    return _exp(float(losses.mean())) if len(losses) else None


def _perplexity_error(losses: Tensor) -> float:
    """The standard error of a perplexity, to first order in that of the mean loss."""
    return _exp(float(losses.mean())) * standard_error(losses)


def _with_error(losses: Tensor) -> str:
    return f"{_perplexity(losses):.2f} ± {_perplexity_error(losses):.2f}"


def _finite(value: float | Tensor | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
