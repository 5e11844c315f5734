"""`Checkpoint`: a model on disk as quantized layers and float tensors, each read when it is asked for.

Every format is read into this form and written from it, so that a conversion is one reader and one writer, and holds
one tensor at a time. A model in memory has the same form (`integrations`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..formats.validate import input_order_problem, storage_problems, x_scale_problem


@contextmanager
def describing(what: object) -> Iterator[None]:
    """Turn what a reader stumbles over in a damaged file, which it did not foresee, into a `ValueError` that names it.

    >>> with describing("model.safetensors"):
    ...     {}["weight"]
    Traceback (most recent call last):
    ValueError: model.safetensors is damaged, or is not what it says: KeyError: 'weight'
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = shortened(f"{type(error).__name__}: {error}")
        raise ValueError(f"{what} is damaged, or is not what it says: {reason}") from error


def shortened(text: object, most: int = 300) -> str:
    """What a file says, as a part of an error: a hostile file says megabytes."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} ..."


@dataclass(frozen=True)
class LayerWeight:
    """The values of a quantized layer of a checkpoint.

    Attributes:
        weight: the canonical storage of [N, K].
        x_scale: float32 [1], of static activations; else None.
        input_order: int32 [K] or None. Column j of `weight` multiplies feature `input_order[j]` of the input: the order
            in which GPTQ with activation order quantized the columns.
    """

    weight: QuantizedWeight
    x_scale: Tensor | None = None
    input_order: Tensor | None = None


@dataclass(frozen=True)
class CheckpointLayer:
    """A quantized weight [N, K] of a checkpoint: what its header says, and how to read it.

    Attributes:
        name: of the module in the model, such as "model.layers.0.mlp.up_proj"; an expert's has its number in it, as in
            a float checkpoint.
        in_features, out_features: K, N.
        scheme: of the weight as it is stored, and of the activations as the file says: `a16` where it says nothing.
        details: what `qkernels inspect` prints of it, such as "GPTQ v1, activation order".
        tensors: names of the tensors of the file that it is made of.
        reader: reads the values.
        has_input_order: the values have an `input_order`.
        source: the tensors' raw form in its format, for a writer of that format that can keep it; or None.
    """

    name: str
    in_features: int
    out_features: int
    scheme: QuantScheme
    details: str
    tensors: tuple[str, ...]
    reader: Callable[[], LayerWeight]
    has_input_order: bool = False
    source: object | None = None

    def read(self) -> LayerWeight:
        """The values, checked.

        Raises:
            ValueError: naming layer and tensor, if they are not the storage that the header promised.
        """
        with torch.device("cpu"), describing(self.name):
            values = self.reader()
        problems = storage_problems(values.weight._asdict(), self.in_features, self.out_features, self.scheme)
        x_scale = x_scale_problem(values.x_scale, self.scheme)
        if x_scale is not None:
            problems["x_scale"] = x_scale
        if (values.input_order is not None) != self.has_input_order:
            problems["input_order"] = "must be there" if self.has_input_order else "must be None"
        elif (problem := input_order_problem(values.input_order, self.in_features)) is not None:
            problems["input_order"] = problem
        for name, problem in problems.items():
            raise ValueError(f"{self.name}.{name} {problem}")
        return values


@dataclass(frozen=True)
class FloatTensor:
    """A tensor of a checkpoint that is not quantized.

    Attributes:
        reader: reads it; of `shape` and `dtype`.
        source: its raw form in its format, for a writer of that format that can keep it; or None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    reader: Callable[[], Tensor]
    source: object | None = None

    def read(self) -> Tensor:
        """The values.

        Raises:
            ValueError: if they are not what the header promised.
        """
        with torch.device("cpu"), describing(f"a float tensor {list(self.shape)}"):
            return self.reader()


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, or one in memory that is to be written.

    Attributes:
        format: the name of its format in the registry.
        config: the `config.json` of transformers, without its `quantization_config`; empty where there is none.
        layers: the quantized layers by the names of their modules.
        floats: all other tensors by their names in the model's state dict, biases of quantized layers too.
        files: others that belong to the model, such as its tokenizer's, which a writer copies.
        make_files: writes those into a folder that the format has no files for; or None.
        metadata: what its format says beside that, for a writer of the same format.
        path: where it lies; None for a model in memory.
        identity: a text that is another for other values (`identity_of`), by which a writer that was stopped goes on
            with the same checkpoint only; None: nobody knows. Who changes values beside schemes sets it to None.
    """

    format: str
    config: Mapping[str, Any]
    layers: Mapping[str, CheckpointLayer]
    floats: Mapping[str, FloatTensor]
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    make_files: Callable[[Path], None] | None = None

    def copy_files(self, folder: Path) -> None:
        """Put into a folder what belongs to the model beside its config and tensors."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
        if self.make_files is not None:
            self.make_files(folder)

    identity: str | None = None
