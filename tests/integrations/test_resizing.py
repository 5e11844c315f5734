"""`resize_token_embeddings` of models with a quantized embedding or head: it works, or changes nothing."""

import pytest
import torch
import transformers
from torch import nn

import qkernels as qk

transformers.logging.set_verbosity_error()
IDS = torch.tensor([[1, 5, 9, 40]])


def llama(tie):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=tie)).eval()


def bert(tie):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, tie_word_embeddings=tie)).eval()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("make", [llama, bert])
def test_rows_that_stay_keep_their_bits(make, tie, embeddings, scheme, tmp_path):
    model = make(tie)
    qk.quantize_(model, scheme, embeddings=embeddings)
    kinds = [type(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    before = model(IDS).logits
    for size in (70, 50):
        table = model.resize_token_embeddings(size)
        head = model.get_output_embeddings()
        assert table is model.get_input_embeddings() and [type(table), type(head)] == kinds
        assert table.num_embeddings == head.out_features == model.config.vocab_size == size
        out = model(IDS).logits
        assert out.shape[-1] == size and torch.equal(out[..., :50], before[..., :50])
    if tie and embeddings:
        assert table.qweight is head.qweight
    if make is bert and not tie:
        return  # transformers ties the two biases of its head as it resizes it, and cannot load that
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(IDS).logits, out)


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_a_head_that_is_trained_stays_quantized(mode):
    model = llama(False)
    qk.quantize_(model, "w8a8", mode)
    with torch.no_grad():
        before = model(IDS).logits
    model.resize_token_embeddings(70)
    assert model.lm_head.mode == mode and torch.equal(model(IDS).logits[..., :64], before)
    model(IDS).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_a_size_that_stays_changes_nothing():
    model = llama(False)
    qk.quantize_(model, "w8a8", embeddings=True)
    table, head = model.get_input_embeddings(), model.lm_head
    model.resize_token_embeddings(pad_to_multiple_of=8)
    assert model.get_input_embeddings() is table and model.lm_head is head


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_failure_leaves_the_model_as_it_was(embeddings, monkeypatch):
    model = llama(False)
    qk.quantize_(model, "w8a8", embeddings=embeddings)
    table, head, before = model.get_input_embeddings(), model.lm_head, model(IDS).logits.detach()

    def fail(*args, **kwargs):
        raise MemoryError("no memory for the head")

    monkeypatch.setattr(model, "_get_resized_lm_head", fail)
    with pytest.raises(MemoryError):
        model.resize_token_embeddings(70)
    assert model.get_input_embeddings() is table and model.lm_head is head
    assert table.num_embeddings == len(table.weight) == model.config.vocab_size == 64
    assert torch.equal(model(IDS).logits, before) and not isinstance(head, nn.Embedding)
