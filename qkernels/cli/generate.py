"""`qkernels generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Adapter, Cache, Dtype, Model, OptionalScheme, load, one_line_errors


@one_line_errors
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Continue this text.")],
    scheme: OptionalScheme = None,
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")] = 64,
    beams: Annotated[int, typer.Option(min=1, help="Search with this many beams; 1 is greedy.")] = 1,
    dtype: Dtype = "auto",
    cache: Cache = None,
) -> None:
    """Continue a prompt."""
    from ..finetune import generate_text

    loaded, tokenizer, _ = load(model, scheme, adapter, dtype, cache)
    print(generate_text(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, beams=beams))
