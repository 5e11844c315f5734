"""`qkernels explain`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .common import Cache, Dtype, Model, one_line_errors


@one_line_errors
def explain(
    model: Model,
    scheme: Annotated[str, typer.Option(help="Explain float layers as this scheme would run them.")] = "w8a8",
    rows: Annotated[str, typer.Option("--rows", "-m", help="Multiply x of this many rows (commas).")] = "1,16,256",
    seconds: Annotated[float, typer.Option(help="Time each layer and M this long.")] = 0.05,
    dtype: Dtype = "auto",
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Per layer shape and M: the kernel, why, its time, the float layer's time, and how near the limit it is."""
    from ..diagnostics.explain import explain as explain_model
    from ..finetune import InputError, load_model, resolve_model
    from ..finetune.models import check_scheme, default_cache, require
    from ..system.host import pick_dtype

    scheme = check_scheme(scheme)
    try:
        counts = [int(value) for value in rows.split(",")]
    except ValueError as error:
        raise InputError(f"rows must be integers, comma-separated, got {rows!r}") from error
    if min(counts) < 1 or not seconds > 0:
        raise InputError(f"rows must be at least 1 and seconds positive, got {rows} and {seconds:g}")
    require("transformers")
    loaded = load_model(resolve_model(model, cache or default_cache()), pick_dtype(dtype))
    found = explain_model(loaded, None if scheme == "none" else scheme, counts, seconds=seconds)
    print(json.dumps(found.to_dict()) if as_json else found)
