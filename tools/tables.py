"""Numbers and tables of README.md and docs, from benchmarks/results and the package: `python tools/tables.py`.

A page holds each block between `<!-- NAME: generated -->` and `<!-- end -->`; a test compares them with these. The
picture of README.md is drawn as well.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "readme.png"
LINEAR, GEMMA, MLP = "linear-intel-xeon-amx-2t", "training-gemma-intel-xeon-amx-2t", "training-intel-xeon-amx-2t"
KEPT_MEMORY = "training-models-kept-memory-intel-xeon-amx-2t"
QUALITY = "quality-intel-xeon-amx-2t"
TORCH_LAYERS, EXPERTS = "torch-layers-amd-epyc-avx512bf16-1t", "experts-amd-epyc-avx512bf16"
STATIC, RESNET = "static-amd-epyc-avx512bf16-1t", "resnet18-amd-epyc-avx512bf16-1t"
DIVERGENCE = "divergence-gemma-amd-epyc-avx512bf16"
GGUF, NF4 = "gguf-amd-epyc-avx512bf16", "nf4-gemma-amd-epyc-avx512bf16"
MINIMA = "linear-minima-amd-epyc-avx512bf16-1t"
PEFT, PEFT_STEPS = "peft-matrix", ("train", "save", "disable", "copy", "merge", "unmerge", "bfloat16")
FLOAT, INT8, INT4 = "torch bfloat16", "w8a8 frozen int8 + loss", "w4a8-g32-asym frozen int8 + loss"
COLUMNS = (FLOAT, "torch.ao int8 onednn", "w8a8", "w4a8-g128", "w4a8-g32-asym")


def rows(name: str, key: str = "rows") -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))[key]


def find(results: str, **values: Any) -> dict[str, Any]:
    """The one row of a file that has these values."""
    (row,) = [row for row in rows(results) if all(row[key] == value for key, value in values.items())]
    return row


def layer(name: str, m: int) -> float:
    """Seconds of a 4096 x 4096 layer, forward, warm."""
    dtype = "float32" if name.startswith("torch.ao") else "bfloat16"  # torch.ao takes no other
    row = find(LINEAR, name=name, m=m, n=4096, k=4096, direction="forward", weights="warm", threads=2, dtype=dtype)
    return row["median"]


def step(name: str, results: str = GEMMA) -> float:
    return find(results, case="gemma-lora", name=name)["median"]


def used(name: str) -> int:
    """Bytes of a training run above what its libraries take."""
    memory = find(GEMMA, case="gemma-lora", name=name)["memory"]
    return memory["peak"] - memory["libraries"]


def instruction_sets() -> int:
    """Kernel files: one each."""
    return len(list((ROOT / "csrc" / "cpu" / "kernels").rglob("*.cpp")))


def claims() -> str:
    speed, kept = step(FLOAT) / step(INT8), step(FLOAT, KEPT_MEMORY) / step(INT8, KEPT_MEMORY)
    share = 100 * used(INT8) / used(FLOAT)
    whole, ours = (find(MLP, case="mlp-full", name=name)["median"] for name in (FLOAT, "w8a8 int8 int8"))
    texts = (
        "**It trains at integer speed, on a CPU.** Forward, gradients, and head and loss of a vocabulary are integer "
        f"products: a LoRA step of Gemma-3-270M is {speed:.1f} times as fast as in torch bfloat16 ({kept:.1f} times "
        f"where the C library keeps its memory between steps) and takes {share:.0f} % of the memory [1].",
        "**It is exact.** Each bit of an int8 forward and of its integer gradients is defined and the same on all "
        f"{instruction_sets()} instruction sets, with any number of threads and in any batch: the tests ask for "
        "equality, not for closeness.",
        "**It trains the int8 weight itself**, with no float copy beside it: a step of all weights of an MLP is "
        f"{whole / ours:.1f} times as fast as in torch bfloat16 [2], and what you train is what you ship.",
    )
    wrap = {"width": 120, "initial_indent": "- ", "subsequent_indent": "  "}
    return "\n".join(textwrap.fill(text, **wrap, break_on_hyphens=False) for text in texts)


def layer_table() -> str:
    names = [name.replace(" onednn", "") for name in COLUMNS]
    lines = ["| rows of x | " + " | ".join(names) + " |", "| ---: |" + " ---: |" * len(names)]
    for m in (1, 16, 256):
        times = [layer(name, m) for name in COLUMNS]
        cells = [f"{times[0] * 1e3:.2f} ms", *(f"{times[0] / seconds:.1f}x" for seconds in times[1:])]
        lines.append(f"| {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def training_table() -> str:
    quality = {row["name"]: row for row in rows(QUALITY)}
    lines = ["| | ms a step | MB | perplexity before | after 100 steps |", "| --- | ---: | ---: | ---: | ---: |"]
    runs = (
        ("torch bfloat16", FLOAT, "bfloat16"),
        ("w8a8-ag128", "w8a8-ag128 frozen int8 + loss", "w8a8-ag128 frozen int8"),
        ("w8a8", INT8, "w8a8 frozen int8"),
        ("w4a8-g32-asym", INT4, "w4a8-g32-asym frozen int8"),
    )
    for title, timed, learned in runs:
        memory = find(GEMMA, case="gemma-lora", name=timed)["memory"]
        result = quality[learned]
        before = result["quantized"] or result["float"]
        size = "-" if memory is None else f"{used(timed) / 1e6:.0f}"
        lines.append(f"| {title} | {step(timed) * 1e3:.0f} | {size} | {before:.2f} | {result['tuned']:.2f} |")
    return "\n".join(lines)


def torch_layer_table() -> str:
    lines = ["| layer; features, steps, batch | float | w8a8 | w4a8-g32 | torch.ao dynamic int8 |"]
    lines.append("| --- |" + " ---: |" * 4)
    times: dict[str, dict[str, str]] = {}
    for row in rows(TORCH_LAYERS):
        ms = 1e3 * row["seconds"]
        text = f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"
        error = f" ({row['error']:.3f})" if row["contender"] != "float" else ""
        layer = f"{row['layer']}; {row['features']}, {row['steps']}, {row['batch']}"
        times.setdefault(layer, {})[row["contender"]] = text + error
    for layer, found in times.items():
        cells = [found.get(name, "fails in its fast path") for name in ("float", "w8a8", "w4a8-g32", "torch.ao")]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def experts_table() -> str:
    times: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows(f"{EXPERTS}-1t") + rows(f"{EXPERTS}-2t"):
        name = row["name"].removeprefix("transformers ").removeprefix("qkernels ")
        times.setdefault((row["threads"], row["layer"].split()[0]), {})[name] = row["median"]
    names = list(next(iter(times.values())))
    lines = ["| threads | tokens | " + " | ".join(names) + " |", "| ---: | ---: |" + " ---: |" * len(names)]
    for (threads, tokens), found in times.items():
        best = min(seconds for name, seconds in found.items() if name.startswith("grouped_mm"))
        cells = [f"{1e3 * found[name]:.1f} ({best / found[name]:.2f}x)" for name in names]
        lines.append(f"| {threads} | {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def resnet_table() -> str:
    head = ("", "error of logits", "right", "MB", "ms, batch 1", "ms, batch 8")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows(RESNET):
        cells = (
            row["name"],
            "-" if row["error"] == 0 else f"{row['error']:.4f}",
            f"{100 * row['accuracy']:.0f} %",
            f"{row['bytes'] / 1e6:.1f}",
            *(f"{1e3 * row[f'median_{batch}']:.1f}" for batch in (1, 8)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def distillation_table() -> str:
    runs = rows("distillation")
    titles = [f"{run['scheme']}, {run['digits']} digits" for run in runs]
    lines = ["| | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(runs)]
    for title, name in (
        ("teacher, float", "teacher"),
        ("student, labels alone", "student alone"),
        ("student, labels and teacher", "student distilled"),
    ):
        cells = (
            f"{100 * mean:.1f} % ({100 * deviation:.1f})" for mean, deviation in (r["accuracy"][name] for r in runs)
        )
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def peft_cell(result: dict[str, Any]) -> str:
    """What one method did over one base: "ok" and the error of its merge, or the steps that failed."""
    if result["refused"]:
        return "refused"
    failed = [step for step in PEFT_STEPS if result[step] not in ("ok", "-")]
    text = "fails to " + ", ".join(failed) if failed else "ok"
    if result["rounding"] is not None:
        text += f", {result['rounding']:.3f}"
    if result["base"] == "float" and result["merge"] == "-":
        text += ", no merge"
    return text


def peft_table() -> str:
    cells: dict[str, dict[str, str]] = {}
    for result in rows(PEFT):
        initialization = "" if result["initialization"] is None else f" ({result['initialization']:.3f})"
        cells.setdefault(result["name"], {})[result["base"]] = peft_cell(result) + initialization
    bases = list(next(iter(cells.values())))
    lines = ["| method | " + " | ".join(bases) + " |", "| --- |" + " --- |" * len(bases)]
    lines += [f"| {name} | " + " | ".join(row[base] for base in bases) + " |" for name, row in cells.items()]
    libraries = json.loads((RESULTS / f"{PEFT}.json").read_text(encoding="utf-8"))["libraries"]
    made_with = ", ".join(f"{name} {number}" for name, number in libraries.items())
    return "\n".join([*lines, "", f"Made with {made_with} by `python benchmarks/peft_methods.py`."])


def static_table() -> str:
    errors = {row["contender"]: row["error"] for row in rows(STATIC, "minilm")}
    titles = {
        "w8a8": "`w8a8` (dynamic, a scale for each token)",
        "w8a8s minmax": '`w8a8s`, `observer="minmax"` (the default)',
        "w8a8s moving_average": '`w8a8s`, `observer="moving_average"`',
        "w8a8s mse": '`w8a8s`, `observer="mse"`',
        "w8a8s percentile": '`w8a8s`, `observer="percentile"` (99.99)',
        "torch.ao onednn": "torch.ao, static, `onednn`",
        "torch.ao x86": "torch.ao, static, `x86` (7 bits of activations)",
    }
    return "\n".join(["| | error |", "| --- | ---: |", *(f"| {titles[n]} | {errors[n]:.3f} |" for n in titles)])


def formats_table() -> str:
    """What each format of checkpoints holds, as its entry in the registry says."""
    from qkernels.checkpoints.registry import FORMATS

    lines = ["| format | weights | scheme here | in | out | |", "| --- |" + " --- |" * 5]
    for name, found in FORMATS.items():
        for at, variant in enumerate(found.variants):
            title = f"{found.title} (`{name}`)" if at == 0 else ""
            cells = (title, variant.what, f"`{variant.scheme}`", variant.imported, variant.exported, variant.note)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def divergence_table() -> str:
    found = rows(DIVERGENCE)
    texts = list(dict.fromkeys(row["text"] for row in found))
    lines = ["| Gemma-3-270M, rounded to nearest | " + " | ".join(texts) + " |", "| --- |" + " --- |" * len(texts)]
    for scheme in dict.fromkeys(row["scheme"] for row in found):
        cells = []
        for text in texts:
            row = next(row for row in found if (row["scheme"], row["text"]) == (scheme, text))
            change = math.expm1(row["loss_change"]["mean"])
            cells.append(
                f"{row['kl']['mean']:.4f}; {100 * row['top_1_agreement']:.0f} %; "
                f"{row['perplexity_a']['value']:.1f}, {100 * change:+.1f} %"
            )
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    tokens = found[0]["tokens"]
    note = (
        f"Mean KL divergence; same first choice; perplexity of the float model and its change. {tokens} tokens of each "
        "text, the head in float; `python benchmarks/divergence.py`."
    )
    return "\n".join([*lines, "", textwrap.fill(note, 120)])


def gguf_table() -> str:
    """Loads of real GGUF files, and their perplexity here and in llama.cpp."""
    head = ("", "peak of a load / file", "activations", "perplexity", "llama.cpp", "change", "its standard error")
    lines = ["| " + " | ".join(head) + " |", "| --- | ---: | --- |" + " ---: |" * (len(head) - 3)]
    for row in rows(GGUF):
        if row["kind"] == "memory":
            size = row["file_bytes"]
            title, peak = f"{row['model']}, {size / 1e6:.0f} MB", f"{row['peak'] / size:.2f}"
            continue
        numbers = (f"{row['perplexity']:.2f}", f"{row['llama.cpp']:.2f}")
        changes = (f"{100 * row['change']:+.3f} %", f"{100 * row['standard_error']:.3f} %")
        lines.append("| " + " | ".join((title, peak, row["activations"], *numbers, *changes)) + " |")
    version = json.loads((RESULTS / f"{GGUF}.json").read_text(encoding="utf-8"))["machine"]["packages"]
    note = (
        f"{row['tokens']} tokens of Python's documentation, the same for both; llama-cpp-python "
        f"{version['llama-cpp-python']}; `python benchmarks/gguf_files.py`."
    )
    return "\n".join([*lines, "", textwrap.fill(note, 120)])


def nf4_table() -> str:
    """What the tables of bitsandbytes lose in each form that they can be read into."""
    head = ("", "relative RMS", "KL mean", "KL 99 %", "same first choice")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows(NF4):
        kl = row["kl"]
        numbers = (f"{100 * row['relative_rms']:.2g} %", f"{kl['mean']:.2g}", f"{kl['quantile_99']:.2g}")
        cells = (f"{row['table']}: {row['form']}", *numbers, f"{100 * row['top_1_agreement']:.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{row['tokens']} tokens of Python's documentation; `python benchmarks/nf4.py`."])


def minima_table() -> str:
    """Milliseconds of a 2048 x 2048 layer, of minima and of groups of 16 beside their nearest formats."""
    pairs = {
        "w4a8-g32-min": "w4a8-g32-asym",
        "w4a8-g128-min": "w4a8-g128-asym",
        "w8a8-g32-min": "w8a8-g32",
        "w4a16-g32-min": "w4a16-g32-asym",
        "w8a8-g16": "w8a8-g32",
        "w8a16-g16": "w8a16-g32",
    }
    counts = (1, 8, 64, 512)
    lines = ["| | " + " | ".join(f"M = {m}" for m in counts) + " |", "| --- |" + " ---: |" * len(counts)]
    for name, peer in pairs.items():
        cells = []
        for m in counts:
            own, other = (find(MINIMA, name=which, m=m, direction="forward")["median"] for which in (name, peer))
            cells.append(f"{own * 1e3:.2f} ({own / other:.2f}x)")
        lines.append(f"| {name} (beside {peer}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The blocks of each page, by its path.
PAGES = {
    "README.md": {"claims": claims, "layers": layer_table, "training": training_table},
    "docs/performance.md": {"minima": minima_table, "experts": experts_table},
    "docs/guide/attention-recurrent.md": {"torch layers": torch_layer_table},
    "docs/guide/checkpoints.md": {
        "formats": formats_table,
        "divergence": divergence_table,
        "nf4": nf4_table,
        "gguf": gguf_table,
    },
    "docs/guide/coming-from.md": {"static": static_table},
    "docs/guide/convolutions.md": {"resnet18": resnet_table},
    "docs/guide/peft.md": {"matrix": peft_table},
    "docs/guide/pruning-distillation.md": {"distillation": distillation_table},
}


def rendered(text: str, page: str = "README.md") -> str:
    """The text of a page with its blocks made anew."""
    for name, block in PAGES[page].items():
        pattern = rf"(<!-- {name}: generated -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda match, block=block: match[1] + block() + match[2], text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} must hold one block {name!r}, and holds {count}")
    return text


def draw(path: Path) -> None:
    """Two panels of bars: time and memory of a LoRA step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2), layout="constrained")
    FigureCanvasAgg(figure)
    names = ["torch bfloat16", "qkernels w8a8", "qkernels w4a8"]
    panels = (
        ("one LoRA step of Gemma-3-270M, ms", [step(name) * 1e3 for name in (FLOAT, INT8, INT4)]),
        ("memory of model and training, MB", [used(name) / 1e6 for name in (FLOAT, INT8, INT4)]),
    )
    for axes, (title, values) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        bars = axes.barh(names, values, color=["0.65", "tab:green", "tab:green"])
        axes.bar_label(bars, labels=[f"{value:.0f}" for value in values], padding=3)
        axes.set_title(title, fontsize=11)
        axes.margins(x=0.15)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text(encoding="utf-8"), page), encoding="utf-8")
    draw(PICTURE)
