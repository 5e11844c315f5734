"""Static activations in transformers: calibrate, save, load, train; loading a float checkpoint calibrates nothing."""

import peft
import pytest
import torch
from helpers import assert_same_bits
from transformers import AutoModelForCausalLM
from transformers_models import build, logits

import qkernels as qk


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 60, (2, 12), generator=generator)} for _ in range(3)]


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_is_loaded_with_its_scales(tmp_path, mode, dtype):
    model = build("llama").to(dtype)
    qk.quantize_(model, "w8a8s", mode, calibration=batches())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, qk.QuantLinear)}
    for name, layer in layers.items():
        twin = loaded.get_submodule(name)
        assert (twin.scheme.name, twin.mode) == ("w8a8s", mode)
        assert_same_bits(twin.x_scale.detach(), layer.x_scale.detach(), name)
        x = torch.randn(3, layer.in_features, dtype=dtype)
        assert_same_bits(twin(x), layer(x), name)
    if dtype == torch.float32:  # .to() casts the frequencies of the rotary embedding, too
        assert_same_bits(logits(loaded), logits(model))


def test_a_learned_scale_is_saved(tmp_path):
    model = build("llama")
    qk.quantize_(model, "w8a8s", "qat", weight_scale="learned", calibration=batches())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.x_scale.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].mlp.down_proj.x_scale.requires_grad
    assert_same_bits(logits(loaded), logits(model))


def test_loading_a_float_checkpoint_says_what_to_do(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"w8a8s has static activations.*quantize_\(model, 'w8a8s', calibration"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=qk.QKernelsConfig("w8a8s"))


def test_prepare_works_around_generate_and_lora_trains_on_it():
    model = qk.prepare_(build("llama"), "w8a8s")
    model.generate(**batches()[0], max_new_tokens=4, do_sample=False)
    assert len(qk.convert_(model).quantized) > 10
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    loss = adapted(**batches()[1], labels=batches()[1]["input_ids"]).loss
    loss.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert grads and all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)
