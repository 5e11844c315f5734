"""transformers: tiny models of four families are quantized, loaded, saved, made to generate, and trained."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import assert_same_bits, run_python
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
)
from transformers_models import FAMILIES, build, logits, train

import qkernels as qk
from qkernels import integrations
from qkernels.convert.selection import NOT_ASKED

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Linear layers of each family, and how many of them stay in float because they are tied to the embedding.
LAYERS = {"gpt2": (9, 1), "bert": (14, 0), "llama": (15, 0), "t5": (33, 1)}


def quantized_names(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, qk.QuantLinear)}


@pytest.fixture
def folder(tmp_path):
    """Saves a float model and returns its folder."""

    def save(model, name="float", **options) -> Path:
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
def test_quantized_model_is_close_to_the_float_model(family, scheme):
    model = build(family)
    before = logits(model)
    report = qk.quantize_(model, scheme)
    layers, tied = LAYERS[family]
    left = [row.reason for row in report.left if not row.reason.startswith("embedding: ")]
    assert len(report.quantized) == layers - tied and len(left) == tied
    assert all(reason.startswith("tied to ") for reason in left)
    error = (logits(model) - before).norm() / before.norm()
    assert 0 < error < (0.05 if scheme == "w8a8" else 0.5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_equals_quantize(family, dtype, folder):
    path = folder(build(family).to(dtype))
    model_class = type(build(family))
    expected = model_class.from_pretrained(path, dtype=dtype).eval()
    report = qk.quantize_(expected, "w4a8-g32")
    model = model_class.from_pretrained(path, dtype=dtype, quantization_config=qk.QKernelsConfig("w4a8-g32"))
    assert model.quantization_report.to_dict() == report.to_dict()
    assert quantized_names(model) == quantized_names(expected)
    for name, tensor in expected.state_dict().items():
        assert_same_bits(model.state_dict()[name], tensor, name)
    assert_same_bits(logits(model), logits(expected))
    assert model.config.quantization_config.layers == expected.config.quantization_config.layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", ["one file", "sharded"])
@pytest.mark.parametrize("way", ["quantize_", "from_pretrained"])
def test_save_and_load_give_the_same_bits(family, shards, way, folder, tmp_path):
    model = build(family)
    model_class = type(model)
    if way == "quantize_":
        qk.quantize_(model, "w4a8-g32-asym")
    else:
        model = model_class.from_pretrained(folder(model), quantization_config=qk.QKernelsConfig("w4a8-g32-asym"))
    saved = tmp_path / "quantized"
    model.save_pretrained(saved, **({"max_shard_size": "20KB"} if shards == "sharded" else {}))
    files = list(saved.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "sharded")
    keys = {key for file in files for key in safe_open(file, "pt").keys()}
    for name in quantized_names(model):
        assert {f"{name}.qweight", f"{name}.scales", f"{name}.zeros"} <= keys
    assert len([name for name in quantized_names(model) if f"{name}.weight" in keys]) == 1  # the marker
    loaded, info = model_class.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert quantized_names(loaded) == quantized_names(model)
    assert all(module.mode == "frozen" for module in loaded.modules() if type(module) is qk.QuantLinear)
    assert_same_bits(logits(loaded), logits(model))
    assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def test_loading_in_a_new_process_gives_the_same_bits(folder, tmp_path):
    model = build("gpt2")
    qk.quantize_(model, "w8a8-ag32")
    path = folder(model, "quantized")
    torch.save(logits(model), tmp_path / "logits.pt")
    # transformers first; this test file has imported qkernels first.
    run_python(
        "import torch, transformers.quantizers.auto, qkernels\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})\n"
        "assert type(model.transformer.h[0].mlp.c_fc) is qkernels.QuantLinear\n"
        "with torch.no_grad():\n"
        "    logits = model(input_ids=torch.arange(3, 19).reshape(2, 8)).logits\n"
        f"assert torch.equal(logits, torch.load({str(tmp_path / 'logits.pt')!r}))\n"
    )


def test_import_of_qkernels_imports_no_other_library():
    run_python(
        "import sys, qkernels\n"
        "assert not {'transformers', 'peft', 'safetensors'} & set(sys.modules)\n"
        "assert qkernels.QKernelsConfig('w8a8').quant_method == 'qkernels' and 'transformers' in sys.modules\n"
        "try:\n"
        "    qkernels.nothing\n"
        "except AttributeError as error:\n"
        "    assert 'nothing' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_unsupported_version_is_a_clear_message_and_leaves_the_library_alone(library, monkeypatch):
    monkeypatch.setattr(integrations.importlib.metadata, "version", lambda name: "0.9.1.dev0")
    with pytest.raises(ImportError, match=rf"qkernels works with {library} >= [\d.]+, got 0\.9\.1\.dev0"):
        integrations.load(library)
    with pytest.warns(UserWarning, match=rf"integration with {library} is not active: .* got 0\.9\.1"):
        integrations._load_or_warn(library)


def test_absent_library_is_a_clear_message(monkeypatch):
    def version(name):
        raise integrations.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(integrations.importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"transformers is not installed: pip install 'transformers>="):
        integrations.load("transformers")


@pytest.mark.parametrize(("scheme", "limit"), [("w4a8-g32-asym", 0.33), ("w8a8", 0.52)])
def test_saved_bytes_of_the_quantized_layers(scheme, limit, folder):
    # Rows of 128 and more, as real models have: a scale per row of 48 would weigh more.
    model = build("llama", hidden_size=256, intermediate_size=512, tie_word_embeddings=True)
    report = qk.quantize_(model, scheme)
    tensors = load_file(folder(model) / "model.safetensors")
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
    layers = [row for row in report.rows if row.scheme]
    saved = sum(t.nbytes for key, t in tensors.items() if key.rpartition(".")[0] in {row.name for row in layers})
    bf16 = sum(2 * row.shape[0] * row.shape[1] for row in layers)
    assert saved == report.bytes_after - sum(row.bytes_after for row in report.left)
    assert saved <= limit * bf16


def test_scales_stay_float32_whatever_dtype_is_asked_for(folder):
    model = build("bert")
    qk.quantize_(model, "w4a8-g32-asym")
    path = folder(model)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = BertForSequenceClassification.from_pretrained(path, dtype=dtype)
        layer = loaded.bert.encoder.layer[0].attention.self.query
        reference = model.bert.encoder.layer[0].attention.self.query
        assert_same_bits(layer.scales, reference.scales)
        assert layer.bias.dtype == layer.compute_dtype == dtype
        assert logits(loaded).dtype == dtype
        assert_same_bits(loaded.to(torch.float32).classifier.scales, model.classifier.scales)


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_quantized_unless_it_is_tied_or_skipped(tied, folder):
    path = folder(build("llama", tie_word_embeddings=tied))
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=qk.QKernelsConfig("w8a8"))
    assert isinstance(model.lm_head, qk.QuantLinear) != tied
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        reasons = {row.name: row.reason for row in model.quantization_report.left}
        assert reasons == {"lm_head": "tied to model.embed_tokens", "model.embed_tokens": NOT_ASKED}
    config = qk.QKernelsConfig("w8a8", skip=["lm_head", "*.layers.0.*"])
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    assert quantized_names(model) == {name for name in quantized_names(model) if ".layers.1." in name} != set()
    with pytest.warns(UserWarning, match="skip pattern 'nothing' matches no layer"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=qk.QKernelsConfig("w8a8", skip=["nothing"]))


def test_layers_that_are_new_stay_in_float_and_trainable(folder):
    path = folder(build("bert").bert)
    model = BertForSequenceClassification.from_pretrained(
        path, num_labels=5, quantization_config=qk.QKernelsConfig("w8a8")
    )
    assert {row.name: row.reason for row in model.quantization_report.left if row.reason != NOT_ASKED} == {
        "classifier": "has no weight of its own in the checkpoint"
    }
    assert model.classifier.weight.requires_grad and 0 < model.classifier.weight.std() < 0.1
    saved = folder(model, "quantized")
    assert_same_bits(logits(BertForSequenceClassification.from_pretrained(saved)), logits(model))
    # A head of another shape than the checkpoint's is new as well.
    path = folder(build("bert"), "three")
    model = BertForSequenceClassification.from_pretrained(
        path, num_labels=5, ignore_mismatched_sizes=True, quantization_config=qk.QKernelsConfig("w8a8")
    )
    assert logits(model).shape == (2, 5)
    assert "has shape [3, 48]" in model.quantization_report.left[-1].reason
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(path, num_labels=5, quantization_config=qk.QKernelsConfig("w8a8"))


def test_folder_of_a_model_with_a_head_loads_without_it_and_the_reverse(folder):
    model = build("bert")
    qk.quantize_(model, "w8a8")
    base = BertModel.from_pretrained(folder(model), add_pooling_layer=True)
    assert quantized_names(base) == {name.removeprefix("bert.") for name in quantized_names(model)} - {"classifier"}
    saved = folder(base, "base")
    again = BertForSequenceClassification.from_pretrained(saved)
    assert quantized_names(again) == quantized_names(model) - {"classifier"}
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert_same_bits(AutoModel.from_pretrained(saved)(ids).last_hidden_state, model.bert(ids).last_hidden_state)


def test_layers_with_different_schemes_are_saved_and_loaded(folder):
    model = build("llama")
    qk.quantize_(model, "w8a8-ag32", include=["*.self_attn.*"])
    qk.quantize_(model, "w4a8-g32", skip=["lm_head"])
    loaded = AutoModelForCausalLM.from_pretrained(folder(model))
    assert loaded.model.layers[1].self_attn.q_proj.scheme.name == "w8a8-ag32"
    assert loaded.model.layers[1].mlp.up_proj.scheme.name == "w4a8-g32"
    assert type(loaded.lm_head) is torch.nn.Linear
    assert_same_bits(logits(loaded), logits(model))


def test_model_inside_another_module_can_be_saved(folder):
    wrapper = torch.nn.ModuleDict({"encoder": build("bert").bert, "pool": torch.nn.Linear(48, 8)})
    qk.quantize_(wrapper, "w8a8")
    loaded = AutoModel.from_pretrained(folder(wrapper["encoder"]))
    assert quantized_names(loaded) == quantized_names(wrapper["encoder"]) != set()


def test_config_round_trip_and_bad_values():
    config = qk.QKernelsConfig("w4a8-g32-asym", skip=["lm_head"])
    again = qk.QKernelsConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.scheme == "w4a8-g32-asym" and again.skip == ["lm_head"] and again.quant_method == "qkernels"
    with pytest.raises(ValueError, match="did you mean 'w4a8-g32'"):
        qk.QKernelsConfig("w4a8-g33")
    with pytest.raises(ValueError, match="mode must be one of"):
        qk.QKernelsConfig(mode="magic")
    with pytest.raises(ValueError, match="grad_dtype must be one of"):
        qk.QKernelsConfig(grad_dtype="magic")
    with pytest.raises(TypeError, match="skip must be a list of patterns, got the string 'lm_head'"):
        qk.QKernelsConfig(skip="lm_head")
    with pytest.raises(TypeError, match="bits"):
        qk.QKernelsConfig.from_dict({"quant_method": "qkernels", "bits": 4})


def test_config_can_be_used_for_two_models(folder):
    config = qk.QKernelsConfig("w8a8")
    for family in ("llama", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(folder(build(family), family), quantization_config=config)
        assert set(model.config.quantization_config.layers) == quantized_names(model)
    assert config.layers == {}


def test_weight_that_is_not_finite_is_refused_while_loading(folder):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        AutoModelForCausalLM.from_pretrained(folder(model), quantization_config=qk.QKernelsConfig("w8a8"))


def test_damaged_folder_is_refused(folder):
    model = build("llama")
    qk.quantize_(model, "w8a8")
    path = folder(model)
    file, config = path / "model.safetensors", path / "config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())

    def load(tensors, **changes):
        save_file(tensors, file, metadata={"format": "pt"})
        quantization_config = {**settings["quantization_config"], **changes}
        config.write_text(json.dumps({**settings, "quantization_config": quantization_config}))
        return AutoModelForCausalLM.from_pretrained(path)

    key = "model.layers.0.mlp.up_proj.scales"
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.scales is missing in the checkpoint"):
        load({name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load({**tensors, key: tensors[key][:-1].clone()})
    with pytest.raises(ValueError, match="unknown scheme 'w8a9'"):
        load(tensors, layers={"lm_head": "w8a9"})
    with pytest.raises(ValueError, match=r"layers must name linear layers of LlamaForCausalLM, got \['nowhere'\]"):
        load(tensors, layers={"nowhere": "w8a8"})
    with pytest.raises(ValueError, match=r"got none; to quantize a float checkpoint pass quantization_config"):
        load(tensors, layers={})
    assert_same_bits(logits(load(tensors)), logits(model))


def test_disk_offload_is_refused(folder):
    path = folder(build("llama"))
    with pytest.raises(ValueError, match="must not offload layers to disk while a float checkpoint is quantized"):
        AutoModelForCausalLM.from_pretrained(
            path, device_map={"model": "cpu", "lm_head": "disk"}, quantization_config=qk.QKernelsConfig("w8a8")
        )


def test_device_map_counts_quantized_bytes(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder(build("llama")), device_map="auto", quantization_config=qk.QKernelsConfig("w4a8-g32-asym")
    )
    assert len(model.quantization_report.quantized) == 15
    assert model.hf_quantizer.quantized_element_size == 0.5 + 5 / 32


def test_config_of_another_folder_does_not_stay_in_a_new_model(folder):
    model = build("llama")
    qk.quantize_(model, "w8a8")
    config = transformers.AutoConfig.from_pretrained(folder(model))
    fresh = LlamaForCausalLM(config).eval()
    qk.quantize_(fresh, "w4a8-g32", skip=["lm_head"])
    assert_same_bits(logits(LlamaForCausalLM.from_pretrained(folder(fresh, "fresh"))), logits(fresh))


def test_another_quantization_is_not_overwritten(folder):
    model = build("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.warns(UserWarning, match="another quantization_config"):
        qk.quantize_(model, "w8a8")
    assert model.config.quantization_config == {"quant_method": "gptq"}


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(family, beams):
    model = build(family)
    qk.quantize_(model, "w8a8")
    ids = torch.arange(3, 9)[None]
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=beams)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert out.shape == (1, 9 if family == "t5" else 14)
    assert_same_bits(out, model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
    if beams == 1 and family != "t5":  # the cache changes nothing: rows do not depend on what else is in the batch
        assert_same_bits(out, model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = build("llama")
    qk.quantize_(model, "w4a8-g32")
    ids = torch.arange(3, 19).reshape(2, 8)

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = gradients()
    assert actual.keys() == expected.keys() and len(actual) > 0
    for name, gradient in expected.items():
        assert_same_bits(actual[name], gradient, name)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "weight_decay": 0.1}],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_trainer_with_lora_over_the_loaded_model(family, settings, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        folder(build(family)), quantization_config=qk.QKernelsConfig("w8a8"), dtype=torch.float32
    )
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    train(model, tmp_path / "run", **settings)
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    for name, tensor in base.items():
        assert_same_bits(frozen[name], tensor, name)


def test_trainer_refuses_the_loaded_model_without_adapters(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder(build("llama")), quantization_config=qk.QKernelsConfig("w8a8"))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        train(model, tmp_path)


def test_trainer_trains_what_quantize_left_in_float(tmp_path):
    model = build("gpt2")
    qk.quantize_(model, "w8a8")
    train(model, tmp_path)


def test_compiled_forward_is_one_graph_with_the_same_bits():
    model = build("llama")
    qk.quantize_(model, "w8a8")
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_bits(logits(compiled), expected)


PEAK_MEMORY = """
import re
import torch, transformers
import qkernels as qk
from qkernels.convert.selection import NOT_ASKED
from qkernels.convert import layers as convert

