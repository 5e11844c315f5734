"""The formats of checkpoints, and which one a path has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .auto_round import AutoRoundFolder
from .awq import AWQFolder
from .bitsandbytes import BitsAndBytes
from .checkpoint import Checkpoint, describing
from .checkpoint_format import CheckpointFormat
from .compressed_tensors import CompressedTensors
from .float_folder import FloatFolder
from .gguf import GGUF
from .gptq import GPTQFolder
from .hqq import HQQFolder
from .losses import Losses
from .mlx import MLXFolder
from .onnx_file import OnnxFile
from .partial_folder import identity_of
from .qkernels_folder import QKernelsFolder
from .safetensors_files import pickle_hint
from .torchao import TorchAO

# By name. A path is asked in this order what it is, plain float tensors last.
FORMATS: dict[str, CheckpointFormat] = {
    checkpoint_format.name: checkpoint_format
    for checkpoint_format in (
        QKernelsFolder(),
        BitsAndBytes(),
        CompressedTensors(),
        GPTQFolder(),
        GGUF(),
        AWQFolder(),
        AutoRoundFolder(),
        MLXFolder(),
        HQQFolder(),
        TorchAO(),
        OnnxFile(),
        FloatFolder(),
    )
}


def format_of(path: Path) -> CheckpointFormat:
    """The format of a file or folder.

    Raises:
        FileNotFoundError: if there is none at `path`.
        ValueError: if it has no format of the registry.
    """
    if not path.exists():
        raise FileNotFoundError(2, "no such file or folder", str(path))
    with describing(path):
        for checkpoint_format in FORMATS.values():
            if checkpoint_format.detects(path):
                return checkpoint_format
    known = ", ".join(f.title for f in FORMATS.values())
    raise ValueError(f"{path} has no known format{pickle_hint(path)}; known are {known}")


def parse_target(text: str) -> tuple[CheckpointFormat, str | None]:
    """The format, and what it is to hold, of "NAME" or "NAME:TARGET".

    Raises:
        ValueError: for an unknown name or target, naming those there are.
    """
    name, _, target = text.partition(":")
    writable = {name: f for name, f in FORMATS.items() if f.writes}
    if name not in writable:
        raise ValueError(f"format must be one of {', '.join(writable)}, got {name!r}")
    found = writable[name]
    if target and target not in found.targets:
        allowed = ", ".join(found.targets) or "nothing after the colon"
        raise ValueError(f"target of {name} must be one of {allowed}, got {target!r}")
    return found, target or None


def open_checkpoint(path: str | Path, losses: Losses | None = None) -> Checkpoint:
    """The checkpoint at a path, whatever its format.

    Args:
        path: a file (.gguf, .safetensors, .onnx) or a folder.
        losses: the policy; by default what is not exact is refused.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for an unknown format or a broken file.
        LossError: for what cannot be kept exactly.
    """
    path = Path(path)
    found = format_of(path)
    with torch.device("cpu"), describing(path):  # also where a model is made on "meta"
        checkpoint = found.open(path, losses if losses is not None else Losses())
    return replace(checkpoint, identity=identity_of([path]))
