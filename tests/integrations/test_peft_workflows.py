"""What users do with adapters besides training one: prepare, swap, mix, combine, initialize from the base."""

import copy
import os
import pickle

import peft
import pytest
import torch
import transformers
from helpers import assert_same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_matrix import IDS, Row, llama, logits, train
from torch import nn

import qkernels as qk
from qkernels.integrations.peft import initialization_errors, merge_errors

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")
BASES = pytest.mark.parametrize(("scheme", "mode"), [("w8a8", "frozen"), ("w4a8-g32", "frozen"), ("w8a8", "int8")])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def base(scheme="w8a8", mode="frozen", dtype=torch.float32, **options):
    model = llama(dtype=dtype)
    qk.quantize_(model, scheme, mode, **options)
    return model


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})


def with_effect(model):
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "hada" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def distance(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@BASES
def test_preparation_for_training(scheme, mode):
    model = peft.prepare_model_for_kbit_training(base(scheme, mode, torch.bfloat16))
    assert model.model.norm.weight.dtype == torch.float32 and model.model.embed_tokens.weight.dtype == torch.float32
    assert model.is_gradient_checkpointing and not hasattr(model, "is_loaded_in_8bit")
    model = get_peft_model(model, lora()).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@BASES
def test_hot_swap(scheme, mode, tmp_path):
    expected = {}
    for name, rank in (("first", 4), ("second", 8)):
        model = with_effect(get_peft_model(base(scheme, mode), lora(r=rank, lora_alpha=4 * rank)))
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model)
    model = PeftModel.from_pretrained(base(scheme, mode), tmp_path / "first")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(logits(model), expected["first"])
    hotswap_adapter(model, tmp_path / "second", adapter_name="default")
    torch.testing.assert_close(logits(model), expected["second"])


@BASES
def test_batch_of_several_adapters(scheme, mode):
    model = get_peft_model(base(scheme, mode), lora())
    model.add_adapter("second", lora(r=8))
    with_effect(model).eval()
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["second", "__base__"]).logits
    model.set_adapter("second")
    torch.testing.assert_close(mixed[0], logits(model)[0])
    assert_same_bits(mixed[1], logits(base(scheme, mode))[1])
    model.delete_adapter("second")
    assert_same_bits(logits(model.unload()), logits(base(scheme, mode)))


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "magnitude_prune"])
def test_weighted_adapters(kind):
    model = get_peft_model(base(), lora())
    model.add_adapter("second", lora())
    with_effect(model)
    density = {"density": 0.5} if kind in ("ties", "magnitude_prune") else {}
    model.add_weighted_adapter(["default", "second"], [0.5, 0.7], "both", combination_type=kind, **density)
    model.set_adapter("both")
    separate = logits(model)
    assert distance(separate, logits(base())) > 0.1
    model.merge_adapter()
    assert distance(logits(model), separate) < 0.05


@BASES
def test_two_methods_at_once(scheme, mode):
    """A layer of one method holds that of the other: both are merged into the same weight, rounded once."""
    model = get_peft_model(base(scheme, mode), lora(target_modules=["q_proj", "v_proj"]), mixed=True)
    model.add_adapter("second", peft.LoHaConfig(target_modules=["q_proj", "o_proj"], r=4))
    model.set_adapter(["default", "second"])
    separate = logits(with_effect(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    outer = model.base_model.model.model.layers[0].self_attn.q_proj
    inner, layer = outer.base_layer, outer.get_base_layer()
    weight = layer.dequantize()
    deltas = {part: part.get_delta_weight(part.active_adapters[at]) for at, part in ((1, outer), (0, inner))}
    model.merge_adapter()
    assert distance(logits(model), separate) < (0.05 if scheme == "w8a8" else 0.4)
    assert distance(layer.dequantize(), dequantized(weight + sum(deltas.values()), scheme)) < 1e-6  # another order
    outer.unmerge()
    assert distance(layer.dequantize(), dequantized(weight + deltas[inner], scheme)) < 1e-6
    model.unmerge_adapter()
    assert_same_bits(layer.dequantize(), weight)
    assert_same_bits(logits(model), separate)


def dequantized(weight, scheme):
    layer = qk.QuantLinear(*weight.shape[::-1], bias=False, scheme=scheme)
    layer.set_weight(qk.quantize_weight(weight.detach(), scheme))
    return layer.dequantize()


@BASES
def test_copies_of_a_merged_model_can_be_unmerged(scheme, mode):
    model = with_effect(get_peft_model(base(scheme, mode), lora()))
    separate = logits(model)
    model.merge_adapter()
    merged = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert_same_bits(logits(twin), merged)
        twin.unmerge_adapter()
        assert_same_bits(logits(twin), separate)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, None], ids=str)
