"""Experts of transformers whose modules are not those of its `use_experts_implementation`: how each computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats.scheme import QuantScheme
from .adapters import LayerAdapter, SplitLayer, find_adapter, find_composite, register_adapter
from .experts import ExpertsAdapter, Routing, weighted_sum
from .grouped_linear import GroupedLinear, QuantGroupedLinear
from .storage import Storage


def _equal_parts(experts: int, rows: int, device: torch.device) -> Tensor:
    """The offsets of experts that have as many rows each: int64 [E]."""
    return torch.arange(1, experts + 1, device=device) * rows


class _QuantLlama4Experts(SplitLayer):
    """Llama 4's experts, each of which multiplies all tokens: the rows come sorted by expert, as many for each."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        offsets = _equal_parts(self.num_experts, hidden_states.shape[0] // self.num_experts, hidden_states.device)
        gate, up = self.gate_up_proj(hidden_states, offsets).chunk(2, dim=-1)
        return self.down_proj(up * self.act_fn(gate), offsets)


class _QuantDbrxExperts(SplitLayer):
    """DBRX's experts, whose three matrices are those of a module below the one that is called."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        batch, x = hidden_states.shape[0], hidden_states.reshape(-1, self.hidden_size)
        routing = Routing.of(top_k_index, self.num_experts)
        gate, up = (linear(x, routing.offsets, routing.tokens) for linear in (self.w1, self.v1))
        states = self.w2(self.mlp.activation_fn(gate) * up, routing.offsets)
        return weighted_sum(states, top_k_weights, routing).to(x.dtype).view(batch, -1, self.hidden_size)


class _QuantLongcatExperts(SplitLayer):
    """LongCat's experts, of which the last ones hand on what they get, and have no matrices for it."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routing = Routing.of(top_k_index, self.num_routed_experts)
        kept = F.pad(routing.offsets, (0, self.zero_expert_num)).clamp(min=routing.offsets[-1])
        gate, up = self.gate_up_proj(hidden_states, kept, routing.tokens).chunk(2, dim=-1)
        states = self.down_proj(self.act_fn(gate) * up, routing.offsets)
        handed_on = torch.arange(len(states), device=states.device) >= routing.offsets[-1]
        states = torch.where(handed_on.unsqueeze(-1), hidden_states[routing.tokens], states)
        return weighted_sum(states, top_k_weights, routing).to(hidden_states.dtype)


class _QuantInklingSharedExperts(SplitLayer):
    """Inkling's shared experts, each of which multiplies all tokens."""

    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:
        x, experts = hidden_states.reshape(-1, hidden_states.shape[-1]), self.n_shared_experts
        offsets = _equal_parts(experts, x.shape[0], x.device)
        rows = torch.arange(x.shape[0], device=x.device).repeat(experts)
        gammas = gammas.reshape(-1, experts).t().reshape(-1, 1)
        gate, up = (linear(x, offsets, rows) for linear in (self.gate_proj, self.up_proj))
        states = self.down_proj(self.act_fn(gate) * up * gammas, offsets)
        return states.view(experts, *x.shape).float().sum(dim=0).to(x.dtype).view(hidden_states.shape)


class QuantParallelExperts(QuantGroupedLinear):
    """JetMoE's `ParallelExperts`: `forward(inputs, expert_size)`, the numbers of rows of each expert as a list."""

    def forward(self, inputs: Tensor, expert_size: list[int] | Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(inputs, torch.as_tensor(expert_size, device=inputs.device).cumsum(0))


class _ParallelExpertsAdapter(LayerAdapter[Any]):
    """The adapter of JetMoE's `ParallelExperts`, of one weight [E, N, K]."""

    measured, static_activations = False, True

    def _grouped(self, layer: Any) -> GroupedLinear:
        return GroupedLinear(layer.weight, None, layer.num_experts).train(layer.training)

    def quantize(self, layer: Any, scheme: str | QuantScheme, **layer_options: Any) -> Storage:
        return QuantParallelExperts.from_float(self._grouped(layer), scheme, **layer_options)

    def empty(
        self, layer: Any, scheme: str | QuantScheme, *, dtype: torch.dtype | None = None, **layer_options: str
    ) -> Storage:
        experts, out_features, in_features = self.shape(layer)
        dtype = dtype or self.dtype(layer)
        return QuantParallelExperts(
            experts, in_features, out_features, False, scheme, device="meta", dtype=dtype, **layer_options
        )

    def to_float(self, quantized: Storage, weight: nn.Parameter, float_type: type[nn.Module]) -> nn.Module:
        layer: Any = float_type.__new__(float_type)
        nn.Module.__init__(layer)
        layer.register_parameter("weight", weight)
        layer.num_experts, layer.output_size, layer.input_size = weight.shape
        return layer.train(quantized.training)


def has_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of a mixture, or their matrices, in float or quantized."""
    layer_type = module.float_type if isinstance(module, SplitLayer) else type(module)
    known = (find_composite(layer_type), find_adapter(module))
    return isinstance(module, QuantGroupedLinear) or any(isinstance(adapter, _OF_EXPERTS) for adapter in known)


_OF_EXPERTS = (ExpertsAdapter, _ParallelExpertsAdapter)


def _register() -> None:
    models = "transformers.models"
    register_adapter(f"{models}.step3p7.modeling_step3p7.Step3p7Experts", ExpertsAdapter())
    register_adapter(
        f"{models}.llama4.modeling_llama4.Llama4TextExperts",
        ExpertsAdapter(_QuantLlama4Experts, transposed=("gate_up_proj", "down_proj")),
    )
    register_adapter(
        f"{models}.dbrx.modeling_dbrx.DbrxExperts",
        ExpertsAdapter(_QuantDbrxExperts, ("w1", "v1", "w2"), transposed=("w2",), below="mlp"),
    )
    register_adapter(
        f"{models}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts", ExpertsAdapter(_QuantLongcatExperts)
    )
    register_adapter(
        f"{models}.inkling.modeling_inkling.InklingSharedExperts",
        ExpertsAdapter(_QuantInklingSharedExperts, ("gate_proj", "up_proj", "down_proj")),
    )
    register_adapter(f"{models}.jetmoe.modeling_jetmoe.JetMoeParallelExperts", _ParallelExpertsAdapter())


_register()
