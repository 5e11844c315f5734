"""`qkernels inspect`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from .checkpoints import AsJson, plain_warnings, say
from .common import one_line_errors


@one_line_errors
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder, or a .gguf or .safetensors file.")],
    as_json: AsJson = False,
) -> None:
    """What is in a checkpoint of any format: schemes, bytes, what stays float, the kernel, where it can go.

    Only headers are read, and small tensors that say how others are stored.
    """
    from ..diagnostics.inspection import inspect as look
    from ..finetune import InputError

    try:
        with plain_warnings():
            found = look(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    say(found)
    quoted = shlex.quote(str(path))
    after = f"qkernels convert {quoted} OUT --to qkernels" if found.kinds else f"qkernels quantize {quoted} --out OUT"
    say(f"next: {after}")
