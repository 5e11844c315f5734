"""`QuantExperts`: the experts of a mixture, whose matrices are quantized, in the place of transformers' modules."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .adapters import CompositeAdapter, SplitLayer, register_matching, replaced_forward
from .grouped_linear import GroupedLinear


class Routing(NamedTuple):
    """The M = T * k pairs of a token and an expert that it chose, sorted by expert.

    Attributes:
        pairs: int64 [M], which of the pairs (token * k + choice) stands at each place.
        tokens: int64 [M], the token of each.
        offsets: int64 [E], where the pairs of each expert end; what is past the last one belongs to no expert here.
    """

    pairs: Tensor
    tokens: Tensor
    offsets: Tensor

    @staticmethod
    def of(top_k_index: Tensor, num_experts: int) -> Routing:
        """Sort the choices of T tokens: integers [T, k]; ids of `num_experts` and more belong to no expert here."""
        ids, pairs = torch.sort(top_k_index.reshape(-1), stable=True)
        experts = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
        return Routing(pairs, pairs // top_k_index.shape[-1], torch.searchsorted(ids, experts, right=True))


class QuantExperts(SplitLayer):
    """The experts of a mixture: transformers' module of fused experts, with each of its matrices a layer of its own.

    `gate_up_proj` (or `up_proj`, of experts without a gate) and `down_proj` are `QuantGroupedLinear`, or a
    `GroupedLinear` where it was left in float. Everything else is the model's own: its activation, how the gate is
    applied, a norm behind the experts, and the router, which is another module. A token is quantized once, however many
    experts it chose. The result is summed over the experts of a token in the order of its choices, as transformers'
    `grouped_mm` does, whatever `experts_implementation` is set to.

    Shape: `forward(hidden_states, top_k_index, top_k_weights)` takes float [T, H], integers [T, k] and float [T, k],
    and returns [T, H] of the dtype of the hidden states. Tokens may choose experts of other processes, whose ids are E
    and more: they add 0.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gated = getattr(self, "has_gate", True)
        routing = Routing.of(top_k_index, self.num_experts)
        into = self.gate_up_proj if gated else self.up_proj
        states = into(hidden_states, routing.offsets, routing.tokens)
        float_type: Any = self.float_type
        states = float_type._apply_gate(self, states) if gated else self.act_fn(states)
        states = self.down_proj(states, routing.offsets)
        if getattr(self, "has_post_expert_norm", False):
            states = self.post_expert_norm(states)
        return weighted_sum(states, top_k_weights, routing).to(hidden_states.dtype)


def weighted_sum(states: Tensor, top_k_weights: Tensor, routing: Routing) -> Tensor:
    """[T, H]: the outputs [M, H] of the experts, sorted by expert, weighted and summed over the k of each token."""
    weighted = states * top_k_weights.reshape(-1)[routing.pairs].unsqueeze(-1)
    places = torch.empty_like(routing.pairs)
    places[routing.pairs] = torch.arange(places.shape[0], device=places.device)
    return weighted[places].view(*top_k_weights.shape, states.shape[-1]).sum(dim=1)


class ExpertsAdapter(CompositeAdapter[Any]):
    """The adapter of fused experts: how their parameters are named, held, and multiplied.

    Args:
        twin: the class that computes what the experts do.
        matrices: names of the parameters that hold the matrices; those that a module lacks are passed over.
        transposed: names of those whose matrices are held as [K, N]; None: all, if the module `is_transposed`.
        below: name of the submodule that has the parameters; "": the module itself.
    """

    def __init__(
        self,
        twin: type[SplitLayer] = QuantExperts,
        matrices: tuple[str, ...] = ("gate_up_proj", "up_proj", "down_proj"),
        transposed: tuple[str, ...] | None = None,
        below: str = "",
    ) -> None:
        self.twin, self.matrices, self.transposed, self.below = twin, matrices, transposed, below

    def reason(self, layer: Any) -> str | None:
        owner = layer.get_submodule(self.below)
        if (reason := replaced_forward(layer)) is not None:
            return reason
        if parametrize.is_parametrized(owner):
            return "parametrized weight"
        names = {name for name in self.matrices if name in owner._parameters}
        rest = set(owner._parameters) - names - {f"{name}_bias" for name in names}
        if rest or not names or any(owner._parameters[name] is None for name in names):
            return f"fused experts: {type(layer).__name__} has other parameters than are known"
        return None

    def split(self, layer: Any) -> SplitLayer:
        owner, twin = layer.get_submodule(self.below), self.twin()
        for name, child in layer._modules.items():
            twin.register_module(name, child if name != self.below else _Shell(child))
        for name in self.matrices:
            weight = owner._parameters.get(name)
            if weight is not None:
                transposed = (
                    getattr(layer, "is_transposed", False) if self.transposed is None else name in self.transposed
                )
                experts = layer.num_experts if weight.dim() == 2 else weight.shape[0]
                bias = owner._parameters.get(f"{name}_bias")
                twin.register_module(name, GroupedLinear(weight, bias, experts, transposed=transposed))
        return twin

    def join(self, twin: SplitLayer, float_type: type[nn.Module]) -> nn.Module:
        layer: Any = float_type.__new__(float_type)
        nn.Module.__init__(layer)
        for name, child in twin._modules.items():
            if name not in self.matrices:
                layer.register_module(name, child.restored() if isinstance(child, _Shell) else child)
        owner = layer.get_submodule(self.below)
        for name in self.matrices:
            linear: Any = twin._modules.get(name)
            if linear is not None:
                owner.register_parameter(name, linear.weight)
                if linear.bias is not None:
                    owner.register_parameter(f"{name}_bias", linear.bias)
        return layer


class _Shell(nn.Module):
    """What is left of a submodule, its own submodules and attributes, when its matrices are layers elsewhere."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.float_type = type(module)
        self._modules.update(module._modules)
        vars(self).update({key: value for key, value in vars(module).items() if key not in vars(self)})

    def restored(self) -> nn.Module:
        """The submodule again, without its matrices."""
        module: nn.Module = self.float_type.__new__(self.float_type)
        nn.Module.__init__(module)
        module._modules.update(self._modules)
        vars(module).update({k: v for k, v in vars(self).items() if k not in vars(module) and k != "float_type"})
        return module


def is_fused_experts(layer_type: type[nn.Module]) -> bool:
    """True for the classes that transformers' `use_experts_implementation` decorates, in any library's model.

    The decorator promises that the class computes what its functions such as `grouped_mm` do. A subclass with a forward
    of its own does not.
    """
    code = getattr(layer_type.__dict__.get("forward", layer_type.forward), "__code__", None)
    return code is not None and "experts_interface" in code.co_freevars


register_matching(is_fused_experts, ExpertsAdapter())
