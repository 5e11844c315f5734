"""What all formats share that are folders of transformers: `config.json`, safetensors files, tokenizer."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..version import __version__
from .checkpoint import Checkpoint, CheckpointLayer, FloatTensor, LayerWeight
from .checkpoint_format import CheckpointFormat, Progress, no_progress
from .losses import Loss, Losses
from .partial_folder import fingerprint, written_whole
from .safetensors_files import INDEX, SINGLE, SafetensorsFiles, read_json
from .safetensors_writer import SafetensorsWriter

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG = "config.json"
# What early libraries wrote beside a `config.json`, and the `quant_method` that some of these do not say.
_CONFIGS_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Of a folder, what belongs to the model beside its tensors: tokenizers, processors, templates, licenses.
_BESIDE = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".spm")
# What a GGUF file says of a model beside its tensors: a folder keeps it, so that another can be written.
GGUF_TEMPLATE = "template.gguf"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder, with its `quantization_config`; empty without such a file.

    Raises:
        ValueError: if it is no JSON object.
    """
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _parts_that_say(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config, and its parts such as `text_config`, that have a `quantization_config`."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return [part for part in parts if isinstance(part.get("quantization_config"), dict)]


def files_beside(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that a writer copies; a path that is a file has none."""
    if not folder.is_dir():
        return ()
    ours = {CONFIG, INDEX, SINGLE, "quantization_config.json", *_CONFIGS_BESIDE}

    def belongs(file: Path) -> bool:
        return (file.suffix.lower() in _BESIDE and file.name not in ours) or file.name == GGUF_TEMPLATE

    return tuple(sorted(file for file in folder.iterdir() if file.is_file() and belongs(file)))


def quantized_names(tensors: Mapping[str, Any]) -> list[str]:
    """The modules whose weight is called `qweight`.

    Raises:
        ValueError: if there is none.
    """
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not names:
        raise ValueError("the config says that the model is quantized, but no tensor is called .qweight")
    return names


def unquantized_beside(checkpoint: Checkpoint) -> list[str]:
    """The modules with a float matrix that lie in a numbered block together with quantized layers."""
    blocks = {block for name in checkpoint.layers if (block := _block(name))}
    matrices = [n.removesuffix(".weight") for n, t in checkpoint.floats.items() if len(t.shape) == 2]
    return [name for name in matrices if f"{name}.weight" in checkpoint.floats and _block(name) in blocks]


def _block(name: str) -> str:
    """The block "model.layers.0" of "model.layers.0.mlp.up_proj"; empty without a number."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""


class FolderFormat(CheckpointFormat):
    """A format whose tensors lie in safetensors files, and whose `config.json` says how they are quantized.

    Attributes:
        quant_methods: what `quant_method` of the `quantization_config` is.
    """

    quant_methods: ClassVar[tuple[str, ...]] = ()

    def quantization_config(self, folder: Path) -> dict[str, Any]:
        """The `quantization_config` of a folder, in `config.json` or a file beside; empty if it has none."""
        said = [part["quantization_config"] for part in _parts_that_say(read_config(folder))]
        if said and any(other != said[0] for other in said):
            raise ValueError(f"the parts of {folder / CONFIG} must have one quantization_config, got different ones")
        if said:
            return said[0]
        for name, quant_method in _CONFIGS_BESIDE.items():
            if (folder / name).is_file():
                beside = read_json(folder / name)
                return {"quant_method": beside.get("method", quant_method), **beside}
        return {}

    def detects(self, path: Path) -> bool:
        return path.is_dir() and self.quantization_config(path).get("quant_method") in self.quant_methods

    @abstractmethod
    def layers(
        self, tensors: SafetensorsFiles, config: dict[str, Any], losses: Losses
    ) -> Mapping[str, CheckpointLayer]:
        """The quantized layers of a folder.

        Args:
            tensors: those of the folder.
            config: its `quantization_config`.
            losses: the policy.

        Raises:
            ValueError, LossError: as `open`.
        """

    def open(self, path: Path, losses: Losses) -> Checkpoint:
        config, tensors = read_config(path), SafetensorsFiles(path)
        for part in _parts_that_say(config):
            del part["quantization_config"]
        config.pop("quantization_config", None)  # null
        layers = self.layers(tensors, self.quantization_config(path), losses)
        consumed = {name for layer in layers.values() for name in layer.tensors}
        floats = {
            name: FloatTensor(tensors[name].shape, tensors[name].dtype, partial(tensors.tensor, name))
            for name in tensors
            if name not in consumed
        }
        return Checkpoint(self.name, config, layers, floats, files_beside(path), path=path)

    def problem(self, layer: CheckpointLayer) -> str | None:
        """Why the format has no place for a layer; None: it has."""
        return None

    def encode(self, layer: CheckpointLayer, values: LayerWeight, losses: Losses) -> dict[str, Tensor]:
        """The tensors of a layer by their names in the format, such as "weight_packed".

        Raises:
            LossError: for what the format cannot hold exactly, by the policy of `losses`.
        """
        raise NotImplementedError

    def written_config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The `quantization_config` of a folder with these layers."""
        raise NotImplementedError

    def encode_float(self, name: str, tensor: Tensor, losses: Losses) -> Tensor:
        """A tensor that is not quantized, as the format holds it.

        Raises:
            LossError: as `encode`.
        """
        return tensor

    def prepared(self, checkpoint: Checkpoint, losses: Losses, target: str | None) -> tuple[Self, Checkpoint]:
        """The writer of one checkpoint, which knows its target, and the checkpoint as that is to write it."""
        return self, checkpoint

    def write(
        self,
        checkpoint: Checkpoint,
        path: Path,
        losses: Losses,
        target: str | None = None,
        progress: Progress = no_progress,
    ) -> None:
        writer, checkpoint = self.prepared(checkpoint, losses, target)
        writer._write(checkpoint, path, losses, target, progress)

    def _write(
        self, checkpoint: Checkpoint, path: Path, losses: Losses, target: str | None, progress: Progress
    ) -> None:
        problems = {name: self.problem(layer) for name, layer in checkpoint.layers.items()}
        for name, problem in problems.items():
            if problem is not None:
                raise ValueError(f"{self.title} cannot hold {name} ({checkpoint.layers[name].scheme}): {problem}")
        config = dict(checkpoint.config)
        if checkpoint.layers and (said := self.written_config(checkpoint)):
            config["quantization_config"] = said
        with written_whole(path, self._identity(checkpoint, config, losses, target)) as folder:
            self._write_tensors(checkpoint, folder, losses, progress)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            checkpoint.copy_files(folder)

    def _identity(
        self, checkpoint: Checkpoint, config: dict[str, Any], losses: Losses, target: str | None
    ) -> str | None:
        """What a writer must have in common with one that was stopped, to go on where that was."""
        if checkpoint.identity is None:
            return None
        layers = [(name, layer.scheme.name, layer.has_input_order) for name, layer in checkpoint.layers.items()]
        floats = [(name, plain.shape, plain.dtype) for name, plain in checkpoint.floats.items()]
        return fingerprint(
            [checkpoint.identity, self.name, target, losses.on_loss, config, layers, floats, __version__]
        )

    def _write_tensors(self, checkpoint: Checkpoint, folder: Path, losses: Losses, progress: Progress) -> None:
        """The tensors that are not in the folder yet; what the others lost is accounted for again."""
        writer = SafetensorsWriter(folder)
        losses.entries += [Loss(*entry) for note in writer.notes.values() for entry in note]
        parts: list[tuple[str, CheckpointLayer | FloatTensor]] = list(checkpoint.layers.items())
        parts += checkpoint.floats.items()
        for done, (name, part) in enumerate(parts, 1):
            if name not in writer.notes:
                before = len(losses.entries)
                if isinstance(part, CheckpointLayer):
                    encoded = self.encode(part, part.read(), losses)
                    tensors = {f"{name}.{suffix}": tensor for suffix, tensor in encoded.items()}
                else:
                    tensors = {name: self.encode_float(name, part.read(), losses)}
                writer.add(name, tensors, losses.entries[before:])
            progress(done, len(parts), name)
        writer.close()
