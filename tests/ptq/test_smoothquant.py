"""Smoothing: the float model computes the same, and int8 activations lose less."""

import copy

import pytest
import torch

import qkernels as qk
from qkernels.ptq.smoothquant import MODEL_TYPES

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip


def model_of(kind: str, dtype=torch.float32) -> torch.nn.Module:
    """A small decoder with random norms and biases, and outliers in some channels of every norm."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, attn_implementation="eager", pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("layernorm.weight"):
                parameter[::16] += 20
    return model.to(dtype)


def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(tokens(), use_cache=False).logits.double()


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_the_float_model_computes_the_same_by_default(kind):
    model = model_of(kind)
    expected = logits(model)
    qk.smooth_(model, [{"input_ids": tokens(), "use_cache": False}])
    assert (logits(model) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_the_float_model_computes_the_same_and_int8_loses_less(kind):
    model = model_of(kind).train()
    plain = copy.deepcopy(model).eval()
    names = qk.smooth_(model, [{"input_ids": tokens(), "use_cache": False}], alpha=0.5)
    assert len(names) == 2 * 7 and all(module.training for module in model.modules())
    model.eval()
    expected = logits(plain)
    layer = model.model.layers[1]
    for part in (layer.input_layernorm, layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
        name = next(name for name, module in model.named_modules() if module is part)
        assert not torch.equal(part.weight, plain.get_submodule(name).weight), name
    assert (logits(model) - expected).norm() < 1e-5 * expected.norm()
    errors = []
    for candidate in (plain, model):
        qk.quantize_(candidate, "w8a8", skip=["lm_head"])
        errors.append((logits(candidate) - expected).norm().item())
    assert errors[1] < 0.9 * errors[0]


def test_what_cannot_be_smoothed_is_refused_and_unchanged():
    model = model_of("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        qk.smooth_(model, [tokens()], alpha=2)
    with pytest.raises(ValueError, match="call smooth_ first, then prepare_"):
        qk.smooth_(qk.prepare_(copy.deepcopy(model)), [tokens()])
    with pytest.raises(ValueError, match=r"calibration must hold at least one batch"):
        qk.smooth_(model, [])
    with pytest.raises(ValueError, match=r"model type must be one of llama.*got Linear"):
        qk.smooth_(torch.nn.Linear(3, 3), [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    qk.quantize_(model, "w8a8", include=["down_proj"])
    with pytest.raises(ValueError, match=r"down_proj must be an nn.Linear, got QuantLinear"):
        qk.smooth_(model, [tokens()])
