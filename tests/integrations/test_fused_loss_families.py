"""`patch_loss` on the kinds of models that differ in how they get from the head to the loss."""

import loss_families
import pytest
import torch
import transformers

import qkernels as qk

transformers.logging.set_verbosity_error()

FUSED = [
    "CohereForCausalLM",  # scales its logits
    "GraniteForCausalLM",  # divides them
    "Gemma2ForCausalLM",  # caps them
    "GPTJForCausalLM",  # casts them; a bias of the head
    "Qwen3MoeForCausalLM",  # adds the loss of a router
    "AlbertForMaskedLM",  # a head of other width
    "BartForConditionalGeneration",  # adds a bias of the classes
    "MarianMTModel",
    "PegasusForConditionalGeneration",
    "T5ForConditionalGeneration",  # scales the hidden states if tied
    "MT5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
]


@pytest.mark.parametrize("name", FUSED)
def test_the_patched_step_is_the_models_own(name):
    assert loss_families.outcome(name) == "fused"


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration", "GraniteForCausalLM"])
def test_quantized_heads_of_scaled_and_biased_logits(name):
    model = loss_families.build(name)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    if hasattr(model.config, "logits_scaling"):
        model.config.logits_scaling = 3.0
    qk.quantize_(model, "w8a8", embeddings=True)
    inputs = loss_families.inputs_of(model)
    loss, grad = loss_families.step(model, inputs)
    with qk.patch_loss(model):
        assert model(**inputs).logits.call.fused
        patched = loss_families.step(model, inputs)
    torch.testing.assert_close(patched[0], loss, rtol=1e-3, atol=1e-3)
    assert (patched[1] - grad).norm() <= 0.05 * grad.norm()


def test_a_model_that_by_passes_its_head_is_told():
    """MobileBERT multiplies by the weight of its head, put together with another one."""
    assert loss_families.outcome("MobileBertForMaskedLM") == "told: no effect"
