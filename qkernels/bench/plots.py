"""Time and fraction of the limit against M, one picture for each layer, direction, kind of weights and thread count."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from .candidate import OVERHEAD
from .results import Results, Row


def save_plots(results: Results, folder: Path) -> list[Path]:
    """Write the pictures as PNG into `folder`; layers timed at a single M get none, all of them without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots: they need the package matplotlib (pip install matplotlib)", file=sys.stderr)
        return []
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in results.rows:
        if row.direction != OVERHEAD:
            groups[row.layer, row.n, row.k, row.direction, row.weights, row.threads].append(row)
    paths = []
    for (layer, n, k, direction, weights, threads), rows in groups.items():
        if len({row.m for row in rows}) > 1:
            stem = re.sub(r"\W+", "-", f"{layer} {direction} {weights} {threads}t".lower())
            title = f"{layer}: {n} x {k}, {direction}, weight {weights}, {threads} threads, {results.machine['cpu']}"
            paths.append(folder / f"{stem}.png")
            _plot(rows, title, paths[-1])
    return paths


def _plot(rows: list[Row], title: str, path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    time, fraction = figure.subplots(1, 2)
    ticks = sorted({row.m for row in rows})
    for index, name in enumerate(dict.fromkeys(row.name for row in rows)):
        own = sorted((row for row in rows if row.name == name), key=lambda row: row.m)
        style = {"marker": "o", "markersize": 4, "label": name, "color": colormaps["tab20"](index % 20)}
        style |= {"linestyle": "-", "linewidth": 2.5} if own[0].ours else {"linestyle": "--", "linewidth": 1}
        m, medians = [row.m for row in own], [row.median * 1e3 for row in own]
        low, high = ([row.quartiles[i] * 1e3 for row in own] for i in (0, 1))
        time.plot(m, medians, **style)
        if own[0].ours:
            time.fill_between(m, low, high, color=style["color"], alpha=0.2)
        fraction.plot(m, [row.fraction for row in own], **style)
    time.set(ylabel="milliseconds", yscale="log")
    fraction.set(ylabel="fraction of the machine's limit", ylim=(0, None))
    fraction.axhline(1, color="black", linewidth=0.8)
    for axes in (time, fraction):
        axes.set(xlabel="M (rows of x)", xscale="log")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
