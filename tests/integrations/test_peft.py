"""PEFT: LoRA over quantized layers trains, saves, loads, switches off, and merges without losing the adapter."""

import copy

import peft
import pytest
import torch
import transformers
from helpers import assert_same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import qkernels as qk
from qkernels.integrations.peft import QuantLoraLinear, merge_errors

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SCHEMES = ["w8a8", "w4a8-g32-asym", "w4a8-g32-min"]
IDS = torch.arange(3, 19).reshape(2, 8)
ROUNDS = "ignore:merging into a quantized layer rounds"


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **sizes)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_embd=48, n_head=4, n_positions=64, vocab_size=96, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def quantized(make=llama, scheme="w8a8"):
    model = make()
    qk.quantize_(model, scheme)
    return model


def with_lora(model, targets="all-linear", **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options))


def with_effect(model):
    """Give the adapter's B, zero at first, values that change the output."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def storage(model):
    """Copies of everything the quantized layers store, by parameter name."""
    return {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{key}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, qk.QuantLinear)
        for key, tensor in module.state_dict().items()
    }


def assert_same_storage(actual, expected):
    assert actual.keys() == expected.keys() != set()
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


def train(model, steps=6):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize(
    ("make", "targets", "layers"),
    [
        (llama, "all-linear", 14),
        (llama, ["q_proj", "v_proj"], 4),
        (gpt2, "all-linear", 8),
        (gpt2, ["c_attn"], 2),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_lowers_the_loss_and_leaves_the_base_alone(make, targets, layers, scheme):
    base = quantized(make, scheme)
    before, expected = storage(base), logits(base)
    model = with_lora(base, targets)
    assert sum(isinstance(module, QuantLoraLinear) for module in model.modules()) == layers
    assert_same_bits(logits(model), expected)  # B is zero at first
    losses = train(model)
    assert losses[-1] < losses[0] - 0.02
    assert_same_storage(storage(model), before)
    with model.disable_adapter():
        assert_same_bits(logits(model), expected)
    assert not torch.equal(logits(model), expected)


def test_saved_adapter_gives_the_same_bits_on_a_fresh_base(tmp_path):
    model = with_lora(quantized())
    train(model, steps=3)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000
    again = PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
    assert_same_bits(logits(again), logits(model))
    llama().save_pretrained(tmp_path / "base")
    config = qk.QKernelsConfig("w8a8")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    base.load_adapter(tmp_path / "adapter")  # transformers' own door to PEFT
    assert_same_bits(logits(base), logits(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = with_effect(with_lora(quantized(), lora_dropout=0.1))

    def gradients():
        torch.manual_seed(3)
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = gradients()
    assert len(actual) == 28
    for name, gradient in expected.items():
        assert_same_bits(actual[name], gradient, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_trains_a_float32_adapter(dtype):
    model = with_lora(quantized().to(dtype))
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.02
    assert logits(model).dtype == dtype


def test_preparation_for_low_bit_training_keeps_the_quantized_weights():
    model = quantized(gpt2).to(torch.bfloat16)
    before = storage(model)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    after = storage(model)
    for name, tensor in before.items():
        assert_same_bits(after[name].to(tensor.dtype), tensor, name)
    losses = train(with_lora(model))
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings(ROUNDS)
def test_merge_requantizes_the_sum_and_unmerge_restores_every_bit(scheme):
    model = with_effect(with_lora(quantized(scheme=scheme)))
    before, separate = storage(model), logits(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    target = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    model.merge_adapter()
    reference = qk.quantize_weight(target, scheme)
    assert_same_bits(layer.base_layer.qweight, reference.qweight)
    assert_same_bits(layer.base_layer.scales, reference.scales)
    merged = logits(model)
    error = (merged - separate).norm() / separate.norm()
    assert 0 < error < (0.03 if scheme == "w8a8" else 0.3)
    errors = merge_errors(model)
    assert len(errors) == 14 and all(0 < value < (0.02 if scheme == "w8a8" else 0.2) for value in errors.values())
    relative = (layer.base_layer.dequantize() - target).norm() / target.norm()
    assert errors["base_model.model.model.layers.0.mlp.up_proj"] == pytest.approx(relative.item(), rel=1e-3)
    model.unmerge_adapter()
    assert_same_storage(storage(model), before)
    assert_same_bits(logits(model), separate)
    assert merge_errors(model) == {}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.filterwarnings(ROUNDS)
def test_merge_and_unload_keeps_the_adapter_and_can_be_saved(make, safe, tmp_path):
    base = quantized(make)
    expected = logits(base)
    model = with_effect(with_lora(base))
    separate = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is type(base)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert (logits(merged) - separate).norm() < 0.05 * (separate - expected).norm()
    assert len(merge_errors(merged)) == (14 if make is llama else 8)
    merged.save_pretrained(tmp_path)
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_merge_warns_that_it_rounds():
    model = with_effect(with_lora(quantized(), ["q_proj"]))
    with pytest.warns(UserWarning, match=r"rounds the merged weight; .*merge_errors\(model\)"):
        model.merge_adapter()


@pytest.mark.filterwarnings(ROUNDS, "ignore:Already following adapters were merged")
def test_two_adapters_are_rounded_once():
    model = with_effect(with_lora(quantized(), ["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with_effect(model)
    before = storage(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    weight = layer.base_layer.dequantize()
    target = weight + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert_same_bits(layer.base_layer.qweight, qk.quantize_weight(target, "w8a8").qweight)
    assert layer.merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert_same_storage(storage(model), before)


@pytest.mark.filterwarnings(ROUNDS)
def test_disabled_adapter_after_a_merge_is_the_base():
    base = quantized()
    expected = logits(base)
    model = with_effect(with_lora(base))
    model.merge_adapter()
    with model.disable_adapter():
        assert_same_bits(logits(model), expected)


@pytest.mark.filterwarnings(ROUNDS)
def test_adapter_with_a_bias_is_merged_into_the_bias():
    model = with_effect(with_lora(quantized(gpt2), ["c_attn"], lora_bias=True))
    before, separate = storage(model), logits(model)
    model.merge_adapter()
    assert (logits(model) - separate).norm() < 0.03 * separate.norm()
    model.unmerge_adapter()
    assert_same_storage(storage(model), before)
    model = with_effect(with_lora(quantized(), ["q_proj"], lora_bias=True))
    before = storage(model)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        model.merge_adapter()
    assert_same_storage(storage(model), before)


@pytest.mark.parametrize("safe", [True, False])
def test_merge_of_a_broken_adapter_is_refused_and_changes_nothing(safe):
    model = with_effect(with_lora(quantized(), ["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    before = storage(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: merging \['default'\] gives NaN or Inf"):
        model.merge_adapter(safe_merge=safe)
    assert not layer.merged
    assert_same_storage(storage(model), before)


def test_gaussian_initialization_and_rank_stabilization_work():
    losses = train(with_lora(quantized(), init_lora_weights="gaussian", use_rslora=True))
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.filterwarnings(ROUNDS)
def test_model_with_adapters_can_be_quantized_afterwards():
    model = with_effect(with_lora(llama()))
    separate = logits(model)
    report = qk.quantize_(model, "w8a8")
    adapters = [row for row in report.rows if "lora_" in row.name]
    assert len(adapters) == 28 and all(row.reason == "adapter of a PEFT layer" for row in adapters)
    assert len(report.quantized) == 15
    assert (logits(model) - separate).norm() < 0.05 * separate.norm()
    before = storage(model)
    losses = train(copy.deepcopy(model))
    assert losses[-1] < losses[0] - 0.02
    separate = logits(model)
    model.merge_adapter()
    assert (logits(model) - separate).norm() < 0.03 * separate.norm()
    model.unmerge_adapter()
    assert_same_storage(storage(model), before)


def test_merged_layers_are_not_quantized_underneath():
    model = with_effect(with_lora(llama(), ["q_proj"]))
    model.merge_adapter()
    reasons = {row.name: row.reason for row in qk.quantize_(model, "w8a8").left}
    assert reasons["base_model.model.model.layers.0.self_attn.q_proj.base_layer"] == "holds a merged PEFT adapter"


@pytest.mark.filterwarnings("error:the quantized layers")
def test_a_model_with_dora_can_be_quantized_afterwards():
    model = with_effect(with_lora(llama(), use_dora=True))
    separate = logits(model)
    assert len(qk.quantize_(model, "w8a8").quantized) == 15
    assert (logits(model) - separate).norm() < 0.05 * separate.norm()
    losses = train(model)
    assert losses[-1] < losses[0] - 0.02


def test_float_layers_get_the_lora_layer_of_peft():
    base = llama()
    qk.quantize_(base, "w8a8", skip=["*.layers.0.*"])
    model = with_effect(with_lora(base))
    float_layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert type(float_layer) is peft.tuners.lora.Linear
    assert type(model.base_model.model.model.layers[1].mlp.up_proj) is QuantLoraLinear
    plain = with_effect(with_lora(llama()))
    separate = logits(plain)
    plain.merge_adapter()
    assert (logits(plain) - separate).norm() < 1e-4 * separate.norm()


class TestForward:
    """Adapters are multiplied in the dtype of the activations; what that computes is what PEFT's own layer does."""

    def layer(self, dtype=torch.float32, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 40, dtype=dtype))
        model.config = {}
        qk.quantize_(model, "w8a8")
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], **options))
        (layer,) = (module for module in model.modules() if isinstance(module, QuantLoraLinear))
        with_effect(layer)
        return layer

    def gradients(self, forward, layer, x):
        x = x.detach().requires_grad_()
        out = forward(layer, x)
        parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        torch.manual_seed(2)
        return [out, *torch.autograd.grad(out, [x, *parameters], torch.randn_like(out))]

    @pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,), (0, 48)])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
    def test_equals_the_layer_of_peft(self, dtype, tolerance, shape):
        layer, x = self.layer(dtype), torch.randn(shape).to(dtype)
        for own, theirs in zip(
            self.gradients(QuantLoraLinear.forward, layer, x), self.gradients(LoraLinear.forward, layer, x), strict=True
        ):
            assert own.dtype == theirs.dtype and own.shape == theirs.shape
            assert (own - theirs).norm() <= tolerance * theirs.norm()

    def test_activations_keep_their_dtype(self):
        layer, seen = self.layer(torch.bfloat16), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            layer(torch.randn(64, 48).bfloat16().requires_grad_())
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert not [t for t in seen if t.dtype == torch.float32 and 64 in t.shape]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_saves_the_input_and_its_product_only(self, dtype):
        """docs/gradients.md; the input is the same tensor for all layers that share it."""
        layer, x, saved = self.layer(dtype), torch.randn(64, 48).to(dtype).requires_grad_(), []
        own = {t.data_ptr() for t in layer.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(x)
        assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 64 * (48 + 4) * dtype.itemsize
        assert any(t.data_ptr() == x.data_ptr() for t in saved)

    @pytest.mark.parametrize("watched", ["base_layer", "lora_A"])
    def test_hooks_are_called(self, watched):
        layer, x, calls = self.layer(), torch.randn(5, 48), []
        expected = layer(x)
        module = layer.base_layer if watched == "base_layer" else layer.lora_A["default"]
        module.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(LoraLinear.forward(layer, x), expected)
        layer(x)
        assert len(calls) == 2 if watched == "base_layer" else len(calls) == 1

    def test_int8_gradients_through_base_and_adapter(self):
        layer, x = self.layer(), torch.randn(70, 48)
        exact = self.gradients(QuantLoraLinear.forward, layer, x)
        layer.base_layer.grad_dtype = "int8"
        torch.manual_seed(4)
        draws = [self.gradients(QuantLoraLinear.forward, layer, x) for _ in range(2)]
        assert_same_bits(draws[0][0], exact[0])
        assert 0 < (draws[0][1] - exact[1]).norm() < 0.05 * exact[1].norm()
        for own, expected in zip(draws[0][2:], exact[2:], strict=True):
            assert_same_bits(own, expected)

    def test_autocast(self):
        layer, x = self.layer(), torch.randn(5, 48)
        with torch.autocast("cpu", torch.bfloat16):
            own, theirs = (self.gradients(kind.forward, layer, x) for kind in (QuantLoraLinear, LoraLinear))
        assert own[0].dtype == torch.bfloat16 and own[2].dtype == torch.float32
        for a, b in zip(own, theirs, strict=True):
            assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()

    @pytest.mark.parametrize("options", [{"lora_bias": True}, {"lora_dropout": 0.5}])
    def test_options(self, options):
        layer, x = self.layer(**options), torch.randn(5, 48)
        if "lora_bias" in options:
            nn.init.normal_(layer.lora_B["default"].bias)
        layer.train()
        results = []
        for kind in (QuantLoraLinear, LoraLinear):
            torch.manual_seed(3)
            results.append(kind.forward(layer, x))
        torch.testing.assert_close(*results)

    def test_float16_and_several_adapters(self):
        layer, x = self.layer(torch.float16), torch.randn(5, 48).half()
        assert_same_bits(layer(x), LoraLinear.forward(layer, x))
        layer = self.layer()
        layer.update_layer("second", 3, lora_alpha=6, config=LoraConfig(r=3))
        with_effect(layer)
        layer.set_adapter(["default", "second"])
        torch.testing.assert_close(layer(x.float()), LoraLinear.forward(layer, x.float()))
        names = ["default", "second", "__base__", "default", "second"]
        torch.testing.assert_close(
            layer(x.float(), adapter_names=names), LoraLinear.forward(layer, x.float(), adapter_names=names)
        )
