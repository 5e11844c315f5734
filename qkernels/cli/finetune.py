"""`qkernels finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import Cache, Dtype, Model, one_line_errors


@one_line_errors
def finetune(
    model: Model,
    text: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Train on this UTF-8 text file; may be given several times.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Write adapter (or model), tokenizer and reports to this folder: a new one, an empty one, or that of "
            "a former run, whose files are replaced when this run has ended.",
        ),
    ],
    eval_text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Hold out this text file; without one, the last tenth of the text is held out."
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantization scheme, such as w8a8 or w4a8-g32-asym; none trains on floats.",
            show_default="what a quantized model has, else w8a8",
        ),
    ] = None,
    mode: Annotated[
        Literal["frozen", "qat", "int8"] | None,
        typer.Option(
            metavar="MODE",
            help="What quantized layers train: frozen, nothing (for lora); qat, a float weight behind the integers; "
            "int8, the integers themselves.",
            show_default="frozen for lora, qat for full",
        ),
    ] = None,
    grad_dtype: Annotated[
        Literal["float", "int8"],
        typer.Option(
            "--grad-dtype",
            "--grad",
            metavar="KIND",
            help="Multiply the gradients of quantized layers in float or in int8.",
        ),
    ] = "float",
    weight_scale: Annotated[
        Literal["absmax", "learned"],
        typer.Option(metavar="KIND", help="Take the scales of qat weights from their range (absmax), or train them."),
    ] = "absmax",
    method: Annotated[
        Literal["lora", "full"],
        typer.Option(metavar="METHOD", help="Train adapters on the (quantized) model (lora), or all weights (full)."),
    ] = "lora",
    steps: Annotated[int, typer.Option(help="Take this many optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Pass this many blocks through the model at once.")] = 1,
    grad_accumulation: Annotated[int, typer.Option(help="Sum the gradients of this many batches in a step.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Cut the text into blocks of this many tokens.")] = 256,
    eval_seq_len: Annotated[
        int | None,
        typer.Option(help="Cut --eval-text into blocks of this many tokens.", show_default="--seq-len"),
    ] = None,
    lr: Annotated[float, typer.Option(help="Let the learning rate of AdamW rise to this.")] = 5e-4,
    schedule: Annotated[
        Literal["linear", "cosine", "constant"],
        typer.Option(metavar="SHAPE", help="Lower the learning rate after the warm-up: linear, cosine, or constant."),
    ] = "linear",
    warmup_steps: Annotated[int, typer.Option(help="Raise the learning rate from 0 during this many steps.")] = 5,
    weight_decay: Annotated[float, typer.Option(help="Decay the trained weights at this rate (AdamW).")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Scale gradients of a larger norm to this; 0: never.")] = 1.0,
    lora_rank: Annotated[int, typer.Option(help="Give the adapters this rank.")] = 16,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Multiply the adapters by this over the rank.", show_default="twice the rank")
    ] = None,
    lora_dropout: Annotated[float, typer.Option(help="Drop this share of the adapters' inputs in training.")] = 0.0,
    fused_loss: Annotated[
        bool | None,
        typer.Option(help="Compute head and loss in one product while training.", show_default="for quantized models"),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Draw the adapters' first values and the order of the blocks from this seed.")
    ] = 0,
    dtype: Dtype = "auto",
    eval_blocks: Annotated[int, typer.Option(help="Evaluate on at most this many held-out blocks; 0: none.")] = 64,
    eval_steps: Annotated[
        int | None,
        typer.Option(help="Evaluate whenever this many steps are done, for the plot.", show_default="at the ends"),
    ] = None,
    calibration_blocks: Annotated[
        int,
        typer.Option(
            help="Calibrate 4-bit weights (GPTQ) on this many training blocks; an adapter's base is then saved too."
        ),
    ] = 0,
    smooth: Annotated[
        bool,
        typer.Option(
            "--smooth",
            help="First move outliers of int8 activations into the weights, as seen in --calibration-blocks (or 32) "
            "blocks.",
        ),
    ] = False,
    baseline: Annotated[bool, typer.Option(help="Evaluate the float model too, before it is quantized.")] = True,
    save_steps: Annotated[
        int | None,
        typer.Option(
            help="Save a checkpoint whenever this many steps are done; --resume needs it after a crash.",
            show_default="none",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run of --output, given the same options.")
    ] = False,
    cache: Cache = None,
) -> None:
    """Fine-tune a causal language model, quantized or not; writes adapter, report.json, report.md and loss.png.

    Nothing is written to the output folder before the end. Ctrl-C saves what was trained so far, and with --resume the
    same command goes on from there.
    """
    options = dict(locals())  # the parameters above, which are the fields of the settings

    from rich.console import Console
    from rich.table import Table

    from ..finetune import FinetuneSettings
    from ..finetune import finetune as run
    from ..finetune.models import default_cache, require, resolve_model, stored_scheme
    from ..finetune.quiet import hide_bars
    from ..finetune.report import summary_rows
    from ..finetune.train import next_command

    options |= {"eval_text": eval_text or [], "cache": cache or default_cache()}
    if scheme is None:
        stored = stored_scheme(resolve_model(model, options["cache"]))
        options["scheme"] = "w8a8" if stored == "none" else stored
    settings = FinetuneSettings(**options)
    require("transformers")
    hide_bars()
    report = run(settings)
    table = Table(title=f"{model}, {method}, {report['settings']['scheme']}, {report['dtype']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in summary_rows(report):
        table.add_row(*row)
    Console().print(table)
    print(f"written to {output}")
    print(f"next: {next_command(settings, output)}")
