"""GGUF files of tiny models: read as transformers reads them, and written back with the same bytes."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from qkernels.checkpoints.checkpoint import Checkpoint, CheckpointLayer, FloatTensor, LayerWeight
from qkernels.checkpoints.gguf_blocks import BLOCK_TYPES
from qkernels.checkpoints.gguf_file import GGUFFile
from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.formats.rules import quantize_weight
from qkernels.formats.scheme import QuantScheme
from qkernels.formats.storage import dequantize_weight

HIDDEN, HEADS, KEYS, HEAD, MLP, WORDS = 256, 2, 1, 128, 512, 50
MOE, EXPERTS = 768, 2  # transformers has 768 for every file


def shapes_of(architecture: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a tiny model."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (WORDS, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for index in range(layers):
        block = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * HEAD, HIDDEN),
            "attn_k.weight": (KEYS * HEAD, HIDDEN),
            "attn_v.weight": (KEYS * HEAD, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * HEAD),
            "ffn_norm.weight": (HIDDEN,),
        }
        if architecture == "qwen3moe":
            block |= {"ffn_gate_inp.weight": (EXPERTS, HIDDEN), "ffn_down_exps.weight": (EXPERTS, HIDDEN, MOE)}
            block |= {f"ffn_{part}_exps.weight": (EXPERTS, MOE, HIDDEN) for part in ("gate", "up")}
        else:
            block |= {"ffn_down.weight": (HIDDEN, MLP)}
            block |= {f"ffn_{part}.weight": (MLP, HIDDEN) for part in ("gate", "up")}
        if architecture in ("gemma3", "qwen3moe", "qwen3"):
            block |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
        if architecture == "gemma3":
            block |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
        if architecture == "qwen2":
            block |= {f"attn_{part}.bias": (HEAD * (HEADS if part == "q" else KEYS),) for part in "qkv"}
        shapes |= {f"blk.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def write_tiny(path: Path, architecture: str, kinds: tuple[str, ...], layers: int = 2, **more: object) -> Path:
    """A GGUF file by the package gguf; its matrices have the types `kinds`, one after the other."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_key_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(15)
    if architecture == "llama":
        writer.add_rope_dimension_count(HEAD)
    if architecture == "gemma3":
        writer.add_sliding_window(16)
    if architecture == "qwen3moe":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(MOE)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"t{index}" for index in range(3, WORDS))])
    writer.add_token_merges(["t 1"])
    for key, value in more.items():
        getattr(writer, key)(*value)
    turn = 0
    for name, shape in shapes_of(architecture, layers).items():
        values = rng.standard_normal(shape, dtype=np.float32) * 0.1
        if len(shape) == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, values + 1 if "norm" in name else values)
            continue
        kind = gguf.GGMLQuantizationType[kinds[turn % len(kinds)]]
        turn += 1
        writer.add_tensor(name, _blocks(values, kind, rng), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def _blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """The bytes of values of a type; of one that the package gguf cannot quantize to, random ones."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size), dtype=np.uint8)
        for at in (208,) if kind.name == "Q6_K" else (0, 2):
            raw[..., at : at + 2] = (rng.random((*raw.shape[:-1], 1)) * 1e-3).astype(np.float16).view(np.uint8)
        return raw.reshape(*values.shape[:-1], -1)


def float_values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All parameters of a checkpoint in float32."""
    values = {}
    for name, layer in checkpoint.layers.items():
        values[f"{name}.weight"] = dequantize_weight(*layer.read().weight, layer.in_features, layer.scheme)
    for name, tensor in checkpoint.floats.items():
        assert tensor.read().shape == tensor.shape and tensor.read().dtype == tensor.dtype
        values[name] = tensor.read().to(torch.float32)
    return values


KINDS = tuple(BLOCK_TYPES)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "qwen3moe"])
def test_a_file_is_read_as_transformers_reads_it_and_written_as_it_was(tmp_path, architecture):
    path = write_tiny(tmp_path / "tiny.gguf", architecture, (*KINDS, "F16", "BF16", "F32"))
    found = open_checkpoint(path)
    assert {layer.details for layer in found.layers.values()} == {f"GGUF {kind}" for kind in KINDS}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    config = transformers.AutoConfig.for_model(**found.config)
    assert type(config) is type(theirs.config) and config.tie_word_embeddings
    expected, ours = theirs.state_dict(), float_values(found)
    if architecture == "qwen3moe":  # fused in transformers
        for name in [name for name in expected if ".mlp.experts." in name]:
            parts, block = expected.pop(name).unbind(), name.rpartition(".")[0]
            for index, part in enumerate(parts):
                halves = {"down_proj": part} if name.endswith("down_proj") else {}
                halves = halves or dict(zip(("gate_proj", "up_proj"), part.chunk(2), strict=True))
                expected |= {f"{block}.{index}.{own}.weight": half for own, half in halves.items()}
    expected.pop("lm_head.weight")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], values) for name, values in expected.items())
    parse_target("gguf")[0].write(found, tmp_path / "out.gguf", Losses())
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


