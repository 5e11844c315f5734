"""What the commands share: option types and how errors of the user are shown."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

Function = TypeVar("Function", bound=Callable[..., None])

Model = Annotated[str, typer.Argument(help="A transformers model folder, a .gguf file, or 'demo' (Gemma-3-270M).")]
Scheme = Annotated[str, typer.Option(help="Quantization scheme, such as w8a8 or w4a8-g32-asym; none: keep floats.")]
Adapter = Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter written by finetune.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Float dtype; auto: bfloat16 where the CPU multiplies it fast, else float32."),
]
Cache = Annotated[
    Path | None, typer.Option(help="Where converted GGUF models are kept.", show_default="~/.cache/qkernels")
]


def one_line_errors(command: Function) -> Function:
    """Show what the user can mend as one line, without a traceback, and exit with status 2."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        from ..finetune import InputError

        try:
            return command(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error

    return run


def load(model: str, scheme: str, adapter: Path | None, dtype: str, cache: Path | None):
    """The (quantized) model with its adapter, and its tokenizer."""
    from ..finetune import load_adapter, load_model, load_tokenizer, pick_dtype, resolve_model
    from ..finetune.models import check_scheme, default_cache, quantize, require

    check_scheme(scheme)
    require("transformers")
    folder = resolve_model(model, cache or default_cache())
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, pick_dtype(dtype))
    if scheme != "none":
        quantize(loaded, scheme)
    return (load_adapter(loaded, adapter) if adapter else loaded), tokenizer
