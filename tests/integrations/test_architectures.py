"""Architectures of transformers, timm and torchvision: each is quantized, run, saved, loaded, and trained with LoRA."""

import copy
import math
import re

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch import nn

import qkernels as qk

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore")
POSITIONS, DEPTHWISE = "is a subclass of nn.Embedding", "depthwise convolution"
# Where less than 95 % of the numbers in matrix weights are quantized: what stays.
LESS = {
    "opt": (POSITIONS,),
    "bart": (POSITIONS,),
    "sam": ("parameter of",),  # tables of positions
    "convnext": (DEPTHWISE,),
    "qwen2_vl": ("convolution",),  # nn.Conv3d
    "wav2vec2": ("parametrized weight",),  # weight_norm
    "wav2vec2_xvector": ("parametrized weight",),
    "wavlm": ("parametrized weight",),
}


@pytest.fixture(scope="module")
def float_models():
    """The float model of the architecture that is being tested: made once for all schemes."""
    return {}


def make(name, cache):
    if name not in cache:
        cache.clear()
        torch.manual_seed(0)
        kind, config, inputs = ARCHITECTURES[name]
        model = kind(config()).eval()
        inputs = inputs()
        with torch.no_grad():
            cache[name] = (model, inputs, outputs(model, inputs))
    return cache[name]


def outputs(model, inputs):
    """The largest float output."""
    values = [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]
    return max((value for value in values if value.is_floating_point()), key=torch.numel)


def check_report(model, report):
    """Whatever could be quantized and stays in float is in the report, with the reason."""
    left = {row.name: row.reason for row in report.left}
    assert report.quantized and all(left.values())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, qk.QuantLinear):
            assert name in left, name


def check_share(name, report):
    """At least 95 % of the numbers in matrix weights are quantized, or little but what `LESS` names stays."""
    reasons = LESS.get(name, ())
    left = sum(math.prod(row.shape) for row in report.left if not any(reason in row.reason for reason in reasons))
    total = sum(math.prod(row.shape) for row in report.rows if row.bytes_before)
    assert left <= 0.05 * total, report
    assert report.quantized_share >= 0.95 or reasons, report


def check_generates(model, loaded, inputs):
    """The model and the one that was loaded from its folder write the same tokens."""
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    tokens = model.generate(**inputs, **options)
    assert tokens.numel() and torch.equal(loaded.generate(**inputs, **options), tokens)


def check_lora(model, inputs):
    """LoRA on every quantized layer that the input reaches gets a gradient."""
    names = [name for name, module in model.named_modules() if isinstance(module, qk.QuantLinear)]
    if "mamba" in model.config.model_type:  # PEFT refuses it, in float too
        names = [name for name in names if not name.endswith("out_proj")]
    targets = "|".join(map(re.escape, names))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    outputs(model, inputs).float().pow(2).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.norm() > 0 for gradient in gradients)


@pytest.mark.parametrize("scheme, embeddings, bound", [("w8a8", True, 0.1), ("w4a8-g32", False, 0.6)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, scheme, embeddings, bound, float_models, tmp_path):
    original, inputs, expected = make(name, float_models)
    model = copy.deepcopy(original)
    report = qk.quantize_(model, scheme, embeddings=embeddings)
    check_report(model, report)
    if embeddings:
        check_share(name, report)
    with torch.no_grad():
        out = outputs(model, inputs)
    assert out.isfinite().all() and (out - expected).norm() < bound * expected.norm()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    saved, state = model.state_dict(), loaded.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(state[key], saved[key]) for key in saved)
    with torch.no_grad():
        torch.testing.assert_close(outputs(loaded, inputs), out)
    if model.can_generate():
        check_generates(model, loaded, inputs)
    del loaded, saved, state
    check_lora(model, inputs)


def run_image_model(model, image):
    expected = model.eval()(image)
    report = qk.quantize_(model, "w8a8")
    check_report(model, report)
    out = model(image)
    assert (out - expected).norm() < 0.1 * expected.norm()
    names = [name for name, module in model.named_modules() if isinstance(module, qk.QuantLinear)]
    targets = "|".join(map(re.escape, names))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted(image).pow(2).sum().backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in adapted.parameters())


@pytest.mark.parametrize("name", ["beitv2_base_patch16_224", "eva02_tiny_patch14_224"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    run_image_model(timm.create_model(name, img_size=56, depth=2, embed_dim=64, num_heads=4), torch.randn(1, 3, 56, 56))


def test_torchvision_swin():
    try:
        from torchvision.models import SwinTransformer
    except (ImportError, RuntimeError) as error:  # its operators belong to another build of torch
        pytest.skip(str(error))
    torch.manual_seed(0)
    run_image_model(SwinTransformer([4, 4], 32, [1, 1], [2, 2], [4, 4]), torch.randn(1, 3, 32, 32))
