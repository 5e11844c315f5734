"""Quantized transformers models: their dtype and size, and folders whose tensors are no quantized weight."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkernels as qk

transformers = pytest.importorskip("transformers")

SIZE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
KEY = "model.layers.0.self_attn.q_proj."


def model_of(scheme: str, **options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).bfloat16().eval()
    qk.quantize_(model, scheme, **options)
    return model


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_bfloat16_model_stays_one(embeddings, tmp_path):
    model, ids = model_of("w8a8", embeddings=embeddings), torch.arange(8)[None]
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.dtype == again.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_that_begins_with_a_linear_layer():
    model = transformers.PatchTSTModel(
        transformers.PatchTSTConfig(
            d_model=32, num_attention_heads=2, num_hidden_layers=1, ffn_dim=64, context_length=32, patch_length=8
        )
    ).bfloat16()
    qk.quantize_(model, "w8a8")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"embeddings": True}, {"mode": "qat"}, {"mode": "int8"}])
@pytest.mark.parametrize("tied", [False, True])
def test_num_parameters_counts_weights(options, tied):
    for scheme in ("w8a8", "w4a8-g32-asym") if options.get("mode") != "int8" else ("w8a8",):
        config = transformers.LlamaConfig(**SIZE, tie_word_embeddings=tied)
        model = transformers.LlamaForCausalLM(config)
        expected = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
        qk.quantize_(model, scheme, **options)
        assert (model.num_parameters(), model.num_parameters(exclude_embeddings=True)) == expected


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("zeros", lambda t: t.fill_(200), "must be at most 15, got 200"),
        ("scales", lambda t: t.fill_(float("nan")), "must be finite, got NaN or Inf"),
        ("scales", lambda t: t.fill_(float("inf")), "must be finite, got NaN or Inf"),
        ("scales", lambda t: t.half(), "must be torch.float32, got torch.float16"),
        ("qweight", lambda t: t.float(), "must be torch.uint8, got torch.float32"),
        ("zeros", lambda t: t.to(torch.int32), "must be torch.uint8, got torch.int32"),
        ("zeros", lambda t: None, "is missing in the checkpoint"),
    ],
)
def test_from_pretrained_refuses_broken_tensors(name, change, message, tmp_path):
    model_of("w4a8-g32-asym").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = change(tensors.pop(KEY + name))
    save_file(tensors if changed is None else {**tensors, KEY + name: changed}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as refused:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert KEY + name in str(refused.value) and str(tmp_path) in str(refused.value)
