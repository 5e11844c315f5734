"""`quantize_` on the meta device: a skeleton into which a quantized state dict is loaded."""

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk

IDS = torch.tensor([1, 4, 4])
CASES = [
    ("w8a8", {}),
    ("w8a8", {"embeddings": "w4a8-g32"}),
    ("w4a8-g32-asym", {"grad_dtype": "int8"}),
    ("w8a8", {"mode": "qat", "weight_scale": "learned"}),
    ("w8a8", {"mode": "int8"}),
    ("w8a8s", {}),
]


def build():
    return nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 96), nn.ReLU(), nn.LayerNorm(96), nn.Linear(96, 32))


def quantized(scheme, options):
    model = build()
    qk.quantize_(model, scheme, calibration=[IDS] if "a8s" in scheme else None, **options)
    return model


def skeleton(scheme, options):
    with torch.device("meta"):
        model = build()
    report = qk.quantize_(model, scheme, strict=True, **options)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {(row.note, row.weight_error) for row in report.quantized} == {("without values: on the meta device", None)}
    return model


@pytest.mark.parametrize("scheme, options", CASES)
def test_a_quantized_state_dict_is_loaded(scheme, options):
    model = quantized(scheme, options)
    x = torch.randn(3, 64, requires_grad=True)
    for assign in (True, False):
        again = skeleton(scheme, options)
        again = again if assign else again.to_empty(device="cpu")
        again.load_state_dict(model.state_dict(), assign=assign)
        assert_same_bits(again(IDS), model(IDS))
        gradients = []
        for layer in (model[1], again[1]):
            torch.manual_seed(0)
            gradients += torch.autograd.grad(layer(x).square().sum(), x)
        assert_same_bits(*gradients)


@pytest.mark.parametrize("scheme, options", [*CASES[:4], CASES[5]])
def test_accelerate_loads_a_skeleton(scheme, options, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import save_file

    model = quantized(scheme, options)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    for device_map in ({"": "cpu"}, {"0": "cpu", "1": "disk", "3": "cpu", "4": "disk"}):
        with accelerate.init_empty_weights():
            again = build()
        qk.quantize_(again, scheme, **options)
        accelerate.load_checkpoint_and_dispatch(
            again, str(tmp_path / "model.safetensors"), device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert_same_bits(again(IDS), model(IDS))


def test_a_dispatched_model_says_what_to_do():
    accelerate = pytest.importorskip("accelerate")
    model = build()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.warns(UserWarning, match="nothing was quantized.* dispatched by accelerate .*: quantize the model"):
        qk.quantize_(model, "w8a8")


def test_what_needs_values_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(ValueError, match="calibration must be None for a model on the meta device, and 0 is there"):
        qk.quantize_(model, "w4a8-g32", calibration=[torch.randn(4, 32)])
    with pytest.raises(ValueError, match=r"on meta; only layers on the CPU can be timed"):
        qk.quantize_(model, "w8a8", never_slower=True)
    assert type(model[0]) is nn.Linear
    qk.quantize_(model, "w8a8")
    with pytest.raises(RuntimeError, match="the layer is quantized"):
        model.load_state_dict(nn.Sequential(nn.Linear(32, 8)).state_dict(), assign=True)
