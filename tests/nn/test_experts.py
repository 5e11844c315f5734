"""`QuantExperts`: the experts of transformers' mixtures compute what un-fused linear layers would."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from helpers import assert_same_bits
from torch import nn
from torch.nn import functional as F
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import qkernels as qk
from qkernels.nn.adapters import _ADAPTERS, find_composite
from qkernels.nn.experts import Routing

H, I, E, TOKENS, TOP = 64, 32, 4, 9, 2  # noqa: E741
CONFIGS = {
    MixtralExperts: T.MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E),
    GptOssExperts: T.GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E),
    NemotronHExperts: T.NemotronHConfig(hidden_size=H, moe_intermediate_size=I, n_routed_experts=E),
    Llama4TextExperts: T.Llama4TextConfig(hidden_size=H, intermediate_size=I, num_local_experts=E),
}


class Block(nn.Module):
    """What holds the experts in a model."""

    def __init__(self, kind=MixtralExperts):
        super().__init__()
        torch.manual_seed(0)
        config = CONFIGS[kind]
        config._experts_implementation = "eager"
        self.experts = kind(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=H**-0.5)

    def forward(self, *args):
        return self.experts(*args)


def routing_of(tokens=TOKENS, top=TOP, experts=E):
    torch.manual_seed(1)
    chosen = (
        torch.stack([torch.randperm(experts)[:top] for _ in range(tokens)]) if tokens else torch.empty(0, top).long()
    )
    return torch.randn(tokens, H), chosen, torch.rand(tokens, top)


def quantized(block, scheme="w8a8", mode="frozen", **options):
    block = copy.deepcopy(block)
    qk.quantize_(block, scheme, mode, strict=True, **options)
    assert isinstance(block.experts, qk.QuantExperts)
    return block


def linears(block, name, scheme):
    """A `QuantLinear` for each expert's matrix of a parameter [E, N, K] or, transposed, [E, K, N]."""
    layers, experts = [], block.experts
    for expert, matrix in enumerate(getattr(experts, name).detach()):
        matrix = matrix.t().contiguous() if getattr(experts, "is_transposed", False) else matrix
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=hasattr(experts, f"{name}_bias"))
        linear.weight = nn.Parameter(matrix)
        if linear.bias is not None:
            linear.bias = nn.Parameter(getattr(experts, f"{name}_bias")[expert].detach())
        layers.append(qk.QuantLinear.from_float(linear, scheme))
    return layers


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w4a8-g32-asym", "w4a8-ag32"])
@pytest.mark.parametrize("kind", [MixtralExperts, GptOssExperts, NemotronHExperts])
def test_bits_of_linear_layers_that_are_not_fused(kind, scheme):
    block, (x, chosen, weights) = Block(kind), routing_of()
    into = "up_proj" if kind is NemotronHExperts else "gate_up_proj"
    up, down = (linears(block, name, scheme) for name in (into, "down_proj"))
    rows = []
    for token in range(TOKENS):
        terms = []
        for choice in range(TOP):
            expert = chosen[token, choice]
            states = up[expert](x[token : token + 1])
            gated = kind is not NemotronHExperts
            states = block.experts._apply_gate(states) if gated else block.experts.act_fn(states)
            terms.append(down[expert](states)[0] * weights[token, choice])
        rows.append(torch.stack(terms).sum(dim=0))
    assert_same_bits(quantized(block, scheme)(x, chosen, weights), torch.stack(rows))


def test_bits_do_not_depend_on_the_implementation_that_is_set():
    block, args = Block(), routing_of()
    expected = quantized(block)(*args)
    for name in ("grouped_mm", "batched_mm", "eager"):
        block.experts.config._experts_implementation = name
        assert_same_bits(quantized(block)(*args), expected)


