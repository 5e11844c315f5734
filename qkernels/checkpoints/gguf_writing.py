"""A checkpoint as a GGUF file: which type each tensor gets, its bytes, and what the file says of the model."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..formats.rules import quantize_weight
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight, dequantize_weight
from .checkpoint import Checkpoint, CheckpointLayer, FloatTensor
from .checkpoint_format import Progress
from .folder import GGUF_TEMPLATE
from .gguf_blocks import BLOCK_TYPES, FLOATS, blocks_of, decode_rows, encode_rows, half_losses, row_chunks
from .gguf_blocks import TARGETS as BLOCK_TARGETS
from .gguf_file import GGUFFile, GGUFSource, Written, write_gguf
from .gguf_metadata import make_template
from .gguf_model import GGUFModel, Place, model_to_write, pairs_of
from .losses import Loss, Losses

TARGETS = ("q8_0", "q4_0", "q4_1", "f16", "bf16", "f32")
_BLOCK = 32
_VOCABULARY = ("embed_tokens", "lm_head")
_ROUTER = "mlp.gate.weight"  # of experts: llama.cpp reads it in float
_OF_CONFIG = ("rope_freqs.weight",)  # tensors that a config of transformers has as numbers


def write_checkpoint(
    checkpoint: Checkpoint, path: Path, losses: Losses, target: str | None, progress: Progress
) -> None:
    """Write a checkpoint as one file, whole or not at all.

    Args:
        target: of `TARGETS`, the type of all layers whose bits it has, and of those in float; None: of each layer the
            one that holds it.

    Raises:
        FileExistsError: if there is a file at `path`.
        ValueError: for a model that GGUF has no place for, or that needs a template and has none.
        LossError: for what GGUF cannot hold exactly, by the policy of `losses`.
    """
    if path.exists():
        raise FileExistsError(17, "is there already; remove it, or name another", str(path))
    with tempfile.TemporaryDirectory() as folder:
        template = _template(checkpoint) or GGUFFile(make_template(checkpoint, Path(folder)))
        _write(checkpoint, path, losses, target, progress, template)


def _write(
    checkpoint: Checkpoint, path: Path, losses: Losses, target: str | None, progress: Progress, template: GGUFFile
) -> None:
    architecture = str(template.value("general.architecture"))
    shapes: dict[str, tuple[int, ...]]
    shapes = {f"{name}.weight": (layer.out_features, layer.in_features) for name, layer in checkpoint.layers.items()}
    shapes |= {name: plain.shape for name, plain in checkpoint.floats.items()}
    model = model_to_write(architecture, checkpoint.config, shapes)
    _check_template(template, model, architecture)
    names = [name for name in template.tensors if name in model.places or name in _OF_CONFIG]
    names += [name for name in model.places if name not in template.tensors]
    tensors = [_written(name, checkpoint, template, model, losses, target) for name in names]
    changed = {}
    if any(t.name not in template.tensors or template.tensors[t.name].kind != t.kind for t in tensors):
        changed = {"general.file_type": _file_type(tensors), "general.quantization_version": 2}
    pairs = pairs_of(template, changed)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        writing = write_gguf(scratch, b"".join(pairs), len(pairs), tensors, template.alignment)
        for done, name in enumerate(writing, start=1):
            progress(done, len(tensors), name)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _template(checkpoint: Checkpoint) -> GGUFFile | None:
    """The GGUF file whose metadata the written one gets: the one that was read, or one beside the model; or None."""
    if GGUF_TEMPLATE in checkpoint.metadata:
        return GGUFFile(Path(checkpoint.metadata[GGUF_TEMPLATE]))
    for file in checkpoint.files:
        if file.name == GGUF_TEMPLATE:
            return GGUFFile(file)
    return None


def write_template(file: GGUFFile, path: Path) -> None:
    """Write what a GGUF file says of a model beside the values of its weights."""
    kept = [tensor for name, tensor in file.tensors.items() if name in _OF_CONFIG]
    tensors = [Written(tensor.name, tensor.shape, tensor.kind, partial(_raw, file, tensor.name)) for tensor in kept]
    pairs = pairs_of(file)
    for _ in write_gguf(path, b"".join(pairs), len(pairs), tensors, file.alignment):
        pass


def _check_template(template: GGUFFile, model: GGUFModel, architecture: str) -> None:
    embedding = model.places["token_embd.weight"].shape
    tokens = template.metadata.get("tokenizer.ggml.tokens")
    expected = {
        "block_count": ("num_hidden_layers", model.config.get("num_hidden_layers")),
        "embedding_length": ("columns of the embedding", embedding[1]),
    }
    for key, (what, ours) in expected.items():
        found = template.value(f"{architecture}.{key}")
        if ours is not None and found != ours:
            raise ValueError(f"{template.path} is of another model: its {key} is {found}, {what} {ours}")
    if tokens is not None and tokens.value != embedding[0]:
        raise ValueError(
            f"{template.path} has {tokens.value} tokens, the embedding {embedding[0]} rows: a tokenizer that was "
            "changed needs a template of its own"
        )


def _file_type(tensors: Sequence[Written]) -> int:
    """What `general.file_type` says of a file: the type of most of its weights."""
    from gguf import LlamaFileType

    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.kind] += torch.Size(tensor.shape).numel()
    kind = sizes.most_common(1)[0][0]
    for name in (f"MOSTLY_{kind}", f"MOSTLY_{kind}_M", f"ALL_{kind}"):
        if name in LlamaFileType.__members__:
            return int(LlamaFileType[name])
    return int(LlamaFileType.GUESSED)


def _written(
    name: str, checkpoint: Checkpoint, template: GGUFFile, model: GGUFModel, losses: Losses, target: str | None
) -> Written:
    place = model.places.get(name)
    if place is None:  # factors of positions, which the config has
        tensor = template.tensors[name]
        return Written(name, tensor.shape, tensor.kind, partial(_raw, template, name))
    parameters = [f"{layer}.weight" for layer in place.experts] or [place.name]
    layers = [checkpoint.layers.get(parameter.removesuffix(".weight")) for parameter in parameters]
    floats = [checkpoint.floats.get(parameter) for parameter in parameters]
    if target is None and (
        source := _source(name, [layer or plain for layer, plain in zip(layers, floats, strict=True)])
    ):
        tensor = source.file.tensors[name]
        return Written(name, tensor.shape, tensor.kind, partial(_raw, source.file, name))
    found = [layer for layer in layers if layer is not None]
    if len(found) == len(parameters):
        kinds = {_kind(layer, target, losses) for layer in found}
        if len(kinds) > 1:
            raise ValueError(f"the experts of {name} must be of one type, got {', '.join(sorted(kinds))}")
        (kind,) = kinds
        return Written(name, place.shape, kind, partial(_layer_bytes, found, kind, place, losses))
    plain = [tensor for tensor in floats if tensor is not None]
    if len(plain) != len(parameters):
        raise ValueError(f"the experts of {name} must be all quantized or all floats")
    kind = _float_kind(place, plain[0], target)
    return Written(name, place.shape, kind, partial(_float_bytes, name, plain, kind, place, model, losses))


def _source(name: str, parts: Sequence[CheckpointLayer | FloatTensor | None]) -> GGUFSource | None:
    """Where the bytes of a tensor lie as they are, in a GGUF file."""
    sources = [None if part is None else part.source for part in parts]
    first = sources[0]
    if not isinstance(first, GGUFSource) or first.tensor.name != name:
        return None
    whole = [GGUFSource(first.file, first.tensor, matrix) for matrix in range(len(parts))]
    matrices = first.tensor.shape[0] if len(first.tensor.shape) == 3 else 1
    return first if sources == whole and len(parts) == matrices else None


def _raw(file: GGUFFile, name: str) -> Iterator[Tensor]:
    tensor = file.tensors[name]
    return (file.bytes_of(tensor, rows) for rows in row_chunks(tensor.rows, tensor.row_bytes))


def _kind(layer: CheckpointLayer, target: str | None, losses: Losses) -> str:
    """The type of a layer.

    Raises:
        LossError: if no type of these bits holds it exactly, and it may not be quantized again.
        ValueError: for an order of columns, which GGUF does not have.
    """
    if layer.has_input_order:
        raise ValueError(f"{layer.name} has an order of its columns (GPTQ's activation order), which GGUF has not")
    if target is not None and target.upper() in FLOATS:
        return target.upper()
    if layer.in_features % _BLOCK:
        return "F32"  # every value is kept; llama.cpp has no blocks for these columns
    scheme = layer.scheme
    if scheme.group_size == 16:
        exact = None
    elif scheme.weight_bits == 4:
        exact = "Q4_0" if scheme.symmetric else "Q4_1"
    else:
        codes = layer.read().weight.qweight
        names = ("Q5_0", "Q8_0") if scheme.symmetric else ("Q5_1",)
        exact = next((name for name in names if _fits(codes, name)), None)
    wanted = exact if target is None else target.upper()
    bits = {"Q4_0": 4, "Q4_1": 4}.get(wanted or "", 8)
    if exact is not None and (wanted == exact or (wanted == "Q8_0" and exact == "Q5_0")):
        return str(wanted)
    if exact is not None and bits == 4 and layer.scheme.weight_bits == 8 and _is_vocabulary(layer):
        return exact  # what was kept at 8 bits where 4 cost too much
    wanted = wanted or "Q8_0"
    losses.need_requantization(f"{layer.name}.weight", f"{layer.scheme} is not what {wanted} of GGUF holds")
    return wanted


def _is_vocabulary(layer: CheckpointLayer) -> bool:
    """Whether a layer is an embedding or a head."""
    return layer.name.rpartition(".")[2] in _VOCABULARY


def _fits(codes: Tensor, kind: str) -> bool:
    least, greatest, _ = BLOCK_TARGETS[kind]
    low, high = codes.aminmax()
    return least <= int(low) and int(high) <= greatest


def _holds(layer: CheckpointLayer, kind: str) -> bool:
    """Whether the integers of a layer are those of the type."""
    if layer.scheme.group_size == 16 or layer.in_features % _BLOCK:
        return False
    same_bits = (layer.scheme.weight_bits == 4) == kind.startswith("Q4")
    return same_bits and BLOCK_TARGETS[kind].mins == (not layer.scheme.symmetric)


def _layer_bytes(layers: Sequence[CheckpointLayer], kind: str, place: Place, losses: Losses) -> Iterator[Tensor]:
    """The bytes of a tensor of one layer, or of all experts of one matrix."""
    for layer in layers:
        values, columns = layer.read(), layer.in_features
        if values.x_scale is not None:
            what = "scales of static activations that GGUF has not"
            losses.add(Loss(f"{layer.name}.x_scale", what, 1, 1, 1.0))
        weight = values.weight
        if place.order is not None:
            weight = weight.map(_rows_of(torch.argsort(place.order)))
        chunks = row_chunks(layer.out_features, columns)
        if kind in FLOATS:
            yield from _as_floats(layer, weight, chunks, kind, losses)
        elif _holds(layer, kind):
            half_losses(weight, layer.name, losses)
            for rows in chunks:
                yield encode_rows(kind, blocks_of(weight.map(_rows_of(rows)), columns, layer.scheme))
        else:
            yield from _requantized(layer, weight, chunks, kind, losses)


def _rows_of(rows: slice | Tensor):  # type: ignore[no-untyped-def]  # of a callable
    return lambda tensor: tensor[rows]


def _as_floats(
    layer: CheckpointLayer, weight: QuantizedWeight, chunks: Iterator[slice], kind: str, losses: Losses
) -> Iterator[Tensor]:
    tally = _Tally(f"{layer.name}.weight", f"weights that {kind} cannot hold")
    for rows in chunks:
        exact = dequantize_weight(*weight.map(_rows_of(rows)), layer.in_features, layer.scheme)
        kept = exact.to(FLOATS[kind])
        tally.add(exact, kept.to(torch.float32))
        yield kept.view(torch.uint8)
    tally.tell(losses)


def _requantized(
    layer: CheckpointLayer, weight: QuantizedWeight, chunks: Iterator[slice], kind: str, losses: Losses
) -> Iterator[Tensor]:
    tally, scheme = _Tally(f"{layer.name}.weight", f"weights that {kind} rounds"), BLOCK_TYPES[kind].scheme
    for rows in chunks:
        exact = dequantize_weight(*weight.map(_rows_of(rows)), layer.in_features, layer.scheme)
        again = quantize_weight(exact, scheme)
        raw = encode_rows(kind, blocks_of(again, layer.in_features, QuantScheme.parse(scheme)))
        tally.add(exact, dequantize_weight(*decode_rows(kind, raw), layer.in_features, scheme))
        yield raw
    tally.tell(losses)


class _Tally:
    """Counts what a tensor loses, chunk by chunk."""

    def __init__(self, tensor: str, what: str) -> None:
        self._names, self._counts, self._largest, self._magnitude = (tensor, what), [0, 0], 0.0, 0.0

    def add(self, exact: Tensor, kept: Tensor) -> None:
        if not kept.isfinite().all():
            raise ValueError(f"{self._names[0]} has values of {float(exact.abs().max()):g}, which float16 cannot hold")
        difference = (exact - kept).abs()
        self._counts[0] += int(difference.count_nonzero())
        self._counts[1] += exact.numel()
        self._largest = max(self._largest, float(difference.max()))
        self._magnitude = max(self._magnitude, float(exact.abs().max()))

    def loss(self) -> Loss | None:
        """What was lost; None: nothing."""
        changed, total = self._counts
        return Loss(*self._names, changed, total, self._largest / self._magnitude) if changed else None

    def tell(self, losses: Losses) -> None:
        if (loss := self.loss()) is not None:
            losses.add(loss)


def _float_kind(place: Place, plain: FloatTensor, target: str | None) -> str:
    """The type of a float tensor: that of the target for a layer; vectors are F32, which llama.cpp needs."""
    if not plain.dtype.is_floating_point:
        raise ValueError(f"{place.name} is a tensor of {plain.dtype}, which GGUF has no place for")
    if len(place.shape) == 1 or place.changed:
        return "F32"
    own = next((kind for kind, dtype in FLOATS.items() if dtype == plain.dtype), "F32")
    if target is None or target.upper() in FLOATS:
        return own if target is None else target.upper()
    if not place.is_layer or place.name.endswith(_ROUTER) or place.shape[-1] % _BLOCK:
        return own
    if target.startswith("q4") and place.name.removesuffix(".weight").rpartition(".")[2] in _VOCABULARY:
        return "Q8_0"  # where 4 bits cost too much
    return target.upper()


def _float_bytes(
    name: str, tensors: Sequence[FloatTensor], kind: str, place: Place, model: GGUFModel, losses: Losses
) -> Iterator[Tensor]:
    for tensor in tensors:
        values = tensor.read()
        if place.changed:
            values = model.convert(name, values.to(torch.float32))
        elif place.order is not None:
            values = values[torch.argsort(place.order)]
        if kind not in FLOATS:
            yield from _quantized(place.name, values, kind, losses)
            continue
        kept = values.to(FLOATS[kind])
        losses.changed(place.name, f"values that {kind} cannot hold", values, kept)
        yield kept.flatten().view(torch.uint8)


def _quantized(name: str, values: Tensor, kind: str, losses: Losses) -> Iterator[Tensor]:
    """The blocks of a float matrix, which the caller asked for."""
    scheme, tally = QuantScheme.parse(BLOCK_TYPES[kind].scheme), _Tally(name, f"weights that {kind} rounds")
    for rows in row_chunks(*values.shape):
        exact = values[rows].to(torch.float32)
        raw = encode_rows(kind, blocks_of(quantize_weight(exact, scheme), exact.shape[1], scheme))
        tally.add(exact, dequantize_weight(*decode_rows(kind, raw), exact.shape[1], scheme))
        yield raw
    if (loss := tally.loss()) is not None:
        losses.tell(loss)
