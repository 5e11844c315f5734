"""Tensors to safetensors files, one at a time, by a writer that goes on where a killed process stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .safetensors_files import DTYPE_NAMES, INDEX, SINGLE

LOG = ".written.log"


class _Written(NamedTuple):
    name: str
    dtype: str
    shape: list[int]
    file: int
    begin: int
    end: int


class SafetensorsWriter:
    """Writes tensors one after the other into files of a folder; no more than one item is in memory.

    The data of a file is collected beside it, because its header, which stands first, names all of its tensors. An item
    that is whole on disk has a line in a log: the next writer of the folder finds it in `notes`, and cuts off what came
    after the last of them.

    Args:
        folder: that exists.
        most_bytes: of a file's data; a larger tensor has a file of its own.
        metadata: texts for the header of each file.

    Attributes:
        notes: by the names of the items that are written, what was noted with them.
    """

    def __init__(self, folder: Path, most_bytes: int = 4 << 30, metadata: Mapping[str, str] | None = None) -> None:
        self._folder, self._most_bytes, self._metadata = folder, most_bytes, {"format": "pt", **(metadata or {})}
        self._files: list[list[_Written]] = []
        self._names: set[str] = set()
        self.notes: dict[str, Any] = {}
        self._resume()

    def _data(self, index: int) -> Path:
        return self._folder / f".{index}.data"

    def _resume(self) -> None:
        """Take over what is whole of an earlier writer's items, and cut off the rest."""
        log, whole = self._folder / LOG, 0
        for line in log.read_bytes().splitlines(keepends=True) if log.exists() else []:
            if not line.endswith(b"\n"):
                break  # the process was killed in this line
            item = json.loads(line)
            tensors = [_Written(*tensor) for tensor in item["tensors"]]
            if not all(self._is_there(tensor) for tensor in tensors):
                break
            for tensor in tensors:
                self._files += [[] for _ in range(len(self._files), tensor.file + 1)]
                self._files[tensor.file].append(tensor)
                self._names.add(tensor.name)
            self.notes[item["item"]] = item["note"]
            whole += len(line)
        if log.exists():
            os.truncate(log, whole)
        for data in self._folder.glob(".*.data"):
            index = int(data.name.split(".")[1])
            if index < len(self._files):
                os.truncate(data, self._files[index][-1].end)
            else:
                data.unlink()

    def _is_there(self, tensor: _Written) -> bool:
        data = self._data(tensor.file)
        # Without data `close` has written the file, whose name depends on how many there are.
        return data.stat().st_size >= tensor.end if data.exists() else any(self._folder.glob("*.safetensors"))

    def add(self, item: str, tensors: Mapping[str, Tensor], note: object = None) -> None:
        """Write the tensors of an item, by their names.

        Args:
            item: a name for all of them.
            tensors: one after the other.
            note: what JSON can hold, for the writer that goes on.

        Raises:
            ValueError: for a name that a tensor has already.
        """
        written = []
        for name, tensor in tensors.items():
            if name in self._names:
                raise ValueError(f"{name} is the name of two tensors")
            self._names.add(name)
            tensor = tensor.detach().cpu().contiguous()
            size = tensor.numel() * tensor.element_size()
            if not self._files or (self._files[-1] and self._files[-1][-1].end + size > self._most_bytes):
                self._files.append([])
            file, index = self._files[-1], len(self._files) - 1
            begin = file[-1].end if file else 0
            with self._data(index).open("ab") as data:
                if size:
                    data.write(tensor.flatten().view(torch.uint8).numpy().data)
            entry = _Written(name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), index, begin, begin + size)
            file.append(entry)
            written.append(entry)
        with (self._folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"item": item, "tensors": written, "note": note}) + "\n")
        self.notes[item] = note

    def close(self) -> None:
        """Write the headers, and the index where there are several files."""
        count, total = len(self._files) or 1, 0
        weight_map: dict[str, str] = {}
        for index, written in enumerate(self._files or [[]]):
            name = SINGLE if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"
            if self._data(index).exists() or not written:
                self._finish(self._folder / name, index, written)
            weight_map |= {w.name: name for w in written}
            total += written[-1].end if written else 0
        if count > 1:
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (self._folder / LOG).unlink(missing_ok=True)

    def _finish(self, path: Path, index: int, written: list[_Written]) -> None:
        """Put the header before the data of a file."""
        header: dict[str, Any] = {"__metadata__": self._metadata}
        header |= {w.name: {"dtype": w.dtype, "shape": w.shape, "data_offsets": [w.begin, w.end]} for w in written}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            if written:
                with self._data(index).open("rb") as data:
                    shutil.copyfileobj(data, file, 1 << 24)
        if written:
            self._data(index).unlink()
