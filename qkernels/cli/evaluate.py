"""`qkernels eval`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Adapter, Cache, Dtype, Model, OptionalScheme, load, one_line_errors


@one_line_errors
def evaluate(
    model: Model,
    text: Annotated[list[Path] | None, typer.Argument(help="Evaluate these UTF-8 text files.")] = None,
    scheme: OptionalScheme = None,
    adapter: Adapter = None,
    seq_len: Annotated[int, typer.Option(help="Cut the text into blocks of this many tokens.")] = 256,
    eval_blocks: Annotated[int | None, typer.Option(min=1, help="Use the first blocks only, this many.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Measure the divergence from this model, too, such as the one in float; tasks are run on both.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Run these tasks of lm_eval (commas), such as arc_easy.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Find tasks of your own, YAML files, in this folder.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask this many questions of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Ask this many questions of a task at once.")] = 1,
    dtype: Dtype = "auto",
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Perplexity of text files, in blocks that start with the beginning-of-sequence token; or tasks of lm_eval."""
    from ..finetune import InputError, read_texts, token_blocks
    from ..finetune.tasks import require_lm_eval, run_tasks

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not text and not names:
        raise InputError("give text files, or --tasks NAMES")
    if names:
        require_lm_eval()
    texts = read_texts(text or [])
    loaded, tokenizer, scheme = load(model, scheme, adapter, dtype, cache)
    reference, its_tokenizer = load(against, None, None, dtype, cache)[:2] if against else (None, None)
    result: dict[str, Any] = {"scheme": scheme}
    if texts:
        blocks = token_blocks(tokenizer, texts, seq_len, keep_tail=True)[:eval_blocks]
        if reference is not None:
            from ..finetune.text import check_tokenizers

            check_tokenizers(its_tokenizer, tokenizer, texts)
        result |= _of_texts(loaded, reference, blocks, scheme)
    if names:
        ask = partial(run_tasks, names=names, limit=limit, batch_size=batch_size, folder=task_folder)
        result["tasks"] = [score._asdict() for score in ask(loaded, tokenizer)]
        if reference is not None:
            result["tasks_against"] = [score._asdict() for score in ask(reference, its_tokenizer)]
    if as_json:
        print(json.dumps(result))
        return
    if texts:
        print(f"perplexity {result['perplexity']:.4f} over {result['tokens']} tokens ({scheme})")
    if "kl" in result:
        kl = result["kl"]
        print(
            f"KL divergence from {against}: mean {kl['mean']:.3g} ± {kl['standard_error']:.2g} nats, "
            f"median {kl['median']:.3g}, 99 % {kl['quantile_99']:.3g}; same first choice "
            f"{100 * result['top_1_agreement']:.1f} %"
        )
    if names:
        _print_tasks(result["tasks"], result.get("tasks_against"), against)


def _of_texts(loaded: Any, reference: Any, blocks: list[Any], scheme: str | None) -> dict[str, Any]:
    """Perplexity, and how far the model is from the reference if there is one."""
    from tqdm import tqdm

    from ..diagnostics.compare import compare
    from ..finetune import InputError, perplexity
    from ..finetune.models import check_length

    tokens = sum(len(block) - 1 for block in blocks)
    if reference is None:
        return {"perplexity": perplexity(loaded, blocks, label=f"perplexity, {scheme}"), "tokens": tokens}
    for model in (loaded, reference):
        check_length(model, max(map(len, blocks)))
    try:
        bar = tqdm(blocks, desc=f"divergence, {scheme}", unit="block", leave=False)
        found = compare(reference, loaded, bar, layers=False)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    facts = found.to_dict()
    kept = {key: facts[key] for key in ("kl", "top_1_agreement")}
    return {"perplexity": found.perplexity_b, "tokens": tokens, "perplexity_against": found.perplexity_a} | kept


def _print_tasks(scores: list[dict[str, Any]], against: list[dict[str, Any]] | None, name: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    def shown(score: dict[str, Any]) -> str:
        error = "" if score["standard_error"] is None else f" ± {score['standard_error']:.4f}"
        return f"{score['value']:.4f}{error}"

    columns = ["task", "metric", "questions", "value", *([f"of {name}"] if against else [])]
    table = Table(*columns, box=None, pad_edge=False, header_style="dim")
    for at, score in enumerate(scores):
        cells = [score["task"], score["metric"], str(score["samples"]), shown(score)]
        table.add_row(*cells, *([shown(against[at])] if against else []))
    Console().print(table, markup=False)
