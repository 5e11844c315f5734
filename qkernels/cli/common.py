"""What the commands share: option types and how errors of the user are shown."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import typer

Function = TypeVar("Function", bound=Callable[..., None])

Model = Annotated[
    str,
    typer.Argument(help="A transformers model folder, a .gguf file, or 'demo', which is Gemma-3-270M."),
]
Scheme = Annotated[
    str, typer.Option(metavar="NAME", help="Quantization scheme, such as w8a8 or w4a8-g32-asym; none keeps floats.")
]
OptionalScheme = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Quantization scheme, such as w8a8 or w4a8-g32-asym; none keeps floats.",
        show_default="that of --adapter, else none",
    ),
]
Adapter = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Put on the LoRA adapter that finetune wrote to this folder.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(
        metavar="DTYPE",
        help="Compute in float32, bfloat16, or auto: bfloat16 where the hardware multiplies it fast, else float32.",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Keep converted GGUF models here.", show_default="~/.cache/qkernels"),
]


def one_line_errors(command: Function) -> Function:
    """Show what the user can mend as one line, without a traceback, and exit with status 2; 130 after Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from ..finetune import InputError

        try:
            return command(*args, **kwargs)
        except InputError as error:
            print(f"error: {_printable(error)}", file=sys.stderr)
            raise typer.Exit(2) from error
        except BrokenPipeError:  # `qkernels ... | head`
            raise
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            print(f"error: {_printable(f'{error.strerror or error}{where}')}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print(f"\n{str(error) or 'interrupted'}", file=sys.stderr)
            raise typer.Exit(130) from error

    return cast(Function, run)


def _printable(message: object) -> str:
    """One line for a terminal, which a name in a hostile file must not command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))


def load(
    model: str, scheme: str | None, adapter: Path | None, dtype: str, cache: Path | None
) -> tuple[Any, Any, str | None]:
    """The (quantized) model with its adapter, its tokenizer, and the scheme of its weights."""
    from ..finetune import InputError, load_adapter, load_model, load_tokenizer, resolve_model
    from ..finetune.models import check_scheme, default_cache, quantize, quantized_scheme, require, stored_scheme
    from ..finetune.provenance import check_adapter
    from ..finetune.quiet import hide_bars
    from ..system.host import pick_dtype

    if scheme is not None:
        scheme = check_scheme(scheme)
    require("transformers")
    hide_bars()
    folder = resolve_model(model, cache or default_cache())
    wanted = check_adapter(adapter, folder, scheme) if adapter else scheme
    tokenizer = load_tokenizer(folder)
    # A GGUF file with another scheme than its own is dequantized first, as the float model is that it came from.
    in_float = scheme == "none" or (folder.suffix == ".gguf" and scheme not in (None, stored_scheme(folder)))
    loaded = load_model(folder, pick_dtype(dtype), in_float=in_float)
    stored = quantized_scheme(loaded)
    if stored == "none" and wanted not in (None, "none"):
        quantize(loaded, wanted)
    elif stored != "none" and scheme not in (None, stored):
        raise InputError(
            f"{folder} is quantized already ({stored}), --scheme {scheme} cannot change that; leave it out"
        )
    return (load_adapter(loaded, adapter) if adapter else loaded), tokenizer, quantized_scheme(loaded)
