"""What a run records about itself in `qkernels.json`, and what is checked against it when its results are used."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..diagnostics.environment import environment
from .errors import InputError
from .output import BASE, OutputFolder, read_record
from .settings import FinetuneSettings

# Settings that may differ between a run and the one that goes on with it.
_FREE = ("model", "text", "eval_text", "output", "cache", "resume", "save_steps")
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_NO_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "training_args.bin")


def fingerprint(folder: Path) -> str:
    """Tells models apart: a hash of the sizes of its weight files, and of samples of their contents."""
    digest = hashlib.sha256()
    found = [folder] if folder.is_file() else [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    for path in sorted(path for path in found if path.name not in _NO_WEIGHTS):
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def record(
    settings: FinetuneSettings, folder: Path, output: OutputFolder, report: dict[str, Any], blocks: Sequence[Tensor]
) -> dict[str, Any]:
    """The record of a run that is about to train.

    Args:
        folder: of the model that the user gave.
        report: what was measured before training.
        blocks: of training and of held-out text.
    """
    own_base = (output.scratch / BASE).is_dir()
    base = output.path / BASE if own_base else folder.resolve()
    return {
        "kind": "adapter" if settings.method == "lora" else "model",
        "finished": False,
        "steps_done": 0,
        "files": [],
        "base": {
            "model": settings.model,
            "folder": str(base),
            "fingerprint": fingerprint(output.scratch / BASE if own_base else folder),
        },
        "model_fingerprint": fingerprint(folder),
        "scheme": settings.scheme,
        "mode": settings.mode if settings.scheme != "none" else None,
        "grad_dtype": settings.grad_dtype if settings.scheme != "none" else None,
        "dtype": report["dtype"],
        "text": _hash(blocks),
        "versions": _versions(),
        "settings": {name: value for name, value in asdict(settings).items() if name not in _FREE},
        "report": copy.deepcopy(report),
    }


def check_resumed(former: Path, settings: FinetuneSettings, folder: Path, blocks: Sequence[Tensor]) -> dict[str, Any]:
    """The record of the interrupted run in `former`, if the given settings are its own.

    Raises:
        InputError: naming what differs: the run would then not end where it would have without the interruption.
    """
    recorded = read_record(former)
    if recorded is None or "settings" not in recorded:
        raise InputError(f"cannot resume the run in {former}: it has no record of its settings")
    for name, value in asdict(settings).items():
        if name not in _FREE and recorded["settings"].get(name) != value:
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"cannot resume the run in {former}: its {option} is {recorded['settings'].get(name)}, not {value}; "
                f"give the options it was started with, or another --output for a new run"
            )
    if recorded["model_fingerprint"] != fingerprint(folder):
        raise InputError(f"cannot resume the run in {former}: its model is {recorded['base']['model']}, not {folder}")
    if recorded["text"] != _hash(blocks):
        raise InputError(f"cannot resume the run in {former}: the text has changed")
    changed = [
        f"{name} {version} (then {recorded['versions'].get(name)})"
        for name, version in _versions().items()
        if recorded["versions"].get(name) != version
    ]
    if changed:
        warn(f"the interrupted run had other versions, results may differ slightly: {', '.join(changed)}")
    return recorded


def check_adapter(adapter: Path, base: Path, scheme: str | None) -> str | None:
    """Compare an adapter's record with what it is to be used with; say what does not fit.

    Args:
        adapter: folder of an adapter.
        base: folder of the model.
        scheme: given by the user, or None.

    Returns:
        The scheme to use: the one given, else the adapter's; None if neither is known.
    """
    recorded = read_record(adapter)
    if recorded is None:
        return scheme
    trained = recorded.get("scheme")
    if scheme is not None and trained is not None and scheme != trained:
        warn(
            f"--scheme {scheme} is not what the adapter {adapter} was trained with, {trained}; leave out --scheme to "
            "use that"
        )
    known = recorded.get("base", {})
    if known.get("fingerprint") not in (None, fingerprint(base)):
        warn(f"the adapter {adapter} was trained on another model than {base}: {known.get('folder')}")
    if not recorded.get("finished", True):
        warn(f"the adapter {adapter} is of an interrupted run, {recorded.get('steps_done')} steps")
    return scheme if scheme is not None else trained


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _hash(blocks: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(f"{len(block)} ".encode() + block.numpy().tobytes())
    return digest.hexdigest()[:16]


def _versions() -> dict[str, Any]:
    facts: dict[str, Any] = environment()
    return {"qkernels": facts["qkernels"], "python": facts["python"], **facts["packages"]}
