"""`finetune`: load, quantize, train on the transformers `Trainer`, measure, and write it all down."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.model import freeze_
from ..diagnostics.environment import environment
from ..integrations.fused_loss import PatchedLoss, patch_loss
from ..system.host import device, pick_dtype
from . import provenance
from .errors import Diverged, InputError
from .interrupts import Interrupted, Interrupts
from .measure import perplexity
from .models import (
    check_length,
    load_model,
    load_tokenizer,
    model_bytes,
    quantize,
    require,
    resolve_model,
    stored_scheme,
)
from .output import BASE, OutputFolder, checkpoint_step, latest_checkpoint, write_record, writing
from .report import PLOT, markdown, write_report
from .settings import FinetuneSettings, check, with_defaults
from .text import evenly_spread, read_texts, split_blocks, token_blocks


def finetune(settings: FinetuneSettings, *, evaluate: Callable[..., float] = perplexity) -> dict[str, Any]:
    """Fine-tune a causal language model and write the adapter (or model), the reports and the plot to a folder.

    The base of `method="lora"` is quantized by `scheme` ("none": left in float) and frozen. `method="full"` trains all
    weights in float32, under bfloat16 autocast for dtype bfloat16; quantized layers as their `mode` says, and they are
    frozen when the model is written. A quantized model trains with head and loss fused (`patch_loss`), a float one as
    transformers does; `fused_loss` decides for both.

    All is written to a scratch folder that replaces the output folder at the end (`OutputFolder`). SIGINT, SIGTERM and
    SIGHUP end the training after the step it is in, and what was trained so far is saved.

    Args:
        settings: what to do.
        evaluate: measures the held-out text before and after the training; called as `perplexity`.

    Returns:
        The report, as in `report.json`.

    Raises:
        InputError: if something that the settings name cannot be used, the loss or a weight is no longer finite, or the
            results cannot be written; the output folder is then left as it was.
        Interrupted: after a signal, when all is saved.
    """
    settings = with_defaults(settings)
    check(settings)
    texts, eval_texts = read_texts(settings.text), read_texts(settings.eval_text)
    require("transformers", "accelerate", *(["peft"] if settings.method == "lora" else []))
    folder = resolve_model(settings.model, settings.cache)
    output = OutputFolder(settings.output, resume=settings.resume)
    try:
        with Interrupts() as interrupts, output:
            return _run(settings, evaluate, folder, texts, eval_texts, output, interrupts)
    except (InputError, KeyboardInterrupt) as error:
        checkpoint = latest_checkpoint(output.scratch)
        if isinstance(error, KeyboardInterrupt) and not str(error) and checkpoint is None:
            raise Interrupted("interrupted; nothing was saved") from error
        if isinstance(error, Interrupted) or checkpoint is None:
            raise
        steps = checkpoint_step(checkpoint)
        if isinstance(error, Diverged):  # going on would end there again
            raise Diverged(f"{error}; {steps} steps are kept in {checkpoint}; remove it to start anew") from error
        what = str(error) or "interrupted"
        kept = f"{what}; {steps} steps are kept in {checkpoint.parent}: --resume goes on from there"
        raise (InputError(kept) if isinstance(error, InputError) else Interrupted(kept)) from error


def _run(
    settings: FinetuneSettings,
    evaluate: Callable[..., float],
    folder: Path,
    texts: list[str],
    eval_texts: list[str],
    output: OutputFolder,
    interrupts: Interrupts,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    train_blocks, eval_blocks = _blocks(settings, tokenizer, texts, eval_texts)
    dtype = pick_dtype(settings.dtype)
    resumed = None
    if output.resumed_from:
        resumed = provenance.check_resumed(output.resumed_from, settings, folder, train_blocks + eval_blocks)
        if (output.resumed_from / BASE).is_dir() and output.resumed_from != output.scratch:
            with writing(output.path):
                shutil.copytree(output.resumed_from / BASE, output.scratch / BASE)
    model, report = _quantized_base(
        settings, folder, dtype, train_blocks, eval_blocks, output, tokenizer, resumed, evaluate
    )
    record = provenance.record(settings, folder, output, report, train_blocks + eval_blocks)
    measured = report["perplexity"]
    before = measured.get("quantized", measured.get("float"))
    model = _prepare(model, settings, report)
    output.reserve(_bytes_to_write(model, settings))
    with writing(output.path):
        write_record(output.scratch, record)

    patch = _fuse_loss(model, settings)
    report["fused_loss"] = isinstance(patch, PatchedLoss)
    from .loop import train

    with patch, interrupts.deferred():
        report |= train(model, train_blocks, settings, dtype, output, interrupts, eval_blocks)
    done = len(report["losses"])
    record["steps_done"], record["finished"] = done, done == settings.steps
    if record["finished"] and eval_blocks and not interrupts.requested:
        try:
            measured["finetuned"] = evaluate(model, eval_blocks, label="held-out, fine-tuned")
        except KeyboardInterrupt:  # the training is done and will be saved
            interrupts.requested = True
        else:
            _expect_finite(measured["finetuned"], "after training")
    report["held_out_curve"] = [[0, before], *report["held_out_curve"], [done, measured.get("finetuned")]]
    report["finished"] = record["finished"]
    with interrupts.deferred(), writing(output.path):
        _save(model, tokenizer, settings, output)
        write_report(output.scratch, report)
        (output.scratch / "README.md").write_text(_card(settings, record, report, output), encoding="utf-8")
    if record["finished"]:
        del record["report"]  # report.json has it
    with interrupts.deferred():
        where = output.publish(record)
    if interrupts.requested:
        raise Interrupted(_interruption(settings, record, where))
    return report


def _quantized_base(
    settings: FinetuneSettings,
    folder: Path,
    dtype: torch.dtype,
    train_blocks: list[Tensor],
    eval_blocks: list[Tensor],
    output: OutputFolder,
    tokenizer: Any,
    resumed: dict[str, Any] | None,
    evaluate: Callable[..., float],
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that training starts from, measured, and the report so far.

    What depends on the text is the base of an adapter; it is written to `BASE` before training, and read from there by
    a run that goes on.
    """
    own_base = settings.method == "lora" and bool(settings.calibration_blocks)
    if resumed and own_base:
        return load_model(output.scratch / BASE, dtype), resumed["report"]
    keeps = _keeps_integers(settings, folder)
    model: Any = load_model(folder, torch.float32 if settings.method == "full" else dtype, in_float=not keeps)
    check_length(model, max(settings.seq_len, settings.eval_seq_len or 0))
    report = resumed["report"] if resumed else _initial_report(settings, model, dtype, train_blocks, eval_blocks)
    measured = report["perplexity"]
    if eval_blocks and settings.baseline and not resumed and not keeps:
        measured["float"] = evaluate(model, eval_blocks, label="held-out, float")
        _expect_finite(measured["float"], "of the float model")
    if settings.scheme != "none":
        assert settings.mode is not None  # `checked` has chosen one
        if not keeps:
            report["quantization"] = quantize(
                model,
                settings.scheme,
                evenly_spread(train_blocks, settings.calibration_blocks),
                settings.mode,
                settings.grad_dtype,
                settings.weight_scale,
                settings.smooth,
            ).to_dict()
        elif (found := getattr(model, "quantization_report", None)) is not None:
            report["quantization"] = found.to_dict()
        if eval_blocks and not resumed:
            measured["quantized"] = evaluate(model, eval_blocks, label=f"held-out, {settings.scheme}")
            _expect_finite(measured["quantized"], "of the quantized model")
    report["model"]["bytes"] = model_bytes(model)
    if own_base:
        output.reserve(report["model"]["bytes"])
        with writing(output.path):
            model.save_pretrained(output.scratch / BASE)
            tokenizer.save_pretrained(output.scratch / BASE)
    return model, report


