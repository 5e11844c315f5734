"""`Launch`: one call of a Triton kernel as data, to be run, compiled ahead of time or executed by a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """What a kernel is configured for.

    Attributes:
        backend: "cuda" or "hip".
        capability: compute capability times ten (80, 89, 90, ...); 0 on HIP.
        processors: multiprocessors (compute units), each of which runs a few programs at a time.
        shared_bytes: shared memory that one program may use.
        tuned: tiles that were measured to be the fastest, by product (`tuning.tuned`), before those of `configs`.
    """

    backend: str
    capability: int
    processors: int
    shared_bytes: int
    tuned: Mapping[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    @cache
    def of(cls, device: torch.device) -> Target:
        """The target a GPU is, with what `qkernels tune` found for it, if that was kept."""
        from . import tuning

        found = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return cls("hip", 0, found.multi_processor_count, 64 * 1024, tuning.tuned(found.name))
        return cls(
            "cuda",
            10 * found.major + found.minor,
            found.multi_processor_count,
            getattr(found, "shared_memory_per_block_optin", 99 * 1024),
            tuning.tuned(found.name),
        )


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, and its arguments in the order of its signature.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs along each axis.
        args: tensors, integers and None, for the parameters that are no `tl.constexpr`.
        constants: the `tl.constexpr` parameters by name.
        num_warps, num_stages: as triton takes them.
        reason: why these constants.
        product: what the tiles were chosen for (`configs.Product`), if it is a matrix product.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Tensor | int | None, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    reason: str
    product: Any = None

    def runtime_arguments(self) -> list[tuple[Any, Tensor | int | None]]:
        """triton's description of each parameter that is no constant, with its argument."""
        parameters = [parameter for parameter in self.kernel.params if parameter.name not in self.constants]
        return list(zip(parameters, self.args, strict=True))

    def run(self) -> None:
        """Launch on the device of the tensors, in its current stream. An empty grid launches nothing.

        Products and sums must be rounded separately (docs/numerics.md), so their fusion is off.
        """
        if 0 in self.grid:
            return
        self.kernel[self.grid](
            *self.args,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            enable_fp_fusion=False,
        )


def run_all(launches: Sequence[Launch], device: torch.device) -> None:
    """Run the launches one after the other on `device`."""
    if device.type == "cpu":  # under Triton's interpreter
        for launch in launches:
            launch.run()
        return
    with torch.cuda.device(device):
        for launch in launches:
            launch.run()
