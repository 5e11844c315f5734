"""An adapter merged into its base, written for one or several engines, and what each copy lost of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint_format import Progress
from ..checkpoints.losses import Loss, OnLoss
from ..checkpoints.registry import parse_target
from ..convert.model import quantize_
from ..diagnostics.compare import MergeLoss, compare_merge
from ..formats.scheme import QuantScheme
from ..integrations.exporting import export
from ..system import heap
from .errors import InputError
from .models import load_adapter, load_model, quantize, reason_of, stored_scheme

_FLOATS = ("f32", "bf16", "f16")
_OF_GGUF = {"q8_0": "w8a16-g32", "q4_0": "w4a16-g32", "q4_1": "w4a16-g32-asym"}

# What a merge is measured on if no text is given: a few kinds of plain text.
TEXT = """The river rises in the hills above the town and reaches the sea after sixty miles. In spring the water is
high, and the mill at the bridge turns day and night. Farmers bring their grain in the morning and wait in the yard,
where they talk about the weather, about prices and about their children. When the flour is ready, the miller weighs the
sacks and writes the numbers into a book that his grandfather began.

Question: how does a lever work? Answer: a lever is a stiff bar that turns about a fixed point. A small force far from
that point balances a large force near it, because what counts is the product of force and distance. Scissors, oars and
wheelbarrows are levers, and so is the human arm.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

The committee met on Tuesday to discuss the budget for the coming year. Spending on schools will rise by four percent,
and the road to the harbour is to be repaired before winter. Two members voted against the plan, since they had hoped
for lower taxes. The mayor said that the decision was not easy, but that it had been made with care and in the open.
"""


class Target(NamedTuple):
    """What to write: a format, and the scheme that the merged weights get before."""

    name: str  # as the user gave it
    format: str  # "NAME" or "NAME:TARGET" of the registry
    scheme: str | None  # None: they stay in float


class Written(NamedTuple):
    """A merged model on disk."""

    target: Target
    path: Path
    lost: list[Loss]  # in the format
    measured: MergeLoss  # beside the base with its adapter


def parse_merge_target(name: str, base_scheme: str) -> Target:
    """The target of `--to`: a float dtype, a scheme, or a format of the registry.

    Args:
        base_scheme: of the base, which a format of integers gets if it does not say another; "none": it is in float.

    Raises:
        InputError: naming what there is.
    """
    if name in _FLOATS:
        return Target(name, f"float:{name}", None)
    if name in QuantScheme.names():
        return Target(name, "qkernels", name)
    form, _, scheme = name.partition("@")
    try:
        written, target = parse_target(form)
        if scheme:
            scheme = QuantScheme.parse(scheme).name
    except ValueError as error:
        raise InputError(
            f"--to must be {', '.join(_FLOATS)}, a scheme such as w8a8, or a format: {reason_of(error)}"
        ) from error
    if written.name == "float" or (target or "") in _FLOATS:
        return Target(name, form, None)
    scheme = scheme or _OF_GGUF.get(target or "") or base_scheme
    if scheme == "none":
        raise InputError(f"--to {name} needs a scheme, for the base is in float: give --to {form}@w4a16-g128, say")
    return Target(name, form, scheme)


def merge(
    base: Path,
    adapter: Path,
    targets: Sequence[str],
    out: Path,
    blocks: Sequence[Tensor],
    tokenizer: Any,
    dtype: torch.dtype,
    *,
    on_loss: OnLoss = "report",
    progress: Callable[[str], AbstractContextManager[Progress]],
) -> list[Written]:
    """Merge an adapter in float, write it for each target, load that again, and measure it on `blocks`.

    Args:
        base: folder or file of the model.
        adapter: folder of the PEFT adapter.
        targets: what to write; see `parse_merge_target`.
        out: where; several targets have a folder of their own below it.
        blocks: of tokens, int64 [T].
        tokenizer: of the base.
        dtype: in which the models compute while they are measured.
        on_loss: as in `qkernels.export`.
        progress: makes the function that is told how far a writer is, from what it does.

    Raises:
        InputError: for an unknown target, an adapter that does not fit, or what a format cannot hold.
    """
    stored = stored_scheme(base)
    wanted = [parse_merge_target(name, stored) for name in dict.fromkeys(targets)]
    paths = [_path(out, target, len(wanted) > 1) for target in wanted]
    for path in paths:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path} is there already: remove it, or name another")
    adapted: Any = load_adapter(load_model(base, dtype), adapter)
    written = []
    for target, path in zip(wanted, paths, strict=True):
        merged = _merged(base, adapter, target)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with progress(f"writing {target.name}") as told:
                lost = export(merged, path, target.format, like=base, on_loss=on_loss, progress=told)
        except ValueError as error:
            raise InputError(f"--to {target.name}: {reason_of(error)}") from error
        del merged
        heap.trim()
        result = load_model(path, dtype)
        try:
            measured = compare_merge(adapted, result, blocks)
        except ValueError as error:
            raise InputError(f"{path} is written, and cannot be measured: {reason_of(error)}") from error
        written.append(Written(target, path, lost, measured))
        del result
        heap.trim()
    return written


def _merged(base: Path, adapter: Path, target: Target) -> nn.Module:
    """The merged model, in the scheme of a target."""
    model: Any = load_adapter(load_model(base, torch.float32, in_float=True), adapter)
    merged: nn.Module = model.merge_and_unload()
    dtypes = {"bf16": torch.bfloat16, "f16": torch.float16}
    if target.scheme is None:
        merged.to(dtypes.get(target.format.rpartition(":")[2], torch.float32))
    elif target.format.startswith(("qkernels", "gguf")):
        quantize(merged, target.scheme)
    else:  # engines of other formats have embeddings and heads in float
        quantize_(merged, target.scheme, skip=["lm_head"])
    return merged


def _path(out: Path, target: Target, several: bool) -> Path:
    path = out / target.name.replace(":", "-").replace("@", "-") if several else out
    if target.format.startswith("gguf") and path.suffix != ".gguf":
        return path / "model.gguf"
    return path
