"""`qkernels merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .checkpoints import (
    AsJson,
    OnLoss,
    loss_rows,
    megabytes,
    next_command,
    path_bytes,
    plain_warnings,
    print_rows,
    progress,
    say,
)
from .common import Cache, Dtype, Model, one_line_errors


@one_line_errors
def merge(
    base: Model,
    adapter: Annotated[Path, typer.Option(metavar="FOLDER", help="Merge the PEFT adapter in this folder.")],
    to: Annotated[
        list[str],
        typer.Option(
            metavar="TARGET",
            help="Write this, such as bf16, w8a8, w4a8-g32-asym, gguf:q4_0, gptq or gptq@w4a16-g128; may be given "
            "several times.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Write here; each of several targets has a folder below.")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Measure on this UTF-8 text.", show_default="a page that is built in"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Measure on at most this many tokens.")] = 1024,
    seq_len: Annotated[int, typer.Option(help="Cut the text into blocks of this many tokens.")] = 128,
    on_loss: OnLoss = "report",
    dtype: Dtype = "auto",
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, write it for engines, and measure what each of these copies lost of it.

    The merge itself is in float. Each copy is loaded again and compared with the base and its adapter on a text, so
    that a format that destroys the adapter is seen before it is served.
    """
    from ..finetune import InputError, load_tokenizer, read_texts, resolve_model, token_blocks
    from ..finetune.merging import TEXT
    from ..finetune.merging import merge as run
    from ..finetune.models import default_cache, require
    from ..finetune.quiet import hide_bars
    from ..system.host import pick_dtype

    texts = read_texts(text) if text else [TEXT]
    require("transformers", "peft")
    hide_bars()
    folder = resolve_model(base, cache or default_cache())
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"adapter {str(adapter)!r} must be a folder with an adapter_config.json")
    tokenizer = load_tokenizer(folder)
    blocks = token_blocks(tokenizer, texts, seq_len, keep_tail=True)[: max(1, tokens // seq_len)]
    if not blocks:
        raise InputError("the text is too short: it gives no two tokens to measure on")
    with plain_warnings():
        written = run(
            folder, adapter, to, out, blocks, tokenizer, pick_dtype(dtype), on_loss=on_loss, progress=progress
        )  # fmt: skip
    if as_json:
        rows = [
            {
                "target": one.target.name, "scheme": one.target.scheme, "path": str(one.path),
                "bytes": path_bytes(one.path), "lost": loss_rows(one.lost), **one.measured.to_dict(),
            }
            for one in written
        ]  # fmt: skip
        print(json.dumps({"base": base, "adapter": str(adapter), "written": rows}))
        return
    for one in written:
        say(f"{one.target.name}: {one.path}, {megabytes(path_bytes(one.path))}")
        print_rows(one.measured.rows())
    best = max(written, key=lambda one: one.measured.kept)
    say(f"next: {next_command(best.path)}")
