"""The outputs of a model in files, and a module that gives them: for two models that do not fit into memory at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .outputs import evaluating, is_causal, keyword_arguments, output_of


class RecordedModel(nn.Module):
    """Stands for a model in `qk.compare`: it gives what `record_outputs` has written.

    Args:
        folder: that `record_outputs` wrote.

    Raises:
        FileNotFoundError: if the folder holds no outputs.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(2, "holds no recorded outputs", str(folder))
        from safetensors import safe_open

        with safe_open(files[0], framework="pt") as file:
            self._causal = (file.metadata() or {}).get("causal") == "True"

    def can_generate(self) -> bool:
        """Whether it stands for a causal language model."""
        return self._causal

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The outputs for these inputs, by the name "logits", or "output" of a model without logits.

        Raises:
            ValueError: if none were recorded for these inputs.
        """
        from safetensors.torch import load_file

        path = _path(self.folder, (*args, *kwargs.values()))
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no outputs for these inputs: record them for the same text")
        return load_file(path)


def record_outputs(
    model: nn.Module, inputs: Iterable[Tensor | Mapping[str, Tensor]], folder: str | Path
) -> RecordedModel:
    """Run a model and write its outputs, in their own dtype: a comparison with them has the same result.

    They take as many bytes as the logits of all tokens: 262144 classes in float32 are 1 MB a token.

    Args:
        model: as `a` of `qk.compare`.
        inputs: as in `qk.compare`.
        folder: is made if it is not there; outputs that it holds for other inputs stay.

    Returns:
        What stands for the model in `qk.compare(..., layers=False)`, on the same inputs, also in another process.

    Raises:
        TypeError, ValueError: as `qk.compare`.

    Example:
        >>> import tempfile
        >>> a, b, inputs = nn.Linear(64, 8), nn.Linear(64, 8), [torch.randn(5, 64)]
        >>> from qkernels.diagnostics.recorded import record_outputs
        >>> recorded = record_outputs(a, inputs, tempfile.mkdtemp())
        >>> bool((qk.compare(recorded, b, inputs, layers=False).kl == qk.compare(a, b, inputs).kl).all())
        True
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with evaluating(model):
        for kwargs in keyword_arguments(inputs):
            found = output_of(model, kwargs, "a")
            path = _path(folder, tuple(kwargs.values()))
            scratch = path.with_suffix(".partial")
            tensors = {"logits" if found.predicts else "output": found.values.detach().cpu().contiguous()}
            save_file(tensors, scratch, {"causal": str(is_causal(model))})
            scratch.replace(path)
    return RecordedModel(folder)


def _path(folder: Path, inputs: tuple[Any, ...]) -> Path:
    """The file of the outputs for these inputs."""
    digest = hashlib.sha256()
    for value in inputs:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return folder / f"{digest.hexdigest()}.safetensors"
