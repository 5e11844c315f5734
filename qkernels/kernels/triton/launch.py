"""`Launch`: one call of a Triton kernel as data, to be run, compiled ahead of time or executed by a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Arguments: TypeAlias = tuple[Tensor | int | None, ...]


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
        product: what the tiles were chosen for (`tiles.MatmulShape`), if it is a matrix product.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Arguments
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