def megabytes():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

while_converting = []
relative_error = convert.relative_error

def measured(weight, quantized):  # called while the float and the quantized weight of a layer are both there
    while_converting.append(megabytes())
    return relative_error(weight, quantized)

convert.relative_error = measured
load = transformers.AutoModelForCausalLM.from_pretrained
load({small!r}, quantization_config=qk.QKernelsConfig("w8a8"))
while_converting.clear()
before = megabytes()
model = load({large!r}, quantization_config=qk.QKernelsConfig("w8a8"), dtype=torch.float32)
print(len(while_converting), max(while_converting) - before, sum(p.nbytes for p in model.parameters()) / 2**20)
"""


def test_a_float_checkpoint_is_quantized_one_layer_at_a_time(folder):
    large = build("llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=1)
    layer, whole = 2816 * 1024 * 4 / 2**20, sum(p.nbytes for p in large.parameters()) / 2**20
    code = PEAK_MEMORY.format(small=str(folder(build("llama"), "small")), large=str(folder(large, "large")))
    layers, peak, final = map(float, run_python(code, MALLOC_MMAP_THRESHOLD_="65536").stdout.split())
    assert layers == 8
    assert peak < final + layer + 4 < 0.75 * whole, f"{peak:.1f} MiB at the peak, {final:.1f} MiB in the end"
