"""Tasks of lm_eval (EleutherAI's lm-evaluation-harness) on a model that is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .errors import InputError
from .models import reason_of, require


class TaskScore(NamedTuple):
    """A metric of a task.

    Attributes:
        metric: such as "acc_norm", with the name of lm_eval's filter if it is not "none".
        standard_error: of `value`; None where lm_eval gives none.
        higher_is_better: None where lm_eval does not say.
        samples: questions asked.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    samples: int


def require_lm_eval() -> None:
    """Refuse to start without lm_eval, before a model is loaded.

    Raises:
        InputError: with the command that installs it.
    """
    try:
        require("lm_eval")
    except InputError as error:
        raise InputError(f"--tasks needs the package lm_eval: pip install 'lm_eval[hf]' ({error.__cause__})") from error


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    folder: Path | None = None,
) -> list[TaskScore]:
    """Run tasks of lm_eval, which downloads their data unless they are local.

    Args:
        model: a causal language model of transformers, quantized or not, or a PEFT model.
        tokenizer: its tokenizer.
        names: of tasks or groups, such as "arc_easy".
        limit: ask the first questions of each task only, this many.
        batch_size: questions at once.
        folder: of the user's own tasks, YAML files.

    Returns:
        The metrics in the order of the tasks.

    Raises:
        InputError: for an unknown task, or one that cannot be run.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not folder.is_dir():
        raise InputError(f"task folder {str(folder)!r} is not a folder")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise InputError(f"lm_eval has no task {unknown[0]!r}; lm_eval ls tasks lists those that it has")
    was_training = model.training
    try:
        harness = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(harness, tasks=list(names), limit=limit, task_manager=manager, log_samples=False)
    except Exception as error:  # whatever a task, its data or a download raises
        raise InputError(f"the tasks {', '.join(names)} cannot be run: {reason_of(error)}") from error
    finally:
        model.train(was_training)
    assert found is not None  # only processes of a group other than the first get None
    return _scores(found)


def _scores(found: Any) -> list[TaskScore]:
    scores = []
    for task, results in found["results"].items():
        better = found.get("higher_is_better", {}).get(task, {})
        samples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in results.items():
            metric, comma, of_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = results.get(f"{metric}_stderr,{of_filter}")
            error = float(error) if isinstance(error, float | int) else None
            name = metric if of_filter == "none" else f"{metric}, {of_filter}"
            scores.append(TaskScore(task, name, float(value), error, better.get(metric), int(samples)))
    return scores
