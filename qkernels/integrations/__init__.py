"""Integrations with other libraries, loaded when, and only when, the program imports the library.

`import qkernels` must not import transformers or PEFT (seconds of start-up, and both are optional), yet a program that
imports both needs no further step, in whichever order it does so. So the integration is loaded at once if its library
is there already, and otherwise right after the library's module has been executed (a finder on `sys.meta_path` that
leaves the import itself to Python).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# Library, and name of the integration -> the oldest version it works with.
_OLDEST = {"transformers": (5, 23), "peft": (0, 21), "diffusers": (0, 35), "huggingface_hub": (0, 30), "torch": (2, 10)}
# Module of the library that an integration extends -> the library, and the name of the integration.
_EXTENDED = {
    "transformers.quantizers.auto": ("transformers", "transformers"),
    "transformers.modeling_utils": ("transformers", "transformers_saving"),
    "peft.peft_model": ("peft", "peft"),
    "torch.utils.flop_counter": ("torch", "flop_counter"),
    "torch.onnx._internal.exporter._core": ("torch", "onnx"),
    "torch.onnx._internal.torchscript_exporter.utils": ("torch", "onnx_torchscript"),
    "diffusers.quantizers.auto": ("diffusers", "diffusers"),
    "diffusers.models.modeling_utils": ("diffusers", "diffusers_saving"),
    "diffusers.loaders.lora_pipeline": ("diffusers", "diffusers_loading"),
    "huggingface_hub.hub_mixin": ("huggingface_hub", "huggingface_hub"),
}


def load(library: str, name: str | None = None) -> ModuleType:
    """Import the integration with `library`, or the one of these that is called `name`.

    Raises:
        ImportError: if the library is absent or too old; the message says what to install.
    """
    oldest = ".".join(map(str, _OLDEST[library]))
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{library} is not installed: pip install '{library}>={oldest}'") from None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST[library]:
        raise ImportError(f"qkernels works with {library} >= {oldest}, got {version}")
    return importlib.import_module(f"{__name__}.{name or library}")


def _load_or_warn(library: str, name: str | None = None) -> None:
    """Load an integration that nobody asked for by name: an unsupported version must not break the library itself."""
    try:
        load(library, name)
    except ImportError as error:
        warnings.warn(f"the qkernels integration with {library} is not active: {error}", stacklevel=2)


class _LoadAfterLibrary(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _EXTENDED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_load(module: ModuleType) -> None:
            exec_module(module)
            _load_or_warn(*_EXTENDED[fullname])

        spec.loader.exec_module = exec_and_load  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Load the integrations of the libraries imported so far, and each other one when its library is imported."""
    sys.meta_path.insert(0, _LoadAfterLibrary())
    for module, names in _EXTENDED.items():
        if module in sys.modules:
            _load_or_warn(*names)
