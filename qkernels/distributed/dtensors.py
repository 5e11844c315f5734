"""What the layers ask about a DTensor. `torch.distributed.tensor`, which takes a second to import, is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    """True for a tensor that is shared out among processes."""
    return type(value).__name__ == "DTensor"


def with_local(whole: DTensor, local: Tensor, width: int | None = None) -> DTensor:
    """A DTensor that lies as `whole` does, of other local values.

    Args:
        whole: the pattern.
        local: this process's values.
        width: of the last dimension; None: as in `whole`.
    """
    from torch.distributed.tensor import DTensor

    shape = whole.shape if width is None else torch.Size((*whole.shape[:-1], width))
    stride = whole.stride() if width is None else torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, whole.device_mesh, whole.placements, run_check=False, shape=shape, stride=stride)
