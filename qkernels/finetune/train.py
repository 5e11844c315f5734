"""`finetune`: load, quantize, train on the transformers `Trainer`, measure, and write it all down."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import calibrate, convert
from ..patch import PatchedLoss, patch_loss
from ..schemes import QuantScheme
from .errors import InputError
from .measure import PeakMemory, environment, perplexity
from .models import (
    check_length,
    check_scheme,
    default_cache,
    device,
    load_model,
    load_tokenizer,
    model_bytes,
    pick_dtype,
    quantize,
    require,
    resolve_model,
)
from .report import MARKER, write_report
from .text import evenly_spread, read_texts, split_blocks, token_blocks

# Folder below the output that holds the quantized base model, where it was calibrated.
BASE = "base"


@dataclass
class FinetuneSettings:
    """What `finetune` does; the command line options of the same names explain each."""

    model: str
    text: list[Path]
    output: Path
    eval_text: list[Path] = field(default_factory=list)
    scheme: str = "w8a8"
    mode: str = "frozen"
    grad: str = "float"
    weight_scale: str = "absmax"
    method: str = "lora"
    steps: int = 100
    batch_size: int = 1
    seq_len: int = 256
    eval_seq_len: int | None = None
    lr: float = 5e-4
    schedule: str = "linear"
    warmup_steps: int = 5
    lora_rank: int = 16
    fused_loss: bool | None = None
    seed: int = 0
    dtype: str = "auto"
    eval_blocks: int = 64
    calibration_blocks: int = 0
    smooth: bool = False
    baseline: bool = True
    cache: Path = field(default_factory=default_cache)


def finetune(settings: FinetuneSettings) -> dict[str, Any]:
    """Fine-tune a causal language model and write the adapter (or model), the reports and the plot to a folder.

    The base of `method="lora"` is quantized by `scheme` ("none": left in float) and frozen. `method="full"` trains all
    weights in float32, under bfloat16 autocast for dtype bfloat16; quantized layers as their `mode` says, and they are
    frozen when the model is written. A quantized model trains with head and loss fused (`patch_loss`), a float one as
    transformers does; `fused_loss` decides for both.

    Returns:
        The report, as in `report.json`.

    Raises:
        InputError: if something that the settings name cannot be used; the output folder is then left as it was.
    """
    _check(settings)
    texts, eval_texts = read_texts(settings.text), read_texts(settings.eval_text)
    require("transformers", "accelerate", "matplotlib", *(["peft"] if settings.method == "lora" else []))
    folder = resolve_model(settings.model, settings.cache)
    tokenizer = load_tokenizer(folder)
    train_blocks, eval_blocks = _blocks(settings, tokenizer, texts, eval_texts)
    dtype = pick_dtype(settings.dtype)
    model = load_model(folder, torch.float32 if settings.method == "full" else dtype)
    check_length(model, max(settings.seq_len, settings.eval_seq_len or 0))

    report = _initial_report(settings, model, dtype, train_blocks, eval_blocks)
    measured = report["perplexity"]
    if eval_blocks and settings.baseline:
        measured["float"] = perplexity(model, eval_blocks, label="held-out, float")
    if settings.scheme != "none":
        quantized = quantize(
            model,
            settings.scheme,
            evenly_spread(train_blocks, settings.calibration_blocks),
            settings.mode,
            settings.grad,
            settings.weight_scale,
            settings.smooth,
        )
        report["quantization"] = quantized.to_dict()
        if eval_blocks:
            measured["quantized"] = perplexity(model, eval_blocks, label=f"held-out, {settings.scheme}")
    report["model"]["bytes"] = model_bytes(model)
    before = measured.get("quantized", measured.get("float"))

    model = _prepare(model, settings, report)
    _train(model, train_blocks, settings, dtype, report)
    if eval_blocks:
        measured["finetuned"] = perplexity(model, eval_blocks, label="held-out, fine-tuned")
    report["held_out_curve"] = [[0, before], [settings.steps, measured.get("finetuned")]]

    settings.output.mkdir(parents=True, exist_ok=True)
    if settings.mode != "frozen":
        convert.freeze_(model)
    model.save_pretrained(settings.output)
    if settings.method == "full":
        tokenizer.save_pretrained(settings.output)
    elif settings.calibration_blocks:  # the adapter belongs to this very base, which depends on the text
        model.unload().save_pretrained(settings.output / BASE)
        tokenizer.save_pretrained(settings.output / BASE)
    write_report(settings.output, report)
    return report


def _check(settings: FinetuneSettings) -> None:
    """Everything that can be refused before slow work starts."""
    check_scheme(settings.scheme)
    if settings.calibration_blocks and (
        settings.scheme == "none" or not calibrate.applies(QuantScheme.parse(settings.scheme))
    ):
        raise InputError(f"--calibration-blocks is for w4 and a8 schemes, and the scheme is {settings.scheme!r}")
    if settings.smooth and not (settings.calibration_blocks and QuantScheme.parse(settings.scheme).int_activations):
        raise InputError(f"--smooth is for a8 schemes with --calibration-blocks, and the scheme is {settings.scheme!r}")
    if settings.scheme != "none" and (settings.method == "full") == (settings.mode == "frozen"):
        raise InputError(
            f"--method {settings.method} does not go with --mode {settings.mode} (scheme {settings.scheme}): lora "
            "trains adapters on a frozen model, full trains weights, quantized (qat, int8) or not (--scheme none)"
        )
    if settings.weight_scale == "learned" and (
        settings.mode != "qat" or settings.scheme == "none" or not QuantScheme.parse(settings.scheme).symmetric
    ):
        raise InputError(
            f"--weight-scale learned is for --mode qat and symmetric schemes, not {settings.mode} and {settings.scheme}"
        )
    if settings.eval_seq_len is not None and not settings.eval_text:
        raise InputError("--eval-seq-len needs --eval-text: blocks held out of the training text have its --seq-len")
    if not settings.text:
        raise InputError("no text to train on: give at least one file with --text")
    for name, least in (
        ("steps", 1),
        ("batch_size", 1),
        ("lora_rank", 1),
        ("warmup_steps", 0),
        ("eval_blocks", 0),
        ("calibration_blocks", 0),
    ):
        value = getattr(settings, name)
        if value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not settings.lr > 0:
        raise InputError(f"--lr must be positive, got {settings.lr}")
    output = settings.output
    if output.exists() and not output.is_dir():
        raise InputError(f"output {str(output)!r} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise InputError(f"output folder {str(output)!r} holds files of something else; give a new or empty folder")


def _blocks(
    settings: FinetuneSettings, tokenizer, texts: list[str], eval_texts: list[str]
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
                lora_alpha=2 * settings.lora_rank,
                target_modules="all-linear",
            ),
        )
    report["model"]["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model


def _train(
    model: nn.Module, blocks: list[Tensor], settings: FinetuneSettings, dtype: torch.dtype, report: dict[str, Any]
) -> None:
    """Run the Trainer; losses, step times and peak memory go to the report."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(settings.output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup_steps,
        bf16=settings.method == "full" and dtype is torch.bfloat16,
        use_cpu=device().type == "cpu",
        dataloader_pin_memory=device().type != "cpu",
        logging_steps=1,
        seed=settings.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    recorder = _recorder(settings)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    patch = _fuse_loss(model, settings)
    report["fused_loss"] = isinstance(patch, PatchedLoss)
    with patch, PeakMemory() as peak:
        trainer.train()
    # The first step also allocates and starts threads.
    steady = sorted(recorder.seconds[1:] or recorder.seconds)
    report["losses"] = recorder.losses
    report["seconds"] = recorder.seconds
    report["seconds_per_step"] = steady[len(steady) // 2]
    report["peak_memory_bytes"] = peak.bytes


def _fuse_loss(model: nn.Module, settings: FinetuneSettings) -> AbstractContextManager:
    """`patch_loss` if it is wanted; models that it does not fit keep their own loss unless it was asked for by name."""
    if not (settings.scheme != "none" if settings.fused_loss is None else settings.fused_loss):
        return nullcontext()
    try:
        return patch_loss(model)
    except (TypeError, ValueError) as error:
        if settings.fused_loss:
            raise InputError(f"--fused-loss does not fit this model: {error}") from error
        print(f"the model's own loss is used: {error}", file=sys.stderr)
        return nullcontext()


def _recorder(settings: FinetuneSettings):
    """A Trainer callback that shows progress and keeps the loss and the time of each step."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.seconds: list[float] = []

        def on_train_begin(self, *_, **__) -> None:
            self._bar = tqdm(total=settings.steps, desc=f"training, {settings.scheme}", unit="step")

        def on_step_begin(self, *_, **__) -> None:
            self._start = time.perf_counter()

        def on_step_end(self, *_, **__) -> None:
            self.seconds.append(time.perf_counter() - self._start)
            self._bar.update()

        def on_log(self, _args, _state, _control, logs: dict[str, float], **__) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])
                self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

        def on_train_end(self, *_, **__) -> None:
            self._bar.close()

    return Recorder()