def without_sources(found: Checkpoint) -> Checkpoint:
    """The checkpoint as a model in memory is one: only values."""
    layers = {name: replace(layer, source=None) for name, layer in found.layers.items()}
    return replace(found, layers=layers, floats={n: replace(t, source=None) for n, t in found.floats.items()})


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3moe"])
def test_values_give_the_bytes_that_they_came_from(tmp_path, architecture):
    kinds = tuple(kind for kind in KINDS if "K" not in kind)
    path = write_tiny(tmp_path / "tiny.gguf", architecture, (*kinds, "F16"))
    parse_target("gguf")[0].write(without_sources(open_checkpoint(path)), tmp_path / "out.gguf", Losses())
    written, read = GGUFFile(tmp_path / "out.gguf"), GGUFFile(path)
    assert list(written.tensors) == list(read.tensors)
    for name, tensor in read.tensors.items():
        assert written.tensors[name].kind == tensor.kind, name
        assert torch.equal(written.bytes_of(written.tensors[name]), read.bytes_of(tensor)), name


def with_layer(found: Checkpoint, scheme: str, scales: torch.dtype = torch.float16) -> tuple[Checkpoint, torch.Tensor]:
    """The checkpoint with one layer of another scheme, and the values of that."""
    parsed, name = QuantScheme.parse(scheme), "model.layers.1.self_attn.q_proj"
    weight = quantize_weight(torch.randn(HEADS * HEAD, HIDDEN, generator=torch.Generator().manual_seed(0)), parsed)
    weight = weight._replace(scales=weight.scales.to(scales).to(torch.float32))
    layer = CheckpointLayer(name, HIDDEN, HEADS * HEAD, parsed, "", (), lambda: LayerWeight(weight))
    values = dequantize_weight(*weight, HIDDEN, parsed)
    return replace(found, layers={**found.layers, name: layer}), values


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16-g64", "w8a8-g128-ag32", "w4a16", "w4a16-g64", "w4a8-g128"])
def test_other_groups_repeat_their_scales(tmp_path, scheme):
    found, values = with_layer(open_checkpoint(write_tiny(tmp_path / "tiny.gguf", "llama", ("Q8_0",))), scheme)
    parse_target("gguf")[0].write(found, tmp_path / "out.gguf", Losses())
    read = open_checkpoint(tmp_path / "out.gguf")
    assert torch.equal(float_values(read)["model.layers.1.self_attn.q_proj.weight"], values)


def test_what_float16_rounds_is_refused_and_nothing_is_left(tmp_path):
    tiny = open_checkpoint(write_tiny(tmp_path / "tiny.gguf", "llama", ("Q8_0",)))
    found, _ = with_layer(tiny, "w8a16-g32", torch.float32)
    target = parse_target("gguf")[0]
    with pytest.raises(LossError, match=r"q_proj.scales: \d+ of 2048 scales that float16 cannot hold"):
        target.write(found, tmp_path / "out.gguf", Losses())
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]
    losses = Losses("report")
    target.write(found, tmp_path / "out.gguf", losses)
    assert [loss.tensor for loss in losses.entries] == ["model.layers.1.self_attn.q_proj.scales"]
    with pytest.raises(FileExistsError):
        target.write(found, tmp_path / "out.gguf", losses)


@pytest.mark.parametrize("target", ["f32", "f16", "q4_0", "q8_0"])
def test_a_target_is_the_type_of_all_layers(tmp_path, target):
    found = without_sources(open_checkpoint(write_tiny(tmp_path / "tiny.gguf", "llama", ("Q8_0", "Q4_0"))))
    output, losses = parse_target(f"gguf:{target}")[0], Losses("requantize")
    output.write(found, tmp_path / "out.gguf", losses, target)
    kinds = {tensor.kind for tensor in GGUFFile(tmp_path / "out.gguf").tensors.values() if len(tensor.shape) > 1}
    assert kinds == ({"Q4_0", "Q8_0"} if target == "q4_0" else {target.upper()})  # the embedding keeps its 8 bits
    before, after = float_values(found), float_values(open_checkpoint(tmp_path / "out.gguf"))
    largest = max(float((before[name] - after[name]).abs().max() / before[name].abs().max()) for name in before)
    assert largest <= {"f32": 0, "f16": 2**-11, "q4_0": 1 / 8, "q8_0": 1 / 254 + 2**-10}[target]
    assert bool(losses.entries) == (target != "f32")


