"""`qkernels convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .checkpoints import (
    AsJson,
    OnLoss,
    expect_new,
    loss_lines,
    loss_rows,
    megabytes,
    next_command,
    opened,
    path_bytes,
    plain_warnings,
    progress,
    say,
    schemes_of,
)
from .common import one_line_errors


@one_line_errors
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A folder, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Write this folder or file; it must not be there.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="Write this format, or FORMAT:TARGET, such as gptq, float:bf16 or qkernels."
        ),
    ],
    scheme: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Give all quantized layers this scheme first.", show_default="theirs"),
    ] = None,
    on_loss: OnLoss = "refuse",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in the format of another library or engine; the integers stay the same where they can.

    One tensor at a time is in memory. OUT appears when it is whole, or not at all.
    """
    from ..checkpoints.losses import Losses
    from ..checkpoints.registry import parse_target
    from ..checkpoints.requantize import requantized
    from ..finetune import InputError
    from ..finetune.models import check_scheme

    losses = Losses(on_loss)
    try:
        writer, target = parse_target(to)
    except ValueError as error:
        raise InputError(str(error)) from error
    wanted = None if scheme is None else check_scheme(scheme)
    expect_new(out)
    checkpoint = opened(source, losses)
    try:
        if wanted is not None:
            names = {} if wanted == "none" else dict.fromkeys(checkpoint.layers, wanted)
            checkpoint = requantized(checkpoint, names, losses)
        with plain_warnings(), progress(f"writing {writer.title}") as told:
            writer.write(checkpoint, out, losses, target, told)
    except ValueError as error:
        message = str(error).replace("pass on_loss='report'", "give --on-loss report")
        raise InputError(message.replace("pass on_loss='requantize'", "give --on-loss requantize")) from error
    with plain_warnings():
        writer.warn_of_activations(checkpoint)
    sizes = path_bytes(Path(source)), path_bytes(out)
    if as_json:
        result: dict[str, object] = {"in": source, "from": checkpoint.format, "out": str(out), "to": to}
        result |= {"bytes": {"in": sizes[0], "out": sizes[1]}, "layers": len(checkpoint.layers)}
        result |= {"schemes": schemes_of(checkpoint), "lost": loss_rows(losses.entries)}
        print(json.dumps(result))
        return
    counts = f"{len(checkpoint.layers)} quantized layers, {len(checkpoint.floats)} other tensors"
    say(f"{checkpoint.format} -> {to}: {counts}, {megabytes(sizes[0])} -> {megabytes(sizes[1])}")
    say("\n".join(loss_lines(losses.entries)))
    say(f"written to {out}")
    say(f"next: {next_command(out)}")
