"""Mixtures of transformers: quantized, saved, loaded, generated from, trained, and back."""

import copy
import json
import warnings

import pytest
import torch
import transformers as T
from architectures import ARCHITECTURES, IDS
from helpers import assert_same_bits
from safetensors import safe_open
from torch import nn

import qkernels as qk

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

SPARSE = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "llama4_text", "olmoe", "dbrx"]
# Other weights that stay in float, whatever the experts do.
SKIP = {"jamba": ["*mamba*"], "jetmoe": ["lm_head"]}


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    kind, config, _ = ARCHITECTURES[name]
    model = kind._from_config(config(), dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def matrices(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, qk.QuantGroupedLinear)}


@pytest.mark.parametrize("name", [*SPARSE, "jamba", "jetmoe"])
def test_experts_have_rows_and_strict_is_content(name):
    model = make(name)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "expert" in n.lower() and p.dim() == 3}
    report = qk.quantize_(model, "w8a8", strict=True, skip=SKIP.get(name, ()))
    experts = [row for row in report.quantized if len(row.shape) == 3]
    assert len(experts) == len(matrices(model)) >= 2
    if shapes and name != "jetmoe":
        assert {row.name for row in experts} == set(shapes)
    for row in experts:
        count = torch.Size(row.shape).numel()
        assert (row.bytes_before, row.bytes_after) == (4 * count, count + 4 * count // row.shape[-1])
        assert 0 < row.weight_error < 0.02
    left = {row.name: row.reason for row in report.left}
    routers = [reason for reason in left.values() if reason.startswith("router: ")]
    assert routers and report.quantized_share > 0.6


@pytest.mark.parametrize("name", SPARSE)
def test_a_folder_has_equal_bits_and_the_names_of_a_float_checkpoint(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "float")
    qk.quantize_(model, "w4a8-g32")
    expected = logits(model)
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    listed = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["layers"]
    assert set(matrices(model)) <= set(listed)
    floats, stored = names_of(tmp_path / "float"), names_of(tmp_path / "a")
    for parameter in floats:
        if "experts" in parameter and "proj" in parameter and not parameter.endswith("bias"):
            assert stored & {f"{parameter.removesuffix('.weight')}.qweight", f"{parameter}.qweight"}, parameter
    loaded = type(model).from_pretrained(tmp_path / "a", device_map="cpu")
    assert_same_bits(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "b")
    assert_same_bits(logits(type(model).from_pretrained(tmp_path / "b")), expected)
    generated = loaded.generate(IDS, max_new_tokens=3, do_sample=False)
    assert_same_bits(generated, model.generate(IDS, max_new_tokens=3, do_sample=False))
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=qk.QKernelsConfig("w4a8-g32"))
    assert_same_bits(logits(quantized), expected)
    assert {row.name for row in quantized.quantization_report.quantized} >= set(matrices(model))


