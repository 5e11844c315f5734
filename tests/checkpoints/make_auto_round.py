"""Make tests/checkpoints/files/auto_round-*: layers of a tiny model as AutoRound writes them, in its layouts.

    pip install torch auto-round
    python tests/checkpoints/make_auto_round.py

Each folder has two layers, and `expected.json`: the SHA-256 of the float32 bytes of the weights [N, K] that AutoRound's
own code computes of them.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FILES = Path(__file__).parent / "files"
LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")
LAYOUTS = {  # by the name of the folder: the format, and options of AutoRound
    "gptq": ("auto_gptq", {"scheme": "W4A16"}),
    "gptq-asym": ("auto_gptq", {"scheme": "W4A16", "sym": False}),
    "gptq-2bits": ("auto_gptq", {"scheme": "W2A16"}),
    "gptq-3bits": ("auto_gptq", {"scheme": "W3A16"}),
    "gptq-8bits": ("auto_gptq", {"scheme": "W8A16"}),
    "awq": ("auto_awq", {"scheme": "W4A16", "sym": False}),
    "awq-sym": ("auto_awq", {"scheme": "W4A16", "sym": True}),
    "own-gptq": ("auto_round", {"scheme": "W4A16"}),
    "own-gptqmodel": ("auto_round:gptqmodel", {"scheme": "W4A16", "sym": False}),
    "own-awq": ("auto_round:auto_awq", {"scheme": "W4A16", "sym": False}),
}


def tiny_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def tokenizer():
    words = {f"w{i}": i for i in range(31)} | {"[UNK]": 31}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), unk_token="[UNK]")


def dequantized(layer, tensors, config):
    """The weight [N, K] in float32, by AutoRound."""
    bits, packing = config["bits"], config.get("packing_format", "")
    parts = {key.removeprefix(f"{layer}."): tensor for key, tensor in tensors.items() if key.startswith(f"{layer}.")}
    if "awq" in (packing or config["quant_method"]):
        own = [parts[key] for key in ("qweight", "qzeros")]
        return dequantize_gemm(*own, parts["scales"].float(), bits, config["group_size"]).t()
    kind = qlinear_torch if packing.endswith("gptqmodel") else qlinear_torch_zp
    n, k = parts["scales"].shape[1], parts["qweight"].shape[0] * 32 // bits
    module = kind.QuantLinear(bits, config["group_size"], k, n, False)
    module.qweight, module.qzeros, module.scales = parts["qweight"], parts["qzeros"], parts["scales"].float()
    return module(torch.eye(k)).t()


def make(name, layout, options):
    folder = Path(tempfile.mkdtemp())
    rounder = AutoRound(tiny_model(), tokenizer(), group_size=32, iters=0, disable_opt_rtn=True, **options)
    rounder.quantize_and_save(str(folder), format=layout)
    saved = next(path.parent for path in folder.rglob("config.json"))
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    tensors = load_file(saved / "model.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] in LAYERS}
    target = FILES / f"auto_round-{name}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}, indent=1))
    digests = {
        layer: hashlib.sha256((dequantized(layer, tensors, config) + 0.0).contiguous().numpy().tobytes()).hexdigest()
        for layer in LAYERS  # all zeros positive
    }
    (target / "expected.json").write_text(json.dumps(digests, indent=1))


if __name__ == "__main__":
    for name, layout in LAYOUTS.items():
        make(name, *layout)
