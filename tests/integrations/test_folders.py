"""A saved folder is what the model is: edited models, mixed modes, the way back to float; and what must not load."""

import copy
import json

import pytest
import torch
from helpers import assert_same_bits, run_python
from safetensors.torch import load_file
from torch import nn

import qkernels as qk

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402  # noqa: E402
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[1, 5, 9, 3]])


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def kinds(model):
    layers = (qk.QuantLinear, qk.QuantEmbedding)
    return {name: (m.scheme.name, m.mode) for name, m in model.named_modules() if isinstance(m, layers)}


def dropped(model):
    qk.quantize_(model, "w8a8", skip=["model.layers.0.*"])
    model.model.layers = nn.ModuleList(model.model.layers[1:])
    model.config.num_hidden_layers = 1
    model.model.layers[0].self_attn.layer_idx = 0


def by_hand(model):
    mlp = model.model.layers[0].mlp
    mlp.up_proj = qk.QuantLinear.from_float(mlp.up_proj, "w4a8-g32")


def back_to_float(model):
    qk.quantize_(model, "w8a8")
    qk.dequantize_(model.model.layers[1])


def part_frozen(model):
    qk.quantize_(model, "w8a8", "qat")
    qk.freeze_(model.model)


def mixed_modes(model):
    qk.quantize_(model, "w8a8", "qat", include=["model.layers.0.*"])
    qk.quantize_(model, "w4a8-g32", include=["down_proj"], skip=["model.layers.0.*"])
    qk.quantize_(model, "w8a8", "int8", include=["up_proj"], skip=["model.layers.0.*"])


def head_replaced(model):
    qk.quantize_(model, "w8a8")
    model.set_output_embeddings(nn.Linear(32, 64, bias=False))


def part_quantized(model):
    qk.quantize_(model.model, "w8a8")


def swapped(model):
    qk.quantize_(model, "w8a8", include=["model.layers.0.*"])
    model.model.layers = nn.ModuleList(reversed(model.model.layers))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index


EDITS = [dropped, by_hand, back_to_float, part_frozen, mixed_modes, head_replaced, part_quantized, swapped]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_model_saves_what_it_is(edit, tmp_path):
    model = llama()
    edit(model)
    expected = kinds(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kinds(again) == expected != {}
    assert_same_bits(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice")
    assert kinds(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")) == expected


def test_a_new_classifier_after_quantize(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=2)).eval()
    qk.quantize_(model, "w8a8")
    model.classifier = nn.Linear(32, 5)
    model.num_labels = model.config.num_labels = 5
    model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert kinds(again) == kinds(model)
    torch.testing.assert_close(logits(again), logits(model))  # the float product depends on where its operands lie


def test_a_layer_that_the_config_does_not_name_is_refused(tmp_path):
    model = llama()
    qk.quantize_(model, "w8a8")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        changed = copy.deepcopy(config)
        del changed["quantization_config"]["layers"][name]
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(
            ValueError, match=f"holds quantized weights that .* has no quantized layer for: {name}.qweight"
        ):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "q_proj" in " ".join(kinds(LlamaModel.from_pretrained(tmp_path)))  # the head belongs to another model


def test_a_program_without_qkernels_fails_instead_of_going_on_with_random_weights(tmp_path):
    model = llama()
    qk.quantize_(model, "w8a8")
    model.save_pretrained(tmp_path)
    code = (
        "from transformers import {0}\n"
        "try:\n    {0}.from_pretrained({1!r})\nexcept RuntimeError:\n    print('refused')\n"
    )
    for name in ("AutoModelForCausalLM", "AutoModel"):
        assert run_python(code.format(name, str(tmp_path))).stdout.strip() == "refused"
    tensors = load_file(tmp_path / "model.safetensors")
    extra = set(tensors) - set(model.state_dict())
    assert [tensors[key].numel() for key in extra] == [0]
    other = llama()
    qk.quantize_(other, "w8a8")
    other.load_state_dict(tensors)  # strictly
    assert_same_bits(logits(other), logits(model))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "gemma3_text"])
def test_dequantized_model_is_a_float_model_with_a_float_folder(kind, scheme, tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | ({"head_dim": 16, "num_key_value_heads": 1} if kind == "gemma3_text" else {})
    config = transformers.AutoConfig.for_model(kind, **sizes)
    original = AutoModelForCausalLM.from_config(config).eval()
    kinds_before = {name: type(module) for name, module in original.named_modules()}
    keys, names = set(original.state_dict()), {name for name, _ in original.named_parameters()}
    model = copy.deepcopy(original)
    qk.quantize_(model, scheme, embeddings=True)
    quantized = logits(model)
    assert qk.dequantize_(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds_before
    assert set(model.state_dict()) == keys and {name for name, _ in model.named_parameters()} == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (logits(model) - quantized).norm() < 0.05 * quantized.norm()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_dequantize_of_transformers(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "float")
    config = qk.QKernelsConfig("w8a8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model.dequantize(torch.bfloat16)
    assert kinds(model) == {} and model.lm_head.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    assert kinds(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) == {}


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_dequantized_layer_multiplies_the_same_weight(mode):
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8, bias=False))
    qk.quantize_(model, "w8a16", mode)
    model[0].note = "kept"
    calls = []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    weights, bias = [layer.dequantize() for layer in model], model[0].bias
    qk.dequantize_(model.eval())
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights, strict=True))
    assert model[0].bias is bias and model[1].bias is None and not model[0].training
    model(torch.randn(2, 40)).sum().backward()
    assert calls == [1] and model[0].note == "kept" and model[0].weight.grad is not None
    assert "scheme" not in vars(model[0]) and qk.quantize_(model, "w4a8-g32").quantized