def test_an_adapter_of_the_float_model_over_the_quantized_one(options, tmp_path):
    config = lora(**options) if options is not None else peft.HRAConfig(r=4, target_modules=TARGETS)
    model = get_peft_model(llama(), config)
    train(model, Row("", lambda: config))
    model.save_pretrained(tmp_path)
    assert distance(logits(model), logits(llama())) > 0.2
    assert distance(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model)) < 0.04


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_a_merge_into_a_mask_is_refused(mode):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(4, 32)
    nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    qk.quantize_(model, "w8a8", mode)
    model = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    separate = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"pruned layer of mode '\w+'.*freeze_\(model\) first; nothing"):
            merge()
    assert_same_bits(model(x), separate)
    qk.freeze_(model)
    assert distance(model.merge_and_unload()(x), separate) < 0.02


def test_x_lora(tmp_path):
    for name in ("first", "second"):
        with_effect(get_peft_model(base(), lora())).save_pretrained(tmp_path / name)
    model = base()
    model.config.use_cache = False
    adapters = {"0": str(tmp_path / "first"), "1": str(tmp_path / "second")}
    model = get_peft_model(model, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_fused_loss_over_adapters(options):
    model = with_effect(get_peft_model(base(), lora(**options))).train()
    expected = model(input_ids=IDS, labels=IDS).loss
    qk.patch_loss(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()


def test_fused_loss_refuses_an_adapter_on_the_head():
    with pytest.raises(ValueError, match="QuantLoraLinear"):
        qk.patch_loss(get_peft_model(base(), lora(target_modules=["lm_head"])))


def test_the_backend_is_shown():
    model = get_peft_model(base(), lora())
    assert model.get_model_status().quantization_backend == "qkernels"
    assert get_peft_model(llama(), lora()).get_model_status().quantization_backend is None


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"kasa_config": peft.KasaConfig()}])
def test_loading_without_initial_values(options, tmp_path):
    """`low_cpu_mem_usage` creates adapters on the meta device; KaSA then changes the base in the first forward."""
    model = with_effect(get_peft_model(base(), lora(**options)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True)
    logits(loaded)
    assert_same_bits(logits(loaded), logits(model))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_initialization_from_the_base(init, scheme):
    model = base(scheme)
    layers = {name: m.dequantize() for name, m in model.named_modules() if isinstance(m, qk.QuantLinear)}
    with pytest.warns(UserWarning, match="changes the weight of the base, which is rounded again"):
        model = get_peft_model(model, lora(init_lora_weights=init))
    errors = initialization_errors(model)
    assert len(errors) == 3 and not merge_errors(model)
    for name, error in errors.items():
        layer = model.get_submodule(name)
        before = layers[name.removeprefix("base_model.model.")]
        whole = layer.base_layer.dequantize() + layer.get_delta_weight("default")
        assert error == pytest.approx(distance(whole, before), rel=1e-2)
        assert 0 < error < (0.01 if scheme == "w8a8" else 0.12)


def test_initialization_before_quantization_is_rounded_once():
    """docs/guide/peft.md: an adapter taken from the float weight leaves less to round than one from the integers."""
    expected, errors = logits(llama()), {}
    for first in ("adapter", "quantization"):
        model = llama()
        if first == "quantization":
            qk.quantize_(model, "w4a8-g32")
        torch.manual_seed(1)
        model = get_peft_model(model, lora(target_modules="all-linear", init_lora_weights="pissa"))
        if first == "adapter":
            qk.quantize_(model, "w4a8-g32")
        errors[first] = distance(logits(model), expected)
    assert errors["adapter"] < 0.95 * errors["quantization"]


@pytest.mark.parametrize("keep", [True, False])
def test_loftq_from_a_folder(keep, tmp_path):
    llama().save_pretrained(tmp_path)
    expected, model = logits(llama()), base("w4a8-g32")
    before, seen = distance(logits(model), expected), []
    model = get_peft_model(model, lora(r=16, target_modules="all-linear"))

    def callback(model, name):
        seen.append(name)
        return keep

    peft.replace_lora_weights_loftq(model, os.fspath(tmp_path), callback=callback)
    assert len(seen) == 7 and "model.layers.0.self_attn.q_proj" in seen
    after = distance(logits(model), expected)
    assert after < 0.8 * before if keep else after == before


def test_loftq_of_a_conv1d(tmp_path):
    sizes = dict(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    weight = model.transformer.h[0].attn.c_attn.weight.detach().t().clone()
    qk.quantize_(model, "w4a8-g32")
    model = get_peft_model(model, lora(r=16, target_modules=["c_attn"]))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    before = distance(layer.base_layer.dequantize(), weight)
    peft.replace_lora_weights_loftq(model, os.fspath(tmp_path))
    assert distance(layer.base_layer.dequantize() + layer.get_delta_weight("default"), weight) < 0.7 * before


def test_layer_norm_tuning_of_a_linear_layer_trains_a_copy_in_float():
    model = get_peft_model(base(), peft.LNTuningConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer.ln_tuning_layers["default"]) is nn.Linear
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert layer.ln_tuning_layers["default"].weight.grad.norm() > 0
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear


class TestConvolutions:
    TARGETS = {"target_modules": ["0", "2"]}
    METHODS = {
        "LoRA": LoraConfig(**TARGETS, r=4),
        "DoRA": LoraConfig(**TARGETS, r=4, use_dora=True),
        "BOFT": peft.BOFTConfig(**TARGETS, boft_block_size=8),
        "HRA": peft.HRAConfig(**TARGETS, r=4),
        "IA3": peft.IA3Config(**TARGETS, feedforward_modules=[]),
        "LoHa": peft.LoHaConfig(**TARGETS, r=4),
        "LoKr": peft.LoKrConfig(**TARGETS, r=4),
    }

    def network(self, scheme, mode="frozen"):
        torch.manual_seed(0)
        convolutions = nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2)
        model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(144, 8))
        if scheme is not None:
            qk.quantize_(model, scheme, mode)
        return model

    @pytest.mark.parametrize("method", ["LoRA", "DoRA"])
    def test_a_new_adapter_over_trained_weights_changes_nothing(self, method):
        model, x = self.network("w4a8-g32", "qat"), torch.randn(4, 8, 8, 8)
        expected = model(x)
        torch.testing.assert_close(get_peft_model(model, self.METHODS[method])(x), expected)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(("scheme", "mode"), [("w8a8", "frozen"), ("w4a8-g32", "frozen"), ("w8a8", "int8")])
    def test_train_merge_unmerge(self, method, scheme, mode):
        if mode == "int8" and method != "LoRA":
            with pytest.raises(ValueError, match='0 is a convolution of mode "int8", which takes LoRA'):
                get_peft_model(self.network(scheme, mode), self.METHODS[method])
            return
        x, y = torch.randn(4, 8, 8, 8), torch.randn(4, 8)
        with torch.no_grad():
            plain, own = self.network(None)(x), self.network(scheme, mode)(x)
        model = get_peft_model(self.network(scheme, mode), self.METHODS[method])
        optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02), []
        for _ in range(4):
            losses.append(nn.functional.mse_loss(model(x), y))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        with torch.no_grad():
            separate = model(x)
            with model.disable_adapter():
                assert_same_bits(model(x), own)
            model.merge_adapter()
            assert distance(model(x), separate) < (0.05 if scheme == "w8a8" else 0.2)
            model.unmerge_adapter()
            assert_same_bits(model(x), separate)
        assert distance(own, plain) < 0.2
