"""PEFT: adapters over quantized layers, with a merge that re-quantizes and says what that cost.

Nothing here is needed to train most methods: PEFT's own layers accept a `QuantLinear`, which is an `nn.Linear`, and
read its weight. What they would write to it goes through a float copy that is quantized again: a merge (`merging`),
and an initialization that takes a part out of the weight (`base_weight`, `lora`). The forward of PEFT's LoRA layer
converts activations to the adapters' dtype and back, so that its last dispatcher, the one for `nn.Linear`, is preceded
by one that puts `QuantLoraLinear` on a `QuantLinear`. What `modules_to_save` trains is a copy in float
(`whole_layers`). LoRA on the matrices of fused experts is in `experts`.
"""

from __future__ import annotations

from torch import nn

from ...convert.model import AFTER_QUANTIZE
from ...convert.report import QuantizationReport
from . import base_weight, experts, lora, merging, whole_layers
from .base_weight import QKernelsBackend
from .lora import QuantLoraLinear
from .merging import Requantizing, initialization_errors, merge_errors

__all__ = ["QKernelsBackend", "QuantLoraLinear", "Requantizing", "initialization_errors", "merge_errors"]


def _adopt(model: nn.Module, report: QuantizationReport) -> None:
    """After `quantize_`: PEFT layers that were there before get the merge of `Requantizing`."""
    merging.adopt_layers(model)


for _part in (base_weight, merging, lora, experts, whole_layers):
    _part.install()
AFTER_QUANTIZE.append(_adopt)
