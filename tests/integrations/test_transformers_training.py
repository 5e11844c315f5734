"""transformers: models whose weights are trained, in float or as int8, under Trainer, saved and loaded."""

import pytest
import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from helpers import assert_same_bits
from transformers import AutoModelForCausalLM
from transformers_models import build, logits, train

import qkernels as qk
from qkernels.autograd.int8_weight import Int8Weight

transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path):
    build("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def linears(model) -> list[qk.QuantLinear]:
    return [module for module in model.modules() if isinstance(module, qk.QuantLinear)]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
@pytest.mark.parametrize(("scheme", "mode"), [("w4a8-g32", "qat"), ("w8a8", "qat"), ("w8a8", "int8")])
def test_loaded_model_is_trained_saved_and_loaded(scheme, mode, settings, folder, tmp_path):
    config = qk.QKernelsConfig(scheme, mode=mode, grad_dtype="int8")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=qk.QKernelsConfig(scheme))
    assert_same_bits(logits(model), logits(quantized))
    before = [layer.dequantize() for layer in linears(model)]
    train(model, tmp_path / "run", **settings)
    extract_model_from_parallel(model, keep_fp32_wrapper=False).eval()  # without the autocast of `bf16`
    for layer, weight in zip(linears(model), before, strict=True):
        assert layer.mode == mode and layer.weight.requires_grad and not torch.equal(layer.dequantize(), weight)
    model.save_pretrained(tmp_path / "saved")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {layer.mode for layer in linears(restored)} == {mode}
    assert {layer.grad_dtype for layer in linears(restored)} == {"int8"}
    assert_same_bits(logits(restored), logits(model))
    if mode == "int8":
        assert all(isinstance(layer.weight, Int8Weight) for layer in linears(restored))
    train(restored, tmp_path / "again", **settings)

    expected = logits(model)
    qk.freeze_(model)
    assert_same_bits(logits(model), expected)
    model.save_pretrained(tmp_path / "frozen")
    frozen = AutoModelForCausalLM.from_pretrained(tmp_path / "frozen")
    assert {layer.mode for layer in linears(frozen)} == {"frozen"}
    assert_same_bits(logits(frozen), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("scheme", "mode"), [("w4a8-g32-asym", "qat"), ("w8a8", "int8")])
def test_quantize_then_train(family, scheme, mode, tmp_path):
    model = build(family)
    qk.quantize_(model, scheme, mode=mode, grad_dtype="int8")
    train(model, tmp_path)
    qk.freeze_(model)
    assert model.config.quantization_config.mode == "frozen"


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
def test_frozen_model_with_int8_gradients_is_loaded(scheme, folder, tmp_path):
    """The scales of the columns, which are not saved, are derived anew."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=qk.QKernelsConfig(scheme, grad_dtype="int8")
    )
    loaded.save_pretrained(tmp_path / "saved")
    for model in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        for layer in linears(model):
            columns = layer.column_scales
            assert (columns is None) == (scheme == "w8a8")
            if columns is not None:
                weight = layer.quantized_weight()
                assert_same_bits(columns, qk.ops.column_scales(*weight, layer.in_features, scheme))
        hidden = torch.randn(1, 5, 48, requires_grad=True)
        model(inputs_embeds=hidden).logits.sum().backward()
        assert hidden.grad.isfinite().all() and hidden.grad.any()
