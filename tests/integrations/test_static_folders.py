"""Static activations in transformers: calibrate, save, load, train; loading a float checkpoint calibrates nothing."""

import peft
import pytest
import torch
from architectures import ARCHITECTURES, IDS
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
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


def mixture(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, config, _ = ARCHITECTURES[name]
    return kind._from_config(config()).eval()


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("mode", ["frozen", "int8", "learned"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "jetmoe", "llama4_text", "granitemoe"])
def test_experts_are_calibrated_saved_and_loaded(tmp_path, name, mode):
    model = mixture(name)
    options = {"mode": "qat", "weight_scale": "learned"} if mode == "learned" else {"mode": mode}
    report = qk.quantize_(model, "w8a8s", **options, calibration=[IDS])
    experts = {n: m for n, m in model.named_modules() if isinstance(m, qk.QuantGroupedLinear)}
    rows = {row.name: row for row in report.quantized if len(row.shape) == 3}
    assert len(rows) == len(experts) >= 2 and not report.warnings
    for key, layer in experts.items():
        assert rows[key].x_scale == layer.x_scale.item() != 1 and rows[key].clipped_share == 0  # min-max
    expected = outputs(model)
    for folder in (tmp_path / "a", tmp_path / "b"):
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder)
        assert_same_bits(outputs(model), expected)
    for key, layer in experts.items():
        assert_same_bits(model.get_submodule(key).x_scale.detach(), layer.x_scale.detach())
    if mode != "frozen":
        assert_same_bits(outputs(qk.freeze_(model)), expected)


def test_experts_that_are_prepared_observe_what_one_call_calibrates():
    once, steps = mixture("mixtral"), qk.prepare_(mixture("mixtral"), "w8a8s")
    qk.quantize_(once, "w8a8s", calibration=[IDS])
    outputs(steps)
    qk.convert_(steps)
    for key, tensor in once.state_dict().items():
        assert_same_bits(tensor, steps.state_dict()[key], key)


def test_a_folder_has_the_scale_of_experts_beside_each_of_their_matrices(tmp_path):
    model = mixture("mixtral")
    qk.quantize_(model, "w8a8s", calibration=[IDS])
    model.save_pretrained(tmp_path)
    file, own = tmp_path / "model.safetensors", model.model.layers[0].mlp.experts
    tensors, prefix = load_file(file), "model.layers.0.block_sparse_moe.experts"
    for matrix, layer in (("w1", own.gate_up_proj), ("w3", own.gate_up_proj), ("w2", own.down_proj)):
        for expert in range(4):
            stored = tensors[f"{prefix}.{expert}.{matrix}.weight.x_scale"]
            assert stored.shape == (1, 1) and stored.item() == layer.x_scale.item()
    changed = {**tensors, f"{prefix}.2.w1.weight.x_scale": torch.full((1, 1), 0.5)}
    lost = {key: tensor for key, tensor in tensors.items() if not key.endswith("w2.weight.x_scale")}
    for wrong, message in (
        (changed, r"gate_up_proj\.x_scale must be the same for all experts of a matrix, got .* to 0\.5"),
        (lost, r"down_proj\.x_scale is missing in the checkpoint"),
    ):
        save_file(wrong, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path)
    save_file(tensors, file, {"format": "pt"})
    on_cpu = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers": "disk", **dict.fromkeys(on_cpu, "cpu")}
    with pytest.raises(ValueError, match=r"x_scale cannot be left on disk"):
        type(model).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
