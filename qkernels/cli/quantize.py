"""`qkernels quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .checkpoints import AsJson, expect_new, megabytes, next_command, path_bytes, plain_warnings, progress, say
from .common import Cache, Dtype, Model, one_line_errors


@one_line_errors
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Write to this folder; it must not be there.")],
    scheme: Annotated[
        str, typer.Option(metavar="NAME", help="Quantize to this scheme, such as w8a8 or w4a8-g32-asym.")
    ] = "w8a8",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Calibrate 4-bit weights (GPTQ) and static activations on this UTF-8 text.",
            show_default="round to nearest",
        ),
    ] = None,
    calibration_blocks: Annotated[int, typer.Option(min=1, help="Use this many blocks of --calibrate.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Cut the text into blocks of this many tokens.")] = 256,
    smooth: Annotated[
        bool, typer.Option("--smooth", help="First move outliers of int8 activations into the weights (--calibrate).")
    ] = False,
    dtype: Dtype = "auto",
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model and write it as a folder; qkernels convert writes that for other engines.

    A checkpoint of any format is dequantized first. OUT appears when it is whole, or not at all.
    """
    from ..finetune import InputError, load_model, load_tokenizer, read_texts, resolve_model, token_blocks
    from ..finetune.models import check_scheme, default_cache, require
    from ..finetune.models import quantize as run
    from ..finetune.quiet import hide_bars
    from ..finetune.text import evenly_spread
    from ..formats.scheme import QuantScheme
    from ..integrations.exporting import export
    from ..system.host import pick_dtype

    scheme = check_scheme(scheme)
    if scheme == "none":
        raise InputError("--scheme none quantizes nothing; qkernels convert --to float writes floats")
    parsed = QuantScheme.parse(scheme)
    if (parsed.static_activations or smooth) and not calibrate:
        raise InputError(f"{'--smooth' if smooth else scheme} needs text to calibrate on: give --calibrate FILE")
    if calibrate and not (parsed.weight_bits == 4 or parsed.static_activations or smooth):
        raise InputError(
            f"--calibrate is for w4 schemes, static activations and --smooth, and the scheme is {scheme!r}: "
            "calibrating 8-bit weights fits them to the text and makes the model worse on any other"
        )
    expect_new(out)
    texts = read_texts(calibrate or [])
    require("transformers")
    hide_bars()
    folder = resolve_model(model, cache or default_cache())
    tokenizer = load_tokenizer(folder)
    blocks = evenly_spread(token_blocks(tokenizer, texts, seq_len), calibration_blocks) if texts else []
    if texts and not blocks:
        raise InputError(f"the text is too short: it gives no block of {seq_len} tokens; lower --seq-len")
    with plain_warnings():
        loaded = load_model(folder, pick_dtype(dtype), in_float=True)
        report = run(loaded, scheme, blocks, smooth=smooth)
        with progress("writing") as told:
            export(loaded, out, "qkernels", like=folder, progress=told)
    if as_json:
        print(json.dumps({"model": model, "out": str(out), "bytes": path_bytes(out), "quantization": report.to_dict()}))
        return
    worst = max(report.quantized, key=lambda row: row.weight_error or 0)
    say(
        f"{scheme}: {len(report.quantized)} of {len(report.rows)} layers, {100 * report.quantized_share:.1f} % of the "
        f"weights, {megabytes(report.bytes_before)} -> {megabytes(report.bytes_after)}"
    )
    say(f"largest error of a weight: {worst.weight_error or 0:.4f}, in {worst.name}")
    say(f"written to {out}, {megabytes(path_bytes(out))}")
    say(f"next: {next_command(out)}")
