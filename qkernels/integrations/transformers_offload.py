"""transformers: the layers of a quantized folder that `device_map` leaves on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..formats.validate import STORAGE, value_problem


class DiskTensors:
    """What is read of a folder and then left on disk, for the hooks of accelerate; it is checked as it is read.

    Args:
        device_map: by the name of a module, where what is below it goes; None: nothing is on disk.
    """

    def __init__(self, device_map: Mapping[str, Any] | None) -> None:
        self._devices = dict(device_map or {})
        self._read: set[str] = set()
        self.problems: list[str] = []
        self.missing: set[str] = set()  # what the folder lacks

    @property
    def any(self) -> bool:
        """Whether anything is left on disk."""
        return "disk" in self._devices.values()

    def holds(self, name: str) -> bool:
        """Whether a module or parameter of this name is on disk: its nearest module in the map is."""
        parts = name.split(".")
        nearest = (".".join(parts[:size]) for size in range(len(parts), -1, -1))
        return next((self._devices[key] for key in nearest if key in self._devices), None) == "disk"

    def has_read(self, name: str, model: nn.Module) -> bool:
        """Whether a parameter on disk, or the one that it is tied to, was read."""
        if getattr(model.get_submodule(name.rpartition(".")[0]), "leading", ()):  # experts, whose files are merged
            return self.holds(name) and name not in self.missing
        ties = getattr(model, "all_tied_weights_keys", {})
        return self.holds(name) and bool(self._read & {name, ties.get(name)})

    def check(self, name: str, stored: Any, model: nn.Module) -> None:
        """Look at a tensor that is read: is it what its layer takes?

        Args:
            name: of the parameter.
            stored: a tensor, or what safetensors gives in its place.
        """
        if not self.holds(name):
            return
        self._read.add(name)
        path, _, key = name.rpartition(".")
        expected, tensor = model.get_submodule(path)._parameters.get(key), stored[...]
        problem = None
        if expected is not None and tensor.shape != expected.shape:
            problem = f"must have the shape {list(expected.shape)}, got {list(tensor.shape)}"
        elif key in (*STORAGE, "x_scale"):
            problem = value_problem(key, tensor)
        if problem is not None:
            self.problems.append(f"{name} {problem}")
