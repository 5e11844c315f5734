"""The training loop: transformers' `Trainer`, with checkpoints that are whole or absent and a stop on bad losses."""

from __future__ import annotations

import json
import math
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..system.heap import Trimmer
from ..system.host import device
from .errors import Diverged, InputError
from .interrupts import Interrupts
from .measure import PeakMemory, perplexity
from .output import OutputFolder, checkpoint_step, writing
from .settings import FinetuneSettings

# In each checkpoint: what the report tells of the steps before it.
PROGRESS = "progress.json"


def train(
    model: nn.Module,
    blocks: list[Tensor],
    settings: FinetuneSettings,
    dtype: torch.dtype,
    output: OutputFolder,
    interrupts: Interrupts,
    held_out: list[Tensor],
) -> dict[str, Any]:
    """Train `model` on `blocks`, from the checkpoint of `output` if it has one.

    Args:
        held_out: what the model is evaluated on every `settings.eval_steps` steps.

    Returns:
        For the report: losses and seconds of all steps, peak memory, and held-out perplexities by step. If `interrupts`
        asked for an end, there are fewer losses than `settings.steps`, and `output` holds a checkpoint of the last one.

    Raises:
        Diverged: if a loss or a trained weight is not finite.
        InputError: if a checkpoint cannot be written or read.
    """
    recorder = Recorder(settings, interrupts, held_out)
    arguments = TrainingArguments(
        output_dir=str(output.saving),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup_steps,
        bf16=settings.method == "full" and dtype is torch.bfloat16,
        use_cpu=device().type == "cpu",
        dataloader_pin_memory=device().type != "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        gradient_accumulation_steps=settings.grad_accumulation,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or settings.steps,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.output, trainer.recorder = output, recorder
    if output.checkpoint:
        recorder.load(output.checkpoint)
    with PeakMemory() as peak, closing(recorder):
        checkpoint = str(output.checkpoint) if output.checkpoint else None
        if len(recorder.losses) < settings.steps:
            trainer.train(resume_from_checkpoint=checkpoint)
        else:  # all steps are done; Trainer would take one more
            trainer._load_from_checkpoint(checkpoint)
    refuse_non_finite(model, len(recorder.losses))
    # The first step also allocates and starts threads.
    steady = sorted(recorder.seconds[1:] or recorder.seconds)
    return {
        "losses": recorder.losses,
        "seconds": recorder.seconds,
        "seconds_per_step": steady[len(steady) // 2],
        "peak_memory_bytes": peak.bytes,
        "held_out_curve": recorder.held_out,
    }


def refuse_non_finite(model: nn.Module, step: int) -> None:
    """Refuse weights that training has spoilt.

    Raises:
        Diverged: naming the first one.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.detach().isfinite().all():
            raise Diverged(f"{name} is not finite after step {step}: nothing of it is saved; {_REMEDY}")


_REMEDY = "a lower --lr or more --warmup-steps may help"


class _Trainer(Trainer):
    """A checkpoint is put together in one folder and then moved to its place."""

    output: OutputFolder
    recorder: Recorder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        refuse_non_finite(self.model, self.state.global_step)
        with writing(self.output.path):
            super()._save_checkpoint(model, trial)
            (folder,) = self.output.saving.iterdir()
            self.recorder.save(folder)
            self.output.keep_checkpoint(folder)


class Recorder(TrainerCallback):
    """Shows progress, keeps loss and time of each step, and ends training on bad losses or a signal."""

    def __init__(self, settings: FinetuneSettings, interrupts: Interrupts, blocks: list[Tensor]) -> None:
        self._blocks = blocks
        self.held_out: list[list[float]] = []  # [step, perplexity]
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._settings, self._interrupts = settings, interrupts
        self._bar: Any = None  # a progress bar, between the begin of the training and `close`
        self._trimmer = Trimmer()

    def save(self, checkpoint: Path) -> None:
        values = {"losses": self.losses, "seconds": self.seconds, "held_out": self.held_out}
        (checkpoint / PROGRESS).write_text(json.dumps(values), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Go on after the steps of a checkpoint."""
        try:
            values = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
            self.losses, self.seconds, self.held_out = (values[name] for name in ("losses", "seconds", "held_out"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot resume from {checkpoint}: its {PROGRESS} is damaged ({error})") from error
        if len(self.losses) != checkpoint_step(checkpoint):
            raise InputError(f"cannot resume from {checkpoint}: its {PROGRESS} is of step {len(self.losses)}")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        label = f"training, {self._settings.scheme}"
        self._bar = tqdm(total=self._settings.steps, initial=len(self.losses), desc=label, unit="step")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, _args: Any, state: Any, control: Any, model: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self._bar.update()
        if self._settings.mode != "frozen":
            self._trimmer.step(model.parameters())
        step, every = state.global_step, self._settings.eval_steps
        if every and self._blocks and step % every == 0 and step < self._settings.steps:
            self.held_out.append([step, perplexity(model, self._blocks)])
        if self._interrupts.requested:
            control.should_save = control.should_training_stop = True

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" not in logs:
            return
        loss = logs["loss"]
        if not math.isfinite(loss):
            raise Diverged(f"the training loss is {loss} at step {state.global_step}: training stopped; {_REMEDY}")
        self.losses.append(loss)
        self._bar.set_postfix(loss=f"{loss:.3f}")

    def close(self) -> None:
        """End the progress bar, which would else be drawn once more when the process ends."""
        if self._bar is not None:
            self._bar.close()
