"""GGUF, the format of llama.cpp: a file read straight into the canonical storage, and written from any checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.rules import quantize_weight
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight, dequantize_weight, storage_dtypes
from .checkpoint import Checkpoint, CheckpointLayer, FloatTensor, LayerWeight
from .checkpoint_format import CheckpointFormat, Progress, Variant, no_progress
from .folder import GGUF_TEMPLATE
from .gguf_blocks import BLOCK_TYPES, FLOATS, decode_rows, row_chunks
from .gguf_file import MAGIC, GGUFFile, GGUFSource, GGUFTensor
from .gguf_model import GGUFModel, Place, read_model
from .gguf_writing import TARGETS, write_checkpoint, write_template
from .losses import Loss, Losses

_REQUANTIZED = "w8a16-g32"  # what a type without a canonical storage becomes


class GGUF(CheckpointFormat):
    """A .gguf file of a language model."""

    name = "gguf"
    title = "GGUF"
    targets = TARGETS
    act_group_size = 32  # of Q8_0 and Q8_1, in which llama.cpp puts the activations
    variants = (
        Variant("Q8_0", "w8a16-g32", "exact", "exact", "scales that are float16 values"),
        Variant("Q4_0", "w4a16-g32", "exact", "exact", "scales that are float16 values"),
        Variant("Q5_0", "w8a16-g32", "exact", "exact", "likewise, and codes of 5 bits"),
        Variant(
            "Q4_1, of zero points too", "w4a16-g32-min", "exact", "exact", "scales and mins that are float16 values"
        ),
        Variant("Q5_1", "w8a16-g32-min", "exact", "exact", "codes of 5 bits"),
        Variant(
            "Q4_K, Q5_K", "w4a16-g32-min, w8a16-g32-min", "exact", "exact", "to GGUF only the bytes of a GGUF file"
        ),
        Variant("Q6_K", "w8a16-g16", "exact", "exact", "to GGUF only the bytes of a GGUF file"),
        Variant("F32, F16, BF16", "none", "exact", "exact"),
        Variant("groups of 64, 128, whole rows", "wNa16-gM", "no", "exact", "a scale for each 32 columns"),
        Variant("all other types (IQ, Q2_K, Q3_K, TQ, MXFP4)", "w8a16-g32", "requantized", "no"),
    )

    def detects(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == MAGIC or path.suffix == ".gguf"

    def open(self, path: Path, losses: Losses) -> Checkpoint:
        file = GGUFFile(path)
        model = read_model(file)
        layers: dict[str, CheckpointLayer] = {}
        floats: dict[str, FloatTensor] = {}
        for name, place in model.places.items():
            tensor = file.tensors[name]
            if tensor.kind in FLOATS or not place.is_layer:
                floats |= _floats(file, tensor, place, model)
            else:
                layers |= _layers(file, tensor, place, losses)
        make_files, metadata = partial(_make_files, file, model), {GGUF_TEMPLATE: path}
        return Checkpoint(self.name, model.config, layers, floats, (), metadata, path, make_files)

    def write(
        self,
        checkpoint: Checkpoint,
        path: Path,
        losses: Losses,
        target: str | None = None,
        progress: Progress = no_progress,
    ) -> None:
        write_checkpoint(checkpoint, path, losses, target, progress)


def _make_files(file: GGUFFile, model: GGUFModel, folder: Path) -> None:
    """Write the tokenizer, as transformers reads it, and what else the file says of the model."""
    from transformers import AutoConfig, AutoTokenizer

    write_template(file, folder / GGUF_TEMPLATE)
    settings = {key: value for key, value in model.config.items() if key != "model_type"}
    config = AutoConfig.for_model(model.config["model_type"], **settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name, config=config)
    except Exception as error:  # whatever a vocabulary that it does not know makes transformers raise
        warnings.warn(f"transformers cannot read the tokenizer of {file.path}: {error}", stacklevel=2)
        return
    tokenizer.save_pretrained(folder)


def _floats(file: GGUFFile, tensor: GGUFTensor, place: Place, model: GGUFModel) -> dict[str, FloatTensor]:
    """The parameters of a tensor that is no quantized layer, by name: one, or one of each expert."""
    if tensor.kind not in FLOATS and tensor.kind not in BLOCK_TYPES:
        raise ValueError(f"{tensor.name} of {file.path} has the type {tensor.kind}, which only layers may have")
    plain = FLOATS.get(tensor.kind, torch.float32)
    if place.experts:
        shape = tensor.shape[1:]
        return {
            f"{layer}.weight": FloatTensor(
                shape, plain, partial(_read_floats, file, tensor, None, matrix), GGUFSource(file, tensor, matrix)
            )
            for matrix, layer in enumerate(place.experts)
        }
    if not place.changed:
        reader = partial(_read_floats, file, tensor, place.order)
        return {place.name: FloatTensor(tensor.shape, plain, reader, GGUFSource(file, tensor))}

    def read() -> Tensor:
        return model.restore(tensor.name, _read_floats(file, tensor, None).to(torch.float32)).contiguous()

    return {place.name: FloatTensor(place.shape, torch.float32, read, GGUFSource(file, tensor))}


def _read_floats(file: GGUFFile, tensor: GGUFTensor, order: Tensor | None, matrix: int | None = None) -> Tensor:
    rows = slice(None)
    shape = tensor.shape
    if matrix is not None:
        shape = shape[1:]
        rows = slice(matrix * shape[0], (matrix + 1) * shape[0])
    raw = file.bytes_of(tensor, rows)
    if tensor.kind in FLOATS:
        values = raw.view(FLOATS[tensor.kind])
    else:
        scheme = QuantScheme.parse(BLOCK_TYPES[tensor.kind].scheme)
        values = dequantize_weight(*decode_rows(tensor.kind, raw), tensor.shape[-1], scheme)
    values = values.reshape(shape)
    return values if order is None else values[order]


def _layers(file: GGUFFile, tensor: GGUFTensor, place: Place, losses: Losses) -> dict[str, CheckpointLayer]:
    """The quantized layers of a tensor by name: one, or one of each expert."""
    names = place.experts or (place.name.removesuffix(".weight"),)
    rows, columns = tensor.rows // len(names), tensor.shape[-1]
    block_type = BLOCK_TYPES.get(tensor.kind)
    if block_type is not None:
        scheme = QuantScheme.parse(block_type.scheme)
    else:
        losses.need_requantization(names[0], f"the type {tensor.kind} of GGUF has no integers that are read")
        scheme = QuantScheme.parse(_REQUANTIZED)

    def layer(matrix: int, name: str) -> CheckpointLayer:
        def read() -> LayerWeight:
            first = matrix * rows
            if block_type is not None:
                parts = (decode_rows(tensor.kind, file.bytes_of(tensor, _shifted(c, first))) for c in chunks())
                return LayerWeight(_assembled(parts, chunks(), scheme, rows, columns, place.order))
            return LayerWeight(_requantized(file, tensor, first, rows, scheme, place.order, name, losses))

        def chunks() -> Iterator[slice]:
            return row_chunks(rows, columns)

        source = GGUFSource(file, tensor, matrix)
        return CheckpointLayer(name, columns, rows, scheme, f"GGUF {tensor.kind}", (tensor.name,), read, source=source)

    return {name: layer(matrix, name) for matrix, name in enumerate(names)}


def _shifted(rows: slice, first: int) -> slice:
    return slice(rows.start + first, rows.stop + first)


def _assembled(
    parts: Iterator[QuantizedWeight],
    chunks: Iterator[slice],
    scheme: QuantScheme,
    rows: int,
    columns: int,
    order: Tensor | None,
) -> QuantizedWeight:
    """A weight of its rows, chunk after chunk, each row put where it belongs."""
    dtypes: dict[str, Any] = storage_dtypes(scheme)
    stored = {
        name: torch.empty(shape, dtype=dtypes[name]) for name, shape in scheme.storage_shapes(columns, rows).items()
    }
    inverse = None if order is None else torch.argsort(order)
    for chunk, part in zip(chunks, parts, strict=True):
        where: Any = chunk if inverse is None else inverse[chunk]
        for name, tensor in stored.items():
            tensor[where] = getattr(part, name)
    return QuantizedWeight(stored["qweight"], stored["scales"], stored.get("zeros"))


def _requantized(
    file: GGUFFile,
    tensor: GGUFTensor,
    first: int,
    rows: int,
    scheme: QuantScheme,
    order: Tensor | None,
    name: str,
    losses: Losses,
) -> QuantizedWeight:
    """Float values that the package gguf reads of a type, quantized again; what that changes is told to `losses`."""
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.kind]
    columns, changed, largest, magnitude = tensor.shape[-1], 0, 0.0, 0.0

    def parts() -> Iterator[QuantizedWeight]:
        nonlocal changed, largest, magnitude
        for chunk in row_chunks(rows, columns):
            raw = file.bytes_of(tensor, _shifted(chunk, first))
            exact = torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind))
            weight = quantize_weight(exact, scheme)
            difference = (exact - dequantize_weight(*weight, columns, scheme)).abs()
            changed += int(difference.count_nonzero())
            largest = max(largest, float(difference.max()))
            magnitude = max(magnitude, float(exact.abs().max()))
            yield weight

    weight = _assembled(parts(), row_chunks(rows, columns), scheme, rows, columns, order)
    if changed:
        what = f"weights of {tensor.kind} that {scheme} rounds"
        losses.add(Loss(f"{name}.weight", what, changed, rows * columns, largest / magnitude))
    return weight
