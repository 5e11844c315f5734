"""`CheckpointFormat`: what every format of checkpoints is, and what it can hold."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

from .checkpoint import Checkpoint
from .losses import Losses

# Told after each tensor: how many of how many are done, and the name of the last.
Progress = Callable[[int, int, str], None]


def no_progress(done: int, total: int, name: str) -> None:
    """Tell nobody."""


class Variant(NamedTuple):
    """A row of the table of formats in the guide: a kind of weight that a format can hold.

    Attributes:
        what: such as "4 bits, symmetric".
        scheme: the schemes of its weights, such as "w4a16-gN".
        imported, exported: "exact", "with a report" (`on_loss="report"`), "requantized" (`on_loss="requantize"`) or
            "no".
        note: when it is otherwise.
    """

    what: str
    scheme: str
    imported: str
    exported: str
    note: str = ""


class CheckpointFormat(ABC):
    """A format of checkpoints.

    Attributes:
        name: by which `--to` names it.
        title: by which people know it.
        variants: what it can hold.
        targets: what may follow its name in `--to NAME:TARGET`, such as "q4_0"; empty: nothing.
        act_group_size: of the int8 activations that its engines multiply weights with where the file says nothing of
            them; None: one scale a token.
        holds_activations: a file says how activations are quantized; else it holds weights alone.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    variants: ClassVar[tuple[Variant, ...]]
    targets: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[bool] = True
    act_group_size: ClassVar[int | None] = None
    holds_activations: ClassVar[bool] = False

    def warn_of_activations(self, checkpoint: Checkpoint) -> None:
        """Warn if layers of the checkpoint multiply int8 activations, of which the format has no word."""
        names = [name for name, layer in checkpoint.layers.items() if layer.scheme.int_activations]
        if names and not self.holds_activations:
            warnings.warn(
                f"{self.title} says nothing of int8 activations, which {len(names)} layers have, such as {names[0]} "
                f"({checkpoint.layers[names[0]].scheme}): who loads it leaves them in float, or quantizes them its way",
                stacklevel=3,
            )

    @abstractmethod
    def detects(self, path: Path) -> bool:
        """Whether the file or folder has this format; it reads no more than headers.

        Raises:
            ValueError: if it is of this format, and broken.
        """

    @abstractmethod
    def open(self, path: Path, losses: Losses) -> Checkpoint:
        """What there is to read at `path`.

        Raises:
            ValueError: naming the tensor, for what the format does not allow or this reader does not know.
            LossError: for what the canonical storage cannot hold, by the policy of `losses`.
        """

    def write(
        self,
        checkpoint: Checkpoint,
        path: Path,
        losses: Losses,
        target: str | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Write the checkpoint to `path`, whole or not at all.

        A folder that was not finished, because the process was killed, or the disk full, lies in `.NAME.partial` beside
        it. The same call goes on from there if the checkpoint has an `identity`.

        Raises:
            ValueError: for a layer or model that the format has no place for; nothing is written.
            LossError: for what it cannot hold exactly, by the policy of `losses`.
        """
        raise ValueError(f"{self.title} is read, but not written")