def test_what_cannot_be_dequantized_is_refused_and_unchanged():
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match="use its dequantize"):
        qk.dequantize_(qk.QuantLinear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    qk.quantize_(model, "w8a8")
    with pytest.raises(TypeError, match=r"dtype must be float32, bfloat16 or float16, got torch.int8"):
        qk.dequantize_(model, torch.int8)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["1"], r=2))
    with pytest.raises(ValueError, match=r"1.base_layer has PEFT adapters: call merge_and_unload"):
        qk.dequantize_(adapted)
    assert isinstance(model[0], qk.QuantLinear)


def test_names_and_mistakes_of_the_config(tmp_path):
    llama().save_pretrained(tmp_path)
    config = qk.QKernelsConfig("w8a8", modules_to_not_convert=["lm_head"], include=["model.layers.0.*"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert kinds(model) and all(name.startswith("model.layers.0.") for name in kinds(model))
    for arguments, message in (
        ({"skipp": []}, "skipp is unknown; did you mean skip"),
        ({"calibration": []}, r"calibration needs the float model: .* call quantize_\(..., calibration="),
        ({"skip": [], "modules_to_not_convert": []}, "another name of skip"),
        ({"include": "lm_head"}, "include must be a list of patterns, got the string"),
    ):
        with pytest.raises(TypeError, match=message):
            qk.QKernelsConfig("w8a8", **arguments)


def test_float32_modules_are_kept_beside_float16(tmp_path):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path)
    for dtype, kept in ((torch.float16, True), (torch.float32, False)):
        model = transformers.T5ForConditionalGeneration.from_pretrained(
            tmp_path, dtype=dtype, quantization_config=qk.QKernelsConfig("w8a8")
        )
        wo = model.encoder.block[0].layer[1].DenseReluDense.wo
        assert isinstance(wo, qk.QuantLinear) != kept
        if kept:
            assert wo.weight.dtype == torch.float32
            assert sum("kept in float32" in row.reason for row in model.quantization_report.left) == 2


def test_parallelism_that_is_not_there_is_refused():
    model = llama()
    model.config.distributed_config = transformers.distributed.DistributedConfig(fsdp_size=2)
    from qkernels.integrations.transformers import QKernelsHfQuantizer

    quantizer = QKernelsHfQuantizer(qk.QKernelsConfig("w8a8"), pre_quantized=False)
    with pytest.raises(ValueError, match=r"dp_size must be 1 .* tensor parallelism .* is there.*fully_shard"):
        quantizer.preprocess_model(model=model)


def test_hub_mixin_refuses_to_save_what_it_could_not_load(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

    model = Net()
    qk.quantize_(model, "w8a8")
    with pytest.raises(ValueError, match=r"layer and 0 more layers are quantized, and PyTorchModelHubMixin cannot"):
        model.save_pretrained(tmp_path)
    qk.dequantize_(model).save_pretrained(tmp_path)
    assert torch.equal(Net.from_pretrained(tmp_path).layer.weight, model.layer.weight)


def test_a_head_of_another_shape_is_new_if_that_is_asked_for(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=2)).eval()
    qk.quantize_(model, "w8a8")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match="classifier has another shape than in the folder: it is new, in float"):
        again = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert type(again.classifier) is nn.Linear and again.classifier.weight.requires_grad
    assert 0 < again.classifier.weight.std() < 0.1 and logits(again).shape == (1, 5)
    again.save_pretrained(tmp_path / "again")
    assert kinds(BertForSequenceClassification.from_pretrained(tmp_path / "again")) == kinds(again) != {}


def test_quantized_float32_modules_compute_in_float32_beside_float16(tmp_path):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    model.encoder.block[0].layer[1].DenseReluDense.wo.weight.data.fill_(3000.0)
    qk.quantize_(model, "w8a8")
    model.save_pretrained(tmp_path)
    half = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    block = half.encoder.block[0].layer[1].DenseReluDense
    assert block.wo.weight.dtype == torch.float32 and block.wi.weight.dtype == half.dtype == torch.float16
    out = block(torch.ones(1, 2, 32, dtype=torch.float16))
    assert out.dtype == torch.float32 and out.isfinite().all()