@pytest.mark.parametrize("kind", [MixtralExperts, GptOssExperts, NemotronHExperts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_near_those_of_the_float_experts(kind, dtype):
    block, (x, chosen, weights) = Block(kind).to(dtype), routing_of()
    results = []
    for module in (block, quantized(block)):
        own = [t.to(dtype).requires_grad_() for t in (x, weights)]
        out = module(own[0], chosen, own[1])
        out.backward(torch.ones_like(out))
        assert out.dtype == dtype and own[0].grad.dtype == dtype
        results.append([out.detach(), own[0].grad, own[1].grad])
    for ours, floats in zip(results[1], results[0], strict=True):
        assert (ours - floats).norm() < 0.03 * floats.norm()


@pytest.mark.parametrize("scheme, mode, options", [
    ("w4a8-g32", "qat", {}), ("w4a8-g32", "qat", {"weight_scale": "learned"}), ("w8a8", "int8", {}),
    ("w8a8", "qat", {"grad_dtype": "int8"}), ("w8a8", "int8", {"grad_dtype": "int8"}),
])  # fmt: skip
def test_training_steps(scheme, mode, options):
    block, args = quantized(Block(), scheme, mode, **options), routing_of()
    target = torch.randn(TOKENS, H)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = F.mse_loss(block(*args), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    before = block(*args)
    assert_same_bits(qk.freeze_(block)(*args), before)


def test_ids_of_other_processes_add_nothing():
    block, (x, chosen, weights) = quantized(Block()), routing_of()
    only_first = chosen.clone()
    only_first[:, 1] = E
    expected = block(x, chosen[:, :1], weights[:, :1])
    assert_same_bits(block(x, only_first, weights), expected)
    gradient = torch.autograd.grad(block(x.requires_grad_(), only_first, weights).sum(), x)[0]
    assert_same_bits(gradient, torch.autograd.grad(block(x, chosen[:, :1], weights[:, :1]).sum(), x)[0])
    assert not block(x, torch.full_like(chosen, E), weights).any()


def test_no_tokens_and_one_expert_that_takes_all():
    block, float_block = quantized(Block()), Block()
    assert block(*routing_of(tokens=0)).shape == (0, H)
    x, chosen, weights = routing_of()
    chosen = torch.full_like(chosen[:, :1], 2)
    out, expected = block(x, chosen, weights[:, :1]), float_block(x, chosen, weights[:, :1])
    assert (out - expected).norm() < 0.03 * expected.norm()


def test_sorting_by_expert():
    routing = Routing.of(torch.tensor([[2, 0], [5, 2], [0, 1]]), 3)
    assert routing.pairs.tolist() == [1, 4, 5, 0, 3, 2]
    assert routing.tokens.tolist() == [0, 2, 2, 0, 1, 1] and routing.offsets.tolist() == [2, 3, 5]


def test_a_matrix_that_stays_in_float_is_multiplied_in_float():
    block, args = Block(), routing_of()
    half, expected = quantized(block, skip=["down_proj"]), block(*args)
    assert half.experts.down_proj.weight is not None and isinstance(half.experts.gate_up_proj, qk.QuantGroupedLinear)
    whole = quantized(block)
    error, more = ((module(*args) - expected).norm() for module in (half, whole))
    assert 0 < error < more
    assert half.experts.down_proj.weight.requires_grad


def test_a_norm_behind_the_experts_is_kept():
    text = T.AutoConfig.for_model("muse_spark").get_text_config()
    text.moe_hidden_size, text.moe_intermediate_size, text.num_local_experts = H, I, E
    CONFIGS[MuseSparkExperts] = text
    block, args = Block(MuseSparkExperts), routing_of()
    expected, out = block(*args), quantized(block)(*args)
    assert (out - expected).norm() < 0.05 * expected.norm()


def test_llama4_multiplies_all_tokens_by_each_expert():
    block, x = Block(Llama4TextExperts), torch.randn(E * 5, H)
    expected = block(x)
    qk.quantize_(block, "w8a8", strict=True)
    assert (block(x) - expected).norm() < 0.03 * expected.norm()
    assert block.experts.gate_up_proj.qweight.shape == (E, 2 * I, H)
    qk.dequantize_(block)
    assert block.experts.gate_up_proj.shape == (E, H, 2 * I) and type(block.experts) is Llama4TextExperts


def test_checkpointing_and_compilation():
    block, (x, chosen, weights) = quantized(Block()), routing_of()
    expected = block(x, chosen, weights)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(block(x, chosen, weights).sum(), x)
    checkpoint = torch.utils.checkpoint.checkpoint(block, x, chosen, weights, use_reentrant=False)
    assert_same_bits(torch.autograd.grad(checkpoint.sum(), x)[0], wanted)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x.detach(), chosen, weights), expected)
    assert_same_bits(torch.autograd.grad(compiled(x, chosen, weights).sum(), x)[0], wanted)


def test_a_subclass_with_a_forward_of_its_own_stays_in_float():
    class Other(MixtralExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights) + 1

    class Same(MixtralExperts):
        pass

    assert find_composite(Same) is not None and find_composite(Other) is None
    block = Block()
    block.experts.extra = nn.Parameter(torch.randn(3, 3))
    report = qk.quantize_(nn.ModuleList([block, nn.Linear(H, H)]), "w8a8")
    reason = "fused experts: MixtralExperts has other parameters than are known"
    assert {row.reason for row in report.left} == {reason} and len(report.left) == 3


@pytest.mark.thorough
def test_every_class_of_transformers_that_holds_experts_is_known():
    """By the source of all models: a class of experts with matrices of its own is decorated, or has an adapter."""
    models, unknown, count = Path(T.__file__).parent / "models", [], 0
    for file in sorted(models.glob("*/modeling_*.py")):
        for decorators, name, body in re.findall(
            r"((?:^@.*\n)*)^class (\w*Expert\w*)\(.*\n((?:[ \t].*\n|\n)*)", file.read_text(), re.MULTILINE
        ):
            if "nn.Parameter(" not in body or name == "DbrxExpertGLU":  # the matrices of DbrxExperts
                continue
            count += 1
            full = f"transformers.models.{file.parent.name}.{file.stem}.{name}"
            if "@use_experts_implementation" not in decorators and full not in _ADAPTERS:
                unknown.append(full)
    assert count > 50 and unknown == []
