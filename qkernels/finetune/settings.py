"""What `finetune` is told to do, and what of it is refused before slow work starts."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..formats.scheme import QuantScheme
from .errors import InputError
from .models import check_scheme, default_cache

SMOOTHING_BLOCKS = 32  # for --smooth without --calibration-blocks


@dataclass
class FinetuneSettings:
    """What `finetune` does; the command line options of the same names explain each."""

    model: str
    text: list[Path]
    output: Path
    eval_text: list[Path] = field(default_factory=list)
    scheme: str = "w8a8"
    mode: str | None = None
    grad_dtype: str = "float"
    weight_scale: str = "absmax"
    method: str = "lora"
    steps: int = 100
    batch_size: int = 1
    seq_len: int = 256
    eval_seq_len: int | None = None
    lr: float = 5e-4
    schedule: str = "linear"
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    grad_accumulation: int = 1
    lora_rank: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    fused_loss: bool | None = None
    seed: int = 0
    dtype: str = "auto"
    eval_blocks: int = 64
    calibration_blocks: int = 0
    smooth: bool = False
    eval_steps: int | None = None
    baseline: bool = True
    save_steps: int | None = None
    resume: bool = False
    cache: Path = field(default_factory=default_cache)


def with_defaults(settings: FinetuneSettings) -> FinetuneSettings:
    """The settings with the scheme's proper name, and a mode that goes with the method."""
    settings = replace(settings, scheme=check_scheme(settings.scheme))
    mode = settings.mode
    if mode is None:
        mode = "frozen" if settings.method == "lora" or settings.scheme == "none" else "qat"
        if mode == "qat":
            print(f"--method full trains quantized layers in mode {mode}, unless --mode says int8", file=sys.stderr)
    blocks = settings.calibration_blocks or (SMOOTHING_BLOCKS if settings.smooth else 0)
    return replace(settings, mode=mode, calibration_blocks=blocks)


def check(settings: FinetuneSettings) -> None:
    """Refuse all that can be before slow work starts.

    Raises:
        InputError: naming the option, what it is and what is expected.
    """
    scheme = None if settings.scheme == "none" else QuantScheme.parse(settings.scheme)
    if settings.smooth and not (scheme and scheme.int_activations):
        raise InputError(f"--smooth is for a8 schemes, and the scheme is {settings.scheme!r}")
    if scheme and scheme.static_activations and not settings.calibration_blocks:
        raise InputError(
            f"{settings.scheme} has static activations, whose scales come from text: add --calibration-blocks 32"
        )
    calibrates = scheme is not None and (scheme.weight_bits == 4 or scheme.static_activations)
    if settings.calibration_blocks and not settings.smooth and not calibrates:
        raise InputError(
            f"--calibration-blocks is for w4 schemes, and for --smooth, and the scheme is {settings.scheme!r}: "
            "calibrating 8-bit weights fits them to the text and makes the model worse on any other"
        )
    if settings.scheme != "none" and (settings.method == "full") == (settings.mode == "frozen"):
        raise InputError(
            f"--method {settings.method} does not go with --mode {settings.mode} (scheme {settings.scheme}): lora "
            "trains adapters on a frozen model, full trains weights, quantized (qat, int8) or not (--scheme none)"
        )
    if settings.weight_scale == "learned" and (settings.mode != "qat" or scheme is None or not scheme.symmetric):
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
        ("grad_accumulation", 1),
        ("save_steps", 1),
        ("eval_steps", 1),
        ("weight_decay", 0),
        ("max_grad_norm", 0),
        ("lora_dropout", 0),
    ):
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not settings.lora_dropout < 1:
        raise InputError(f"--lora-dropout must be less than 1, got {settings.lora_dropout}")
    if not 0 < settings.lr < math.inf:
        raise InputError(f"--lr must be positive and finite, got {settings.lr}")
