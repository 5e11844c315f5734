"""`qkernels compare`."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from .common import Adapter, Cache, Dtype, Model, OptionalScheme, load, one_line_errors


@one_line_errors
def compare(
    a: Model,
    text: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Compare on this UTF-8 text; may be given several times.")
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            help="What came of the first model: a folder or a .gguf file.", show_default="A itself, with --scheme"
        ),
    ] = None,
    scheme: OptionalScheme = None,
    adapter: Adapter = None,
    tokens: Annotated[int, typer.Option(min=1, help="Use at most this many tokens of the text.")] = 2048,
    seq_len: Annotated[int, typer.Option(help="Cut the text into blocks of this many tokens.")] = 256,
    layers: Annotated[bool, typer.Option(help="Measure each layer, too.")] = True,
    one_at_a_time: Annotated[
        bool,
        typer.Option(
            "--one-at-a-time",
            help="Hold one model in memory: the outputs of A wait on the disk, and layers are not measured.",
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a picture.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write comparison.json and comparison.png to this folder.")
    ] = None,
    dtype: Dtype = "auto",
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure what model B lost against model A: divergence of their predictions, perplexity, error of each layer.

    --scheme quantizes B as it is loaded; --adapter is put on A, so that B may be the model that it was merged into.
    """
    from tqdm import tqdm

    from ..diagnostics.compare import MergeLoss, compare_merge
    from ..diagnostics.compare import compare as compare_models
    from ..diagnostics.compare_plot import save_plot
    from ..diagnostics.recorded import record_outputs
    from ..finetune import InputError, read_texts, token_blocks
    from ..finetune.models import check_length, default_cache, require, resolve_model
    from ..finetune.text import check_tokenizers
    from ..system import heap, json_file

    if b is None and scheme in (None, "none"):
        raise InputError("give a second model, or --scheme to compare A with its own quantization")
    if one_at_a_time and adapter:
        raise InputError("--one-at-a-time and --adapter exclude each other: how much a merge keeps needs both models")
    if plot is not None or output is not None:
        require("matplotlib")
    for path in filter(None, (plot, output and output / "comparison.json")):
        json_file.expect_writable(path)
    texts = read_texts(text)
    resolve_model(b or a, cache or default_cache())  # a wrong name is refused before A is run
    with tempfile.TemporaryDirectory(prefix="qkernels-compare-") as scratch:
        reference, tokenizer, _ = load(a, None, adapter, dtype, cache)
        blocks = token_blocks(tokenizer, texts, seq_len)[: max(1, tokens // seq_len)]
        if not blocks:
            raise InputError(f"the text is shorter than --seq-len {seq_len}: give more text or a smaller --seq-len")
        check_length(reference, seq_len)
        if one_at_a_time:
            bar = tqdm(blocks, desc="recording A", unit="block", leave=False)
            reference = record_outputs(reference, bar, scratch)
            heap.trim()
        other, its_tokenizer, its_scheme = load(b or a, scheme, None, dtype, cache)
        check_tokenizers(tokenizer, its_tokenizer, texts)
        check_length(other, seq_len)
        names = f"A = {a}{f' with {adapter}' if adapter else ''}, B = {b or a} ({scheme or its_scheme})"
        bar = tqdm(blocks, desc="comparing", unit="block", leave=False)
        try:
            measure = compare_merge if adapter else compare_models
            measured = measure(reference, other, bar, layers=layers and not one_at_a_time)
        except (ValueError, TypeError) as error:
            raise InputError(str(error)) from error
    found = measured.merged if isinstance(measured, MergeLoss) else measured
    result = {"a": a, "b": b or a, "scheme": scheme or its_scheme, "seq_len": seq_len, **measured.to_dict()}
    if output is not None:
        json_file.write(output / "comparison.json", result)
    for path in filter(None, (plot, output and output / "comparison.png")):
        save_plot(found, path, names)
    if as_json:
        print(json.dumps(result))
        return
    _print(names, measured.rows(), found.unmatched)
    written = [str(path) for path in (plot, output) if path is not None]
    if written:
        print(f"written to {', '.join(written)}")
    else:
        given = [a, *([b] if b else []), *(part for path in text for part in ("--text", str(path)))]
        given += ["--scheme", scheme] if scheme else []
        given += ["--adapter", str(adapter)] if adapter else []
        print(f"next: {shlex.join(['qkernels', 'compare', *given])} --output compared  # a picture, and every layer")


def _print(names: str, rows: list[tuple[str, str, str]], unmatched: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(names, markup=False, highlight=False)
    table = Table("", "value", "what it means", box=None, pad_edge=False, header_style="dim")
    for name, value, meaning in rows:
        table.add_row(Text(name), Text(value), Text(meaning, style="dim"))
    console.print(table)
    if unmatched:
        first, reason = next(iter(unmatched.items()))
        console.print(f"not compared: {len(unmatched)} layers, such as {first} ({reason})", markup=False)
