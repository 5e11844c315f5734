"""Our folders in compressed-tensors itself, and its folders here: models of transformers with equal logits."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("compressed_tensors")
pytest.importorskip("transformers")

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

import qkernels
from qkernels.checkpoints.losses import Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.checkpoints.requantize import requantized

IDS = torch.arange(12)[None]
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXACT, ROUNDED = 2e-6, 0.02  # of the largest logit: sums in another order; activations that are rounded otherwise


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG | changes)).eval()


def of_library(folder: Path, dequantize: bool) -> torch.Tensor:
    """The logits of the library's model.

    transformers 5.24 loads packed zero points only if it dequantizes them at once.
    """
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return logits(AutoModelForCausalLM.from_pretrained(folder, **options))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("schemes", "bound"),
    [
        ({"": "w4a16-g32"}, EXACT),
        ({"": "w4a16-asym"}, EXACT),
        ({"": "w8a16-g32", "down": "w4a16-g32"}, EXACT),
        ({"": "w8a8"}, ROUNDED),
        ({"": "w4a8-g32-asym", "down": "w8a8-ag32"}, ROUNDED),
    ],
)
def test_the_library_reads_what_is_written(tmp_path, schemes, bound, tied):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "float")
    found = open_checkpoint(tmp_path / "float")
    chosen = {}
    for pattern, scheme in schemes.items():
        names = [name.removesuffix(".weight") for name in found.floats if pattern in name and "norm" not in name]
        chosen |= {name: scheme for name in names if not name.endswith(("embed_tokens", "lm_head"))}
    changed = requantized(found, chosen, Losses())
    parse_target("compressed-tensors")[0].write(changed, tmp_path / "out", Losses())
    at_once = "w4a16-asym" in schemes.values()
    theirs = of_library(tmp_path / "out", at_once)
    ours = logits(qkernels.load(tmp_path / "out"))
    assert (ours - theirs).abs().max() < bound * theirs.abs().max()
    if bound == EXACT:
        parse_target("float")[0].write(changed, tmp_path / "dequantized", Losses(), "f32")
        assert torch.equal(theirs, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized")))


WEIGHTS = [
    {"num_bits": 4, "group_size": 32},
    {"num_bits": 4, "group_size": 32, "symmetric": False},
    {"num_bits": 3, "group_size": 32, "symmetric": False},
    {"num_bits": 6, "strategy": "channel"},
    {"num_bits": 8, "strategy": "tensor"},
]
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("inputs", [None, TOKEN], ids=["a16", "a8"])
def test_what_the_library_writes_is_read(tmp_path, weights, inputs):
    model = llama()
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        weight = module.weight.detach()
        by = weight.unflatten(1, (-1, 32)) if scheme.weights.strategy == "group" else weight
        by = weight.flatten() if scheme.weights.strategy == "tensor" else by
        low, high = by.aminmax(dim=-1, keepdim=scheme.weights.strategy == "channel")
        scale, zero_point = calculate_qparams(low, high, scheme.weights)
        module.weight_scale.data.copy_(scale)
        module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "out")
    compressor.update_config(tmp_path / "out")
    at_once = inputs is None and not weights.get("symmetric", True)
    theirs = of_library(tmp_path / "out", at_once)
    ours = logits(qkernels.load(tmp_path / "out"))
    bound = EXACT if inputs is None else ROUNDED
    assert (ours - theirs).abs().max() < bound * theirs.abs().max()
    found = open_checkpoint(tmp_path / "out")
    parse_target("compressed-tensors")[0].write(found, tmp_path / "again", Losses())
    assert torch.equal(theirs, of_library(tmp_path / "again", at_once))
