"""What is in a checkpoint, by its headers: format, schemes, bytes, what stays float, and where it can go."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint, CheckpointLayer
from ..checkpoints.folder import FolderFormat
from ..checkpoints.losses import LossError, Losses, OnLoss
from ..checkpoints.registry import FORMATS, open_checkpoint
from ..formats.scheme import QuantScheme
from ..kernels.isa import native
from ..system.text_table import aligned


@dataclass(frozen=True)
class LayerKind:
    """Quantized layers that are stored alike.

    Attributes:
        scheme: of the weight as it is stored, with the activations that the file names.
        details: what the reader says of them, such as "GPTQ v1, activation order".
        layers: how many, and `names` what they are called at their end, such as "q_proj".
        weights: numbers in their matrices.
        bytes: of them in the canonical storage.
        kernel, reason: of the product with one row on this CPU.
    """

    scheme: str
    details: str
    layers: int
    names: tuple[str, ...]
    weights: int
    bytes: int
    kernel: str
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `str()` is a text for a terminal.

    Attributes:
        path: of the file or folder, and `file_bytes` its size.
        format: its name in the registry, and `title` the one that people know.
        model: the architecture that the config names; None: it names none.
        kinds: the quantized layers, most weights first.
        activation_order: layers whose columns are stored in another order.
        floats: tensors that are not quantized, by dtype: how many, and their bytes.
        largest_float: the name of the largest of these.
        lost: what the canonical storage cannot hold exactly, as sentences.
        exports: by each format that is written, why layers have no place there; empty: all have one.
    """

    path: str
    file_bytes: int
    format: str
    title: str
    model: str | None
    kinds: tuple[LayerKind, ...]
    activation_order: int
    floats: Mapping[str, tuple[int, int]]
    largest_float: str | None
    lost: tuple[str, ...]
    exports: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As plain data; JSON can hold it."""
        floats = {dtype: {"tensors": count, "bytes": size} for dtype, (count, size) in self.floats.items()}
        return {**asdict(self), "floats": floats, "exports": dict(self.exports)}

    def __str__(self) -> str:
        text = [f"{self.path}: {self.title}, {self.model or 'no config'}, {_size(self.file_bytes)}"]
        if self.kinds:
            rows = [
                (kind.scheme, str(kind.layers), f"{kind.weights / 1e6:.2f} M", _size(kind.bytes), kind.kernel)
                for kind in self.kinds
            ]
            text += ["", *aligned([("scheme", "layers", "weights", "bytes", "kernel here"), *rows]), ""]
            text += [
                f"{kind.scheme}{f' ({kind.details})' if kind.details else ''}: {', '.join(kind.names)}"
                for kind in self.kinds
            ]
        else:
            text.append("no quantized layer")
        if self.activation_order:
            text.append(f"activation order: {self.activation_order} layers")
        text += [f"float: {count} tensors of {dtype}, {_size(size)}" for dtype, (count, size) in self.floats.items()]
        if self.largest_float is not None:
            text.append(f"largest float tensor: {self.largest_float}")
        text += [f"lost on import: {sentence}" for sentence in self.lost]
        if self.kinds:
            held = [name for name, problem in self.exports.items() if not problem]
            text.append(f"holds these layers: {', '.join(held)}")
            text += [f"{name}: {problem}" for name, problem in self.exports.items() if problem]
        return "\n".join(text)


def inspect(path: str | Path, *, on_loss: OnLoss = "report") -> Inspection:
    """Say what is in a checkpoint. Its tensors are not read, but for small ones that say how others are stored.

    Args:
        path: a folder or file of any format that `qkernels.load` knows.
        on_loss: as in `qkernels.load`; by default a file that our storage does not hold exactly is looked at too.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for an unknown format or a broken file.

    Example:
        >>> import tempfile, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model, folder = transformers.LlamaForCausalLM(config), tempfile.mkdtemp()
        >>> report = qk.quantize_(model, "w8a8")
        >>> model.save_pretrained(folder)
        >>> [(kind.scheme, kind.layers) for kind in qk.inspect(folder).kinds]
        [('w8a8', 8)]
    """
    losses = Losses(on_loss)
    again: tuple[str, ...] = ()
    with torch.device("cpu"):
        try:
            found = open_checkpoint(path, losses)
        except LossError as error:
            if on_loss != "report":
                raise
            losses, again = Losses("requantize"), (str(error),)
            found = open_checkpoint(path, losses)
    kinds: dict[tuple[str, str], list[CheckpointLayer]] = {}
    for layer in found.layers.values():
        kinds.setdefault((layer.scheme.name, layer.details), []).append(layer)
    floats: dict[str, tuple[int, int]] = {}
    for tensor in found.floats.values():
        name = str(tensor.dtype).removeprefix("torch.")
        count, size = floats.get(name, (0, 0))
        floats[name] = count + 1, size + math.prod(tensor.shape) * tensor.dtype.itemsize
    architectures = found.config.get("architectures") or [found.config.get("model_type")]
    summed = (_kind(*key, own) for key, own in kinds.items())
    return Inspection(
        str(path),
        _path_bytes(Path(path)),
        found.format,
        FORMATS[found.format].title,
        architectures[0],
        tuple(sorted(summed, key=lambda kind: -kind.weights)),
        sum(layer.has_input_order for layer in found.layers.values()),
        floats,
        max(found.floats, key=lambda name: math.prod(found.floats[name].shape), default=None),
        again + tuple(f"{loss.tensor}: {loss.what} (largest change {loss.largest:.2g})" for loss in losses.entries),
        _exports(found),
    )


def _kind(scheme: str, details: str, layers: Sequence[CheckpointLayer]) -> LayerKind:
    names = Counter(layer.name.rpartition(".")[2] for layer in layers)
    parsed = QuantScheme.parse(scheme)
    size = 0
    for layer in layers:
        shapes = parsed.storage_shapes(layer.in_features, layer.out_features)
        sizes = {"qweight": 1, "scales": 4, "zeros": 1}
        size += sum(math.prod(shape) * sizes[name] for name, shape in shapes.items())
    largest = max(layers, key=lambda layer: layer.in_features * layer.out_features)
    chosen = native.choose_linear(scheme, 1, largest.out_features, largest.in_features, torch.get_num_threads())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return LayerKind(scheme, details, len(layers), tuple(names), weights, size, chosen["driver"], chosen["reason"])


def _exports(checkpoint: Checkpoint) -> dict[str, str]:
    """By each format that is written: why it has no place for some of the layers."""
    found = {}
    for name, written in FORMATS.items():
        if not written.writes or not isinstance(written, FolderFormat):
            continue
        problems = Counter(problem for layer in checkpoint.layers.values() if (problem := written.problem(layer)))
        (why, _), *_ = problems.most_common(1) or [("", 0)]
        found[name] = f"{problems.total()} of {len(checkpoint.layers)} layers have no place: {why}" if why else ""
    return found


def _path_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
