"""`qkernels finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import Cache, Dtype, Model, Scheme, one_line_errors


@one_line_errors
def finetune(
    model: Model,
    text: Annotated[list[Path], typer.Option(help="UTF-8 text file to train on; may be given several times.")],
    output: Annotated[Path, typer.Option(help="Folder for adapter and reports; new, empty or of a former run.")],
    eval_text: Annotated[
        list[Path] | None, typer.Option(help="Held-out text file; without one, the last tenth of the text is held out.")
    ] = None,
    scheme: Scheme = "w8a8",
    mode: Annotated[
        Literal["frozen", "qat", "int8"],
        typer.Option(help="Of quantized layers: frozen (lora); or trained with float weights behind (qat) or without."),
    ] = "frozen",
    grad: Annotated[Literal["float", "int8"], typer.Option(help="Gradient products of quantized layers.")] = "float",
    weight_scale: Annotated[
        Literal["absmax", "learned"], typer.Option(help="Scales of qat weights: by their range, or trained.")
    ] = "absmax",
    method: Annotated[
        Literal["lora", "full"], typer.Option(help="lora: adapters on the (quantized) model; full: all weights.")
    ] = "lora",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Blocks in a step.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens in a block.")] = 256,
    eval_seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a block of --eval-text.", show_default="--seq-len")
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 5e-4,
    schedule: Annotated[
        Literal["linear", "cosine", "constant"], typer.Option(help="Learning rate after the warm-up.")
    ] = "linear",
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate rises from 0.")] = 5,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters; alpha is twice the rank.")] = 16,
    fused_loss: Annotated[
        bool | None,
        typer.Option(help="Train with head and loss in one product.", show_default="for quantized models"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapters' start and of the order of the blocks.")] = 0,
    dtype: Dtype = "auto",
    eval_blocks: Annotated[int, typer.Option(help="Held-out blocks to use at most; 0: no evaluation.")] = 64,
    calibration_blocks: Annotated[
        int,
        typer.Option(help="Training blocks to calibrate the quantized weights on; a lora base is then saved."),
    ] = 0,
    smooth: Annotated[
        bool, typer.Option(help="First move outliers of the activations into the weights (with --calibration-blocks).")
    ] = False,
    baseline: Annotated[bool, typer.Option(help="Evaluate the float model too, before it is quantized.")] = True,
    cache: Cache = None,
) -> None:
    """Fine-tune a causal language model, quantized or not; writes adapter, report.json, report.md and loss.png."""
    from rich.console import Console
    from rich.table import Table

    from ..finetune import FinetuneSettings
    from ..finetune import finetune as run
    from ..finetune.models import default_cache
    from ..finetune.report import summary_rows

    settings = FinetuneSettings(
        model=model,
        text=text,
        output=output,
        eval_text=eval_text or [],
        scheme=scheme,
        mode=mode,
        grad=grad,
        weight_scale=weight_scale,
        method=method,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        eval_seq_len=eval_seq_len,
        lr=lr,
        schedule=schedule,
        warmup_steps=warmup_steps,
        lora_rank=lora_rank,
        fused_loss=fused_loss,
        seed=seed,
        dtype=dtype,
        eval_blocks=eval_blocks,
        calibration_blocks=calibration_blocks,
        smooth=smooth,
        baseline=baseline,
        cache=cache or default_cache(),
    )
    report = run(settings)
    table = Table(title=f"{model}, {method}, {scheme}, {report['dtype']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in summary_rows(report):
        table.add_row(*row)
    Console().print(table)
    print(f"written to {output}")
