"""transformers: `num_parameters` counts the weights of quantized layers, not the tensors that hold them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from ..nn.adapters import adapter_of, is_frozen


def count_weights(num_parameters: Callable[..., int]) -> Callable[..., int]:
    """`PreTrainedModel.num_parameters`, for which a frozen weight [N, K] is N * K parameters, shared ones once."""

    @functools.wraps(num_parameters)
    def counted(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        total = num_parameters(self, only_trainable, exclude_embeddings)
        if only_trainable:  # which a frozen weight is not
            return total
        frozen = list(filter(is_frozen, self.modules()))
        looked_up = {id(module.qweight) for module in frozen if adapter_of(module).lookup}
        for module in {id(module.qweight): module for module in frozen}.values():
            total -= sum(tensor.numel() for tensor in module.quantized_weight() if tensor is not None)
            if not (exclude_embeddings and id(module.qweight) in looked_up):
                total += math.prod(module.weight_shape)
        return total

    return counted
