"""`qkernels eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Adapter, Cache, Dtype, Model, OptionalScheme, load, one_line_errors


@one_line_errors
def evaluate(
    model: Model,
    text: Annotated[list[Path], typer.Argument(help="Evaluate these UTF-8 text files.")],
    scheme: OptionalScheme = None,
    adapter: Adapter = None,
    seq_len: Annotated[int, typer.Option(help="Cut the text into blocks of this many tokens.")] = 256,
    eval_blocks: Annotated[int | None, typer.Option(min=1, help="Use the first blocks only, this many.")] = None,
    dtype: Dtype = "auto",
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Perplexity of text files, in blocks that start with the beginning-of-sequence token."""
    from ..finetune import perplexity, read_texts, token_blocks

    texts = read_texts(text)
    loaded, tokenizer, scheme = load(model, scheme, adapter, dtype, cache)
    blocks = token_blocks(tokenizer, texts, seq_len, keep_tail=True)[:eval_blocks]
    value = perplexity(loaded, blocks, label=f"perplexity, {scheme}")
    tokens = sum(len(block) - 1 for block in blocks)
    if as_json:
        print(json.dumps({"perplexity": value, "tokens": tokens, "scheme": scheme}))
    else:
        print(f"perplexity {value:.4f} over {tokens} tokens ({scheme})")
