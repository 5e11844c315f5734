"""Every method of PEFT, and its copies of whole layers, over quantized layers: they train, merge and unmerge."""

import re

import peft
import peft_matrix
import pytest
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

import qkernels as qk

transformers.logging.set_verbosity_error()
IDS = torch.arange(3, 19).reshape(2, 8)
TARGETS = {"target_modules": ["0", "2"]}
pytestmark = pytest.mark.filterwarnings("ignore")


def network(scheme="w8a8", mode="frozen"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    qk.quantize_(net, scheme, mode)
    return net


def llama(**options):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **options)).eval()


def states(model):
    """The tensors of each quantized layer, by its name in the model without adapters."""
    layers = [m for m in model.modules() if isinstance(m, qk.QuantLinear | qk.QuantEmbedding)]
    return [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]


def assert_equal_states(got, expected):
    for mine, other in zip(got, expected, strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


TRAINED = ("LoRA", "LoRA, modules_to_save of a layer", "LoRA, target_parameters", "DoRA", "PiSSA", "KaSA", "MiSS, bat")


@pytest.mark.parametrize("row", peft_matrix.ROWS, ids=lambda row: row.name)
class TestMatrix:
    """What passes over a float base passes over a quantized one, or is refused, in one sentence, when it is created."""

    def check(self, row, base):
        if row.needs is not None:
            pytest.importorskip(row.needs)
        result = peft_matrix.run(row, base)
        if row.refused and base not in ("float", "qat"):
            assert re.search(row.refused, result.refused) and len(result.refused) < 300
        elif not row.refused:  # PEFT itself needs another library for it
            assert not result.refused and not result.failures(), result

    @pytest.mark.thorough
    @pytest.mark.parametrize("base", ["float", "w8a8"])
    def test_float_and_8_bits(self, row, base):
        self.check(row, base)

    @pytest.mark.slow
    def test_4_bits(self, row):
        self.check(row, "w4a8-g32")


@pytest.mark.thorough
@pytest.mark.parametrize("base", ["qat", "int8"])
@pytest.mark.parametrize("row", [row for row in peft_matrix.ROWS if row.name in TRAINED], ids=lambda row: row.name)
def test_methods_over_layers_whose_weight_is_trained(row, base):
    TestMatrix().check(row, base)


@pytest.mark.parametrize("unload", [False, True])
def test_a_merge_that_fails_in_one_layer_leaves_all_as_they_were(unload):
    model = get_peft_model(network(), LoraConfig(**TARGETS, init_lora_weights=False))
    before = states(model)
    model.base_model.model[2].lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="nothing was changed"):
        model.merge_and_unload() if unload else model.merge_adapter()
    assert_equal_states(states(model), before)
    layers = [model.base_model.model[i] for i in (0, 2)]
    assert all(not layer.merged and isinstance(layer.base_layer, qk.QuantLinear) for layer in layers)


def test_an_adapter_of_nan_is_not_loaded(tmp_path):
    model = get_peft_model(network(), LoraConfig(**TARGETS))
    model.base_model.model[2].lora_A["default"].weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"2\.lora_A\.weight must be finite"):
        peft.PeftModel.from_pretrained(network(), tmp_path)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_a_quantized_head_in_modules_to_save_is_trained_in_float(scheme, tmp_path):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)

    def base():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
        qk.quantize_(model, scheme)
        return model

    model = get_peft_model(base(), LoraConfig(task_type=TaskType.SEQ_CLS))
    head = model.base_model.model.classifier
    trained, kept = head.modules_to_save["default"], head.original_module
    assert type(trained) is nn.Linear and trained.weight.requires_grad and type(kept) is qk.QuantLinear
    assert torch.equal(trained.weight, kept.dequantize()) and torch.equal(trained.bias, kept.bias)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loss = model(input_ids=IDS, labels=torch.tensor([0, 1])).loss
    loss.backward()
    optimizer.step()
    model.eval()
    out = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, out)
    assert type(model.merge_and_unload().classifier) is nn.Linear


def test_embeddings_and_head_in_modules_to_save():
    model = llama()
    qk.quantize_(model, "w8a8", embeddings=True)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name in ("model.embed_tokens", "lm_head"):
        copied = model.base_model.model.get_submodule(name).modules_to_save["default"]
        assert copied.weight.grad.norm() > 0


@pytest.mark.parametrize("tie", [False, True])
def test_trainable_tokens_of_a_quantized_embedding(tie):
    model = llama(tie_word_embeddings=tie)
    qk.quantize_(model, "w8a8", embeddings=True)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5])).eval()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    tokens = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name and p.requires_grad]
    assert tokens and all(p.grad.norm() > 0 for p in tokens)
    with torch.no_grad():
        tokens[0].mul_(3)
    out = model(input_ids=IDS).logits
    merged = model.merge_and_unload()
    assert (merged(input_ids=IDS).logits - out).norm() < 0.05 * out.norm()


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=16),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["prompt", "p", "prefix"],
)
def test_prompt_methods(config):
    model = llama()
    qk.quantize_(model, "w8a8", embeddings=True)
    model = get_peft_model(model, config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_t5_asks_an_adapted_layer_for_its_dtype(scheme):
    sizes = dict(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    qk.quantize_(model, scheme)
    expected = model(input_ids=IDS, labels=IDS).loss
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert model.base_model.model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, expected)


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_lora_over_a_trained_layer(mode):
    x = torch.randn(4, 32)
    model = get_peft_model(network(mode=mode), LoraConfig(**TARGETS, init_lora_weights=False))
    separate = model(x)
    separate.sum().backward()
    assert model.base_model.model[0].lora_A["default"].weight.grad.norm() > 0
    merged = model.merge_and_unload()
    assert merged[0].mode == mode and (merged(x) - separate).norm() < 0.05 * separate.norm()
