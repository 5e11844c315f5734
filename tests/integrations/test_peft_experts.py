"""LoRA on fused experts under PEFT's `target_parameters`: names, values and gradients are those of the float model."""

import copy

import pytest
import torch
import transformers as T
from architectures import ARCHITECTURES, IDS
from helpers import assert_same_bits
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import qkernels as qk
from qkernels.integrations.peft import merge_errors

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = {
    "mixtral": ["experts.gate_up_proj", "experts.down_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],  # held transposed, and said so
    "llama4_text": ["experts.gate_up_proj", "experts.down_proj"],  # held transposed, which PEFT does not know
    "nemotron_h": ["experts.up_proj", "experts.down_proj"],
    "jetmoe": ["input_linear.weight", "output_linear.weight"],
}


def make(name):
    torch.manual_seed(0)
    kind, config, _ = ARCHITECTURES[name]
    model = kind(config()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def config_of(name="mixtral", **options):
    return LoraConfig(
        **{
            "target_parameters": TARGETS[name],
            "target_modules": ["q_proj"],
            "init_lora_weights": False,
            "r": 4,
            **options,
        }
    )


def adapted(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, config_of(**options))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def near(ours, floats, bound=0.05):
    return (ours - floats).norm() <= bound * floats.norm()


@pytest.mark.parametrize("name", TARGETS)
def test_names_values_and_gradients_are_those_of_the_float_model(name):
    quantized = make(name)
    qk.quantize_(quantized, "w8a16", skip=["lm_head"])
    model = qk.dequantize_(copy.deepcopy(quantized))
    floats, ours = adapted(model, name=name), adapted(quantized, name=name)
    states = [get_peft_model_state_dict(peft) for peft in (floats, ours)]
    assert states[0].keys() == states[1].keys() and any("lora_A" in key and "expert" in key for key in states[0])
    for key, tensor in states[0].items():
        assert_same_bits(states[1][key], tensor)
    with ours.disable_adapter():
        assert not near(logits(ours), logits(floats), 0.2)
    assert near(logits(ours), logits(floats), 1e-4)
    for peft in (floats, ours):
        peft(IDS, labels=IDS).loss.backward()
    gradients = [{n: p.grad for n, p in peft.named_parameters() if p.requires_grad} for peft in (floats, ours)]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert near(gradients[1][key], gradient, 1e-3), key


def test_training_and_adapters_that_go_from_one_model_to_the_other(tmp_path):
    model = make("mixtral")
    quantized = copy.deepcopy(model)
    qk.quantize_(quantized, "w4a8-g32")
    before = {key: tensor.clone() for key, tensor in quantized.state_dict().items()}
    ours = adapted(quantized, init_lora_weights=True)
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = ours(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    expected = logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    floats = PeftModel.from_pretrained(model, tmp_path / "ours")
    trained = get_peft_model_state_dict(ours)
    for key, tensor in get_peft_model_state_dict(floats).items():
        assert_same_bits(tensor, trained[key])
    floats.save_pretrained(tmp_path / "float")
    fresh = make("mixtral")
    qk.quantize_(fresh, "w4a8-g32")
    assert_same_bits(logits(PeftModel.from_pretrained(fresh, tmp_path / "float")), expected)
    base = ours.unload()
    for key, tensor in base.state_dict().items():
        assert_same_bits(tensor, before[key])


@pytest.mark.parametrize("name", TARGETS)
def test_merging_re_quantizes_and_can_be_undone(name):
    model = make(name)
    qk.quantize_(model, "w8a16", skip=["lm_head"])
    ours = adapted(model, name=name)
    state, expected = {key: tensor.clone() for key, tensor in ours.state_dict().items()}, logits(ours)
    ours.merge_adapter()
    merged = logits(ours)
    assert near(merged, expected, 0.1) and not torch.equal(merged, expected)
    errors = {key: error for key, error in merge_errors(ours).items() if "expert" in key or "linear" in key}
    assert errors and all(0 < error < 0.02 for error in errors.values())
    ours.unmerge_adapter()
    for key, tensor in ours.state_dict().items():
        assert_same_bits(tensor, state[key])
    assert not merge_errors(ours)
    assert_same_bits(logits(ours.merge_and_unload()), merged)


def test_a_merge_that_is_not_finite_changes_nothing():
    model = make("mixtral")
    qk.quantize_(model, "w8a8")
    ours = adapted(model, target_modules=[])
    state = {key: tensor.clone() for key, tensor in ours.state_dict().items() if "experts" in key and "lora" not in key}
    with torch.no_grad():
        next(p for n, p in ours.named_parameters() if "experts.base_layer.lora_B" in n).fill_(torch.inf)
    with pytest.raises(ValueError, match="merging gives NaN or Inf in expert 0; nothing was changed"):
        ours.merge_adapter()
    for key, tensor in state.items():
        assert_same_bits(ours.state_dict()[key], tensor)


def test_a_model_that_has_adapters_when_it_is_quantized():
    ours = adapted(make("mixtral"))
    expected = logits(ours)
    qk.quantize_(ours, "w8a16")
    assert isinstance(ours.get_base_model().model.layers[0].mlp.experts.get_base_layer(), qk.QuantExperts)
    assert near(logits(ours), expected)
    with pytest.raises(ValueError, match="has PEFT adapters"):
        qk.dequantize_(ours)
    qk.dequantize_(ours.unload())


def test_two_adapters():
    model = make("mixtral")
    qk.quantize_(model, "w8a16")
    ours = adapted(model)
    first = logits(ours)
    ours.add_adapter("other", config_of(r=2))
    assert_same_bits(logits(ours), first)
    ours.set_adapter("other")
    second = logits(ours)
    ours.base_model.set_adapter(["default", "other"])
    both = logits(ours)
    assert not torch.equal(first, second) and not torch.equal(both, first) and not torch.equal(both, second)


def test_target_modules_pass_over_experts_as_in_the_float_model():
    model = make("qwen2_moe")
    quantized = copy.deepcopy(model)
    qk.quantize_(quantized, "w8a8")
    options = {"target_parameters": None, "target_modules": ["q_proj", "down_proj"]}
    names = [set(get_peft_model_state_dict(adapted(m, **options))) for m in (model, quantized)]
    assert names[0] == names[1] and any("shared_expert.down_proj" in name for name in names[0])


def test_one_matrix_alone_and_one_that_is_in_float():
    model = make("mixtral")
    whole = copy.deepcopy(model)
    qk.quantize_(model, "w8a16", skip=["*.experts.down_proj"])
    for targets in (["experts.down_proj"], ["experts.gate_up_proj"]):
        options = {"target_parameters": targets, "target_modules": []}
        ours, floats = adapted(copy.deepcopy(model), **options), adapted(copy.deepcopy(whole), **options)
        assert get_peft_model_state_dict(ours).keys() == get_peft_model_state_dict(floats).keys()
        assert near(logits(ours), logits(floats))
        merged = logits(ours)
        ours.merge_adapter()
        assert near(logits(ours), merged)
        ours.unmerge_adapter()
        assert near(logits(ours), merged, 1e-5)


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_trained_modes_under_adapters(mode):
    model = make("mixtral")
    qk.quantize_(model, "w8a8", mode)
    ours = adapted(model)
    ours(IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in ours.named_parameters() if "experts" in n)
    if mode == "int8":
        with pytest.raises(ValueError, match='adapters cannot be merged into experts of mode "int8"'):
            ours.get_base_model().model.layers[0].mlp.experts.merge()
    else:
        expected = logits(ours)
        ours.merge_adapter()
        assert near(logits(ours), expected)


def test_initializations_that_read_the_float_weight_are_refused():
    model = make("mixtral")
    qk.quantize_(model, "w8a8")
    with pytest.raises(ValueError, match="for quantized experts, got 'pissa'"):
        adapted(model, init_lora_weights="pissa", target_modules=[])