def test_types_without_integers_of_ours(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", "llama", ("Q8_0", "IQ4_NL"))
    with pytest.raises(LossError, match=r"the type IQ4_NL of GGUF has no integers .* on_loss='requantize'"):
        open_checkpoint(path)
    losses = Losses("requantize")
    found = open_checkpoint(path, losses)
    name = "model.layers.0.self_attn.q_proj"
    assert found.layers[name].scheme.name == "w8a16-g32" and not losses.entries
    exact = gguf.GGUFReader(path).tensors
    kept = float_values(found)
    assert losses.entries and all(0 < loss.largest <= 1 / 127 for loss in losses.entries)
    tensor = next(tensor for tensor in exact if tensor.name == "blk.0.attn_v.weight")
    values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    ours = kept["model.layers.0.self_attn.v_proj.weight"]
    assert (values - ours).abs().max() <= values.abs().max() / 127


def test_positions_of_llama_3_are_read_from_their_factors(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0})  # fmt: skip
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 500000.0 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
    path, broken = tmp_path / "tiny.gguf", tmp_path / "broken.gguf"
    for out, factors in ((path, plain / scaled), (broken, plain / scaled + torch.arange(HEAD // 2) * 0.01)):
        tensor = ("rope_freqs.weight", factors.to(torch.float32).numpy())
        write_tiny(out, "llama", ("Q8_0",), add_tensor=tensor, add_rope_freq_base=(500000.0,))
    found = open_checkpoint(path).config["rope_parameters"]
    assert {**found, "factor": round(found["factor"], 4)} == config.rope_parameters
    parse_target("gguf")[0].write(open_checkpoint(path), tmp_path / "out.gguf", Losses())
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match=r"rope_freqs.weight has factors that are not those of Llama 3"):
        open_checkpoint(broken)


def test_what_a_model_has_no_place_for_is_refused(tmp_path):
    more = ("blk.0.attn_sinks.weight", np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"the tensor blk.0.attn_sinks.weight has no place in LlamaForCausalLM"):
        open_checkpoint(write_tiny(tmp_path / "a.gguf", "llama", ("Q8_0",), add_tensor=more))
    with pytest.raises(ValueError, match=r"scales positions by 'longrope', which is not read"):
        open_checkpoint(
            write_tiny(tmp_path / "b.gguf", "llama", ("Q8_0",), add_string=("llama.rope.scaling.type", "longrope"))
        )
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "clip")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(ValueError, match=r"c.gguf: the model of the GGUF file cannot be read: .*clip"):
        open_checkpoint(tmp_path / "c.gguf")


def test_a_checkpoint_without_a_template_is_refused(tmp_path):
    norm = FloatTensor((HIDDEN,), torch.float32, lambda: torch.ones(HIDDEN))
    found = Checkpoint("memory", {"model_type": "llama"}, {}, {"model.norm.weight": norm})
    with pytest.raises(ValueError, match=r"beside the model as template.gguf"):
        parse_target("gguf")[0].write(found, tmp_path / "out.gguf", Losses())


def test_a_folder_keeps_what_the_file_says_of_the_model(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", "llama", ("Q8_0", "Q4_0"))
    parse_target("qkernels")[0].write(open_checkpoint(path), tmp_path / "folder", Losses())
    assert {"template.gguf", "tokenizer.json"} <= {file.name for file in (tmp_path / "folder").iterdir()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.convert_ids_to_tokens(7) == "t7"
    parse_target("gguf")[0].write(open_checkpoint(tmp_path / "folder"), tmp_path / "out.gguf", Losses())
    written, read = GGUFFile(tmp_path / "out.gguf"), GGUFFile(path)
    assert written.metadata.keys() == read.metadata.keys() | {"general.quantization_version"}
    for name, tensor in read.tensors.items():
        assert torch.equal(written.bytes_of(written.tensors[name]), read.bytes_of(tensor)), name


def test_a_template_of_another_model_is_refused(tmp_path):
    found = open_checkpoint(write_tiny(tmp_path / "tiny.gguf", "llama", ("Q8_0",)))
    other = write_tiny(tmp_path / "other.gguf", "llama", ("Q8_0",), layers=3)
    with pytest.raises(ValueError, match=r"other.gguf is of another model: its block_count is 3"):
        parse_target("gguf")[0].write(
            replace(found, metadata={"template.gguf": other}), tmp_path / "out.gguf", Losses()
        )