def names_of(folder):
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "dbrx", "jetmoe"])
def test_experts_become_float_again(name, tmp_path):
    model = make(name)
    before = {key: tensor.shape for key, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    qk.quantize_(model, "w8a8")
    qk.dequantize_(model)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == before
    assert [type(module) for module in model.modules()] == kinds
    model.save_pretrained(tmp_path)
    assert_same_bits(logits(type(model).from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("mode", ["qat", "int8"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_training_and_its_folder(name, mode, tmp_path):
    model = make(name)
    qk.quantize_(model, "w8a8", mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {module.mode for module in matrices(loaded).values()} == {mode}
    assert_same_bits(logits(loaded), expected)
    assert_same_bits(logits(qk.freeze_(loaded)), expected)


def test_patterns_leave_experts_in_float_and_load_them(tmp_path):
    model = make("qwen3_moe")
    model.save_pretrained(tmp_path / "float")
    report = qk.quantize_(model, "w8a8", skip=["*.0.mlp.experts", "*.1.mlp.experts.down_proj"])
    assert {row.name for row in report.left if "experts" in row.name} == {
        *(f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")),
        "model.layers.1.mlp.experts.down_proj",
    }
    assert not isinstance(model.model.layers[0].mlp.experts, qk.QuantExperts)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    assert_same_bits(logits(type(model).from_pretrained(tmp_path / "a")), expected)
    config = qk.QKernelsConfig("w8a8", skip=["*.0.mlp.experts", "*.1.mlp.experts.down_proj"])
    assert_same_bits(logits(type(model).from_pretrained(tmp_path / "float", quantization_config=config)), expected)


def test_a_folder_without_an_expert_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make("mixtral")
    qk.quantize_(model, "w8a8")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = [key for key in tensors if "experts" in key and "scales" in key and "layers.1" in key]
    save_file({key: tensor for key, tensor in tensors.items() if key not in lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.\w+\.scales is missing in the checkpoint"):
        T.MixtralForCausalLM.from_pretrained(tmp_path)


def test_half_precision_and_autocast(tmp_path):
    model = make("qwen3_moe", torch.bfloat16)
    expected = logits(model)
    quantized = copy.deepcopy(model)
    qk.quantize_(quantized, "w8a8", strict=True)
    out = logits(quantized)
    assert out.dtype == torch.bfloat16 and (out - expected).norm() < 0.1 * expected.norm()
    quantized.save_pretrained(tmp_path)
    assert_same_bits(logits(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)), out)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert logits(quantized.float()).dtype == torch.bfloat16


def test_layers_left_on_disk_have_equal_bits(tmp_path):
    model = make("mixtral")
    qk.quantize_(model, "w4a8-g32")
    model.save_pretrained(tmp_path / "a")
    on_cpu = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers": "disk", **dict.fromkeys(on_cpu, "cpu")}
    loaded = type(model).from_pretrained(tmp_path / "a", device_map=places, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[0].mlp.experts.down_proj.qweight.is_meta
    assert_same_bits(logits(loaded), logits(model))


def test_integers_of_another_dtype_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make("mixtral")
    qk.quantize_(model, "w8a8")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {k: t.to(torch.int16) if "experts" in k and "qweight" in k else t for k, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"must be torch\.int8, got torch\.int16"):
        T.MixtralForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"calibration": [IDS]}, "experts are rounded to nearest"),
        pytest.param({"never_slower": True}, "experts are quantized and not", marks=pytest.mark.thorough),
    ],
)
def test_what_does_not_look_at_experts_says_so(options, message):
    model = make("mixtral")
    with pytest.warns(UserWarning, match=message):
        report = qk.quantize_(model, "w4a8-g32", **options)
    assert any(message in warning for warning in report.warnings) and matrices(model)


@pytest.mark.parametrize("lost", ["down_proj_bias", "down_proj"])
def test_a_float_checkpoint_without_a_parameter_of_the_experts(lost, tmp_path):
    from safetensors.torch import load_file, save_file

    model = make("gpt_oss")
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", f"model.layers.0.mlp.experts.{lost}"
    save_file({key: t for key, t in load_file(file).items() if key != name}, file, {"format": "pt"})
    config = qk.QKernelsConfig("w8a8")
    loaded, info = type(model).from_pretrained(tmp_path, quantization_config=config, output_loading_info=True)
    experts = loaded.model.layers[0].mlp.experts
    left = {row.name: row.reason for row in loaded.quantization_report.left}
    if lost == "down_proj":
        assert left[name] == "has no weight of its own in the checkpoint"
        assert info["missing_keys"] == {f"{name}.weight"} and 0.05 < experts.down_proj.weight.std() < 0.1
    else:
        assert name not in left and not experts.down_proj.bias.any()
        assert info["missing_keys"] == {"model.layers.0.mlp.experts.down_proj.bias"}
    assert logits(loaded).isfinite().all()


def test_learned_scales_have_a_folder(tmp_path):
    model = make("qwen3_moe")
    qk.quantize_(model, "w4a8-g32", "qat", weight_scale="learned")
    assert model.model.layers[0].mlp.experts.down_proj.scales.shape == (4, 64, 1)
    model.save_pretrained(tmp_path)
    assert_same_bits(logits(type(model).from_pretrained(tmp_path)), logits(model))
