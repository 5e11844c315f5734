"""The picture of a comparison: how the divergences of the tokens are spread, and the error of each layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .compare import Comparison, LayerError

_BINS, _KINDS = 48, 9
_LOWEST = 1e-12  # nats; what is less stands in the first bin


def save_plot(found: Comparison, path: Path, title: str = "") -> None:
    """Write the picture, in the format of the path's suffix.

    Args:
        found: of models that predict distributions, or with layers, or both.
        path: such as compare.png; its folder exists.
        title: above the panels.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = bool(len(found.kl)) + bool(found.layers)
    if not count:
        raise ValueError("found must have divergences or layers, and has neither")
    figure = Figure(figsize=(6.5 * count, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if len(found.kl):
        _draw_divergences(found, panels.pop(0))
    if found.layers:
        _draw_layers(found.layers, panels.pop(0))
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _draw_divergences(found: Comparison, axes: Any) -> None:
    values = found.kl.clamp(min=_LOWEST)
    low, high = math.log10(float(values.min())), math.log10(float(values.max()))
    high = max(high, low + 1)
    edges = [10 ** (low + (high - low) * at / _BINS) for at in range(_BINS + 1)]
    axes.hist(values.clamp(edges[0], edges[-1]).tolist(), bins=edges, color="0.75")
    marks = (
        ("median", float(found.kl.median()), "tab:green"),
        ("mean", float(found.kl.mean()), "tab:blue"),
        ("99 %", found.kl_quantile(0.99), "tab:red"),
    )
    for name, value, color in marks:
        axes.axvline(max(value, _LOWEST), color=color, label=f"{name} {value:.3g}")
    axes.set(xscale="log", xlabel="KL divergence of B to A, nats", ylabel="tokens", title="each token")
    axes.legend()


def _draw_layers(layers: tuple[LayerError, ...], axes: Any) -> None:
    from matplotlib import colormaps

    kinds: dict[str, list[int]] = {}
    for at, row in enumerate(layers):
        kinds.setdefault(row.name.rpartition(".")[2], []).append(at)
    if len(kinds) > _KINDS:  # layers without a pattern, such as those of nn.Sequential
        kinds = {"": list(range(len(layers)))}
    errors = [row.error for row in layers]
    for index, (name, places) in enumerate(kinds.items()):
        drawn = [at for at in places if 0 < errors[at] < math.inf]
        if drawn:
            color = colormaps["tab10"](index)
            axes.plot(drawn, [errors[at] for at in drawn], "o", markersize=4, color=color, label=name)
    positive = [error for error in errors if 0 < error < math.inf]
    axes.set(xlabel="layer, in the order of the model", ylabel="relative change of the output", title="each layer")
    if positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_ylim(min(positive) / 1.5, max(positive) * 2)
        worst = errors.index(max(positive))
        side = "right" if worst > len(layers) / 2 else "left"
        place = {"xytext": (0, 7), "textcoords": "offset points", "fontsize": 8, "ha": side}
        axes.annotate(layers[worst].name, (worst, errors[worst]), **place)
    exact = sum(error == 0 for error in errors)
    if exact:
        axes.text(0.98, 0.02, f"layers without error: {exact}", transform=axes.transAxes, ha="right", fontsize=8)
    if positive and "" not in kinds:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