def _keeps_integers(settings: FinetuneSettings, path: Path) -> bool:
    """Whether the training begins with the integers that a checkpoint has; else it has, or is brought into, floats.

    Raises:
        InputError: if it has others than the settings ask for, or is to be calibrated.
    """
    stored = stored_scheme(path)
    if "none" in (stored, settings.scheme) or settings.method == "full":
        return False
    if settings.scheme != stored and path.suffix != ".gguf":
        raise InputError(
            f"{path} is quantized already ({stored}), --scheme {settings.scheme} cannot change that; leave it out, or "
            "give --scheme none"
        )
    if settings.scheme == stored and (settings.calibration_blocks or settings.grad_dtype != "float"):
        raise InputError(
            f"{path} is quantized already ({stored}): --calibration-blocks, --smooth and --grad-dtype int8 are for a "
            "float model"
        )
    return settings.scheme == stored


def _blocks(
    settings: FinetuneSettings, tokenizer: Any, texts: list[str], eval_texts: list[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """Training and held-out blocks."""
    train = token_blocks(tokenizer, texts, settings.seq_len)
    if eval_texts:
        held_out = token_blocks(tokenizer, eval_texts, settings.eval_seq_len or settings.seq_len, keep_tail=True)
    else:
        train, held_out = split_blocks(train)
    if not train:
        raise InputError(f"the text is too short: it gives no block of {settings.seq_len} tokens; lower --seq-len")
    return train, held_out[: settings.eval_blocks]


def _initial_report(
    settings: FinetuneSettings, model: nn.Module, dtype: torch.dtype, train: list[Tensor], held_out: list[Tensor]
) -> dict[str, Any]:
    values = asdict(settings) | {"text": [str(p) for p in settings.text], "output": str(settings.output)}
    values |= {"eval_text": [str(p) for p in settings.eval_text], "cache": str(settings.cache)}
    return {
        "environment": environment(),
        "settings": values,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device().type,
        "blocks": {"train": len(train), "held_out": len(held_out)},
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "float_bytes": model_bytes(model),
        },
        "quantization": None,
        "perplexity": {},
    }


def _prepare(model: nn.Module, settings: FinetuneSettings, report: dict[str, Any]) -> nn.Module:
    """Choose what is trained: LoRA adapters on every linear layer but the head, or everything."""
    from transformers import set_seed

    set_seed(settings.seed)
    if settings.method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=settings.lora_rank,
                lora_alpha=2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules="all-linear",
            ),
        )
    report["model"]["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model


def _bytes_to_write(model: nn.Module, settings: FinetuneSettings) -> int:
    """What the results and the checkpoints of a run take on the disk."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    result = trained if settings.method == "lora" else model_bytes(model)
    # Weights and two moments of AdamW; the checkpoint before goes when the next is complete.
    return result + (2 * 3 * trained if settings.save_steps else 0)


def _expect_finite(value: float, which: str) -> None:
    if not math.isfinite(value):
        raise Diverged(f"the held-out perplexity {which} is {value}: nothing is saved")


def _save(model: Any, tokenizer: Any, settings: FinetuneSettings, output: OutputFolder) -> None:
    """Write the adapter, or the model with its quantized layers frozen, and the tokenizer."""
    if settings.scheme != "none" and settings.mode != "frozen":
        freeze_(model)
    model.save_pretrained(output.scratch)
    tokenizer.save_pretrained(output.scratch)


def next_command(settings: FinetuneSettings, where: Path) -> str:
    """The command that generates text with the results in `where`."""
    if settings.method == "full":
        arguments = [str(where)]
    else:
        model = where / BASE if (where / BASE).is_dir() else settings.model
        arguments = [str(model), "--adapter", str(where)]
    return shlex.join(["qkernels", "generate", *arguments, "--prompt", "Once upon a time"])


def _interruption(settings: FinetuneSettings, record: dict[str, Any], where: Path) -> str:
    done = f"interrupted after step {record['steps_done']} of {settings.steps}"
    if record["finished"]:
        return f"{done}, before the evaluation; all is written to {where}"
    return (
        f"{done}; saved to {where}. To go on: the same command with --resume. To use it as it is: "
        f"{next_command(settings, where)}"
    )


def _card(settings: FinetuneSettings, record: dict[str, Any], report: dict[str, Any], output: OutputFolder) -> str:
    """README.md: what stands on a model card, and the report."""
    library = "peft" if settings.method == "lora" else "transformers"
    head = {"base_model": record["base"]["folder"], "library_name": library, "tags": ["qkernels"]}
    return "---\n" + json.dumps(head) + "\n---\n\n" + markdown(report, plot=(output.scratch / PLOT).is_file())


def _fuse_loss(model: nn.Module, settings: FinetuneSettings) -> AbstractContextManager[Any]:
    """`patch_loss` if it is wanted; models that it does not fit keep their own loss unless it was asked for by name."""
    if not (settings.scheme != "none" if settings.fused_loss is None else settings.fused_loss):
        return nullcontext()
    try:
        return patch_loss(model)
    except ValueError as error:
        if settings.fused_loss:
            raise InputError(f"--fused-loss does not fit this model: {error}") from error
        print(f"the model's own loss is used: {error}", file=sys.stderr)
        return nullcontext()
