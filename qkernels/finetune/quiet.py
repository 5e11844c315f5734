"""Keeps what other libraries say out of what this program says."""

from __future__ import annotations

import logging
import warnings


class _Chatter(logging.Filter):
    """Drops what transformers logs about configurations that no user of this program has written."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "loss_type=None" not in record.getMessage()


def keep_quiet() -> None:
    """Silence messages of other libraries on which a user of this program cannot act; ours are never filtered."""
    for message in (
        ".*fan_in_fan_out is set to",  # PEFT, for the Conv1D of GPT-2
        ".*'pin_memory' argument is set as true",
        ".*`?is_gradient_checkpointing`? is deprecated",
        ".*Could not find a config file in",  # PEFT, asking the hub for the base
    ):
        warnings.filterwarnings("ignore", message=message)
    # A deprecation between transformers and PEFT.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in ("transformers.modeling_utils", "transformers.configuration_utils"):
        logging.getLogger(name).addFilter(_Chatter())


def hide_bars() -> None:
    """Turn off the progress bars of transformers, which mix with ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
