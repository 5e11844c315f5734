"""Folders of bitsandbytes: int8 is kept, tables of 16 values become 8-bit integers with a report."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkernels.checkpoints.bitsandbytes import table_as_integers
from qkernels.checkpoints.losses import LossError, Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.formats.storage import dequantize_weight

FILES = Path(__file__).with_name("files")
NF4 = load_file(FILES / "bitsandbytes-nf4" / "model.safetensors")["proj.weight.quant_map"]
FP4 = load_file(FILES / "bitsandbytes-fp4" / "model.safetensors")["proj.weight.quant_map"]


def weight_of(layer) -> torch.Tensor:
    return dequantize_weight(*layer.read().weight, layer.in_features, layer.scheme)


def expected(kind: str) -> torch.Tensor:
    return load_file(FILES / f"bitsandbytes-{kind}" / "expected.safetensors")["weight"]


def test_int8_is_kept():
    with pytest.warns(UserWarning, match="llm_int8_threshold is 6.0.*have no such path"):
        found = open_checkpoint(FILES / "bitsandbytes-int8")
    layer, written = found.layers["proj"], load_file(FILES / "bitsandbytes-int8" / "model.safetensors")
    assert found.format == "bitsandbytes" and layer.scheme.name == "w8a8" and list(found.floats) == ["proj.bias"]
    values = layer.read().weight
    assert torch.equal(values.qweight, written["proj.weight"])
    assert torch.equal(values.scales[:, 0] * 127, written["proj.SCB"])
    torch.testing.assert_close(weight_of(layer), expected("int8"), rtol=2**-22, atol=0)


@pytest.mark.parametrize(("kind", "change", "most"), [("nf4", 0.0053, 1 / 224), ("fp4", 0.0042, 1 / 240)])
def test_a_table_is_reported(kind, change, most, tmp_path):
    with pytest.raises(LossError, match=r"proj.weight: its table of 16 values .* pass on_loss='report'"):
        open_checkpoint(FILES / f"bitsandbytes-{kind}")
    losses, exact = Losses("report"), expected(kind)
    found = open_checkpoint(FILES / f"bitsandbytes-{kind}", losses)
    layer = found.layers["proj"]
    assert layer.scheme.name == "w8a16-g32"  # blocks of 64 in rows of 96: half a block fits both
    kept = weight_of(layer)
    (loss,) = losses.entries
    assert loss.tensor == "proj.weight" and loss.total == exact.numel()
    largest = (kept - exact).abs().max() / exact.abs().max()
    assert loss.largest == pytest.approx(float(largest), rel=1e-3) and 0 < loss.largest <= most
    assert float((kept - exact).norm() / exact.norm()) < change
    parse_target("qkernels")[0].write(found, tmp_path / "out", Losses("report"))
    again = open_checkpoint(tmp_path / "out").layers["proj"]
    assert torch.equal(weight_of(again), kept)


@pytest.mark.parametrize(("table", "step", "changed"), [(NF4, 112, 13), (FP4, 120, 2)])
def test_the_integers_of_a_table_are_the_nearest_of_all_steps(table, step, changed):
    integers, found = table_as_integers(table)
    assert found == step and int(((integers / step - table).abs() > 1e-6).sum()) == changed

    def error(m: int) -> float:
        return float(((table.double() * m).round() / m - table).square().sum())

    assert min(range(64, 128), key=error) == step and error(step) < 0.65 * error(127)


def folder_of(path: Path, kind: str, config: dict | None = None, **changes: torch.Tensor | None) -> Path:
    """The folder of a fixture with other tensors."""
    shutil.copytree(FILES / f"bitsandbytes-{kind}", path)
    tensors = load_file(path / "model.safetensors")
    named = {f"proj.{name.replace('__', '.')}": tensor for name, tensor in changes.items()}
    tensors = {name: tensor for name, tensor in (tensors | named).items() if tensor is not None}
    save_file(tensors, path / "model.safetensors")
    return path


def state(**changes: object) -> torch.Tensor:
    said = {"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [12, 96]} | changes
    return text(json.dumps(said))


def text(content: str) -> torch.Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


STATE = "weight__quant_state__bitsandbytes_fp4"


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("int8", {"SCB": None}, "proj.weight is quantized, but proj has neither SCB nor a quant_state"),
        ("int8", {"SCB": torch.ones(3)}, r"proj.SCB must be float32 \[12\], got torch.float32 \[3\]"),
        ("int8", {"weight": None}, "proj.weight must be an int8 matrix"),
        ("int8", {"weight": torch.ones(12, 96)}, "proj.weight must be an int8 matrix"),
        ("int8", {"weight_format": torch.tensor(2, dtype=torch.uint8)}, r"weight_format must be 0 \(rows\), got 2"),
        ("fp4", {"state": None}, "is quantized, but"),
        ("fp4", {"weight__absmax": torch.ones(17)}, "proj.weight.absmax must be 18 values of torch.float32"),
        ("fp4", {"weight__quant_map": torch.ones(15)}, "quant_map must be 16 values"),
        ("fp4", {"weight": torch.zeros(575, 1, dtype=torch.uint8)}, "must hold 1152 codes of 4 bits, got 575 bytes"),
        ("fp4", {"state": text("{")}, "is no quant_state that can be read"),
        ("fp4", {"state": text("[" * 60000)}, "is no quant_state that can be read"),
        ("fp4", {"state": torch.zeros(1 << 17, dtype=torch.uint8)}, "is no quant_state that can be read"),
        ("fp4", {"state": state(quant_type="af4")}, "quant_type must be 'nf4' or 'fp4', got 'af4'"),
        ("fp4", {"state": state(shape=[12, -96])}, r"shape\[1\] must be a positive number, got -96"),
        ("fp4", {"state": state(shape=[2, 6, 96])}, "shape must be that of a matrix"),
        ("fp4", {"state": state(shape=[1 << 39, 1 << 39])}, "absmax must be"),
        ("fp4", {"state": state(blocksize=0)}, "blocksize must be a positive number, got 0"),
        ("nf4", {"weight__nested_absmax": None}, "nested_absmax must be 1 values of torch.float32, got nothing"),
        ("nf4", {"weight__nested_quant_map": torch.ones(16)}, "nested_quant_map must be 256 values"),
    ],
)
def test_broken_folders_are_refused(tmp_path, kind, changes, words):
    if "state" in changes:
        folder = folder_of(tmp_path / "x", kind)
        tensors = load_file(folder / "model.safetensors")
        tensors["proj.weight.quant_state.bitsandbytes__fp4"] = changes["state"]
        save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")
    else:
        folder = folder_of(tmp_path / "x", kind, **changes)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(folder, Losses("requantize"))


def table_folder(path: Path, out_features: int, in_features: int, blocksize: int) -> tuple[Path, torch.Tensor]:
    """A folder with a random FP4 weight, and the float values of that."""
    torch.manual_seed(0)
    codes, blocks = torch.randint(16, (out_features * in_features,)), -(-out_features * in_features // blocksize)
    absmax = torch.rand(blocks) + 0.1
    weight = (FP4[codes] * absmax.repeat_interleave(blocksize)[: len(codes)]).view(out_features, in_features)
    even = torch.nn.functional.pad(codes, (0, len(codes) % 2)).to(torch.uint8)
    path.mkdir()
    tensors = {
        "proj.weight": (even[0::2] << 4 | even[1::2]).unsqueeze(1),
        "proj.weight.absmax": absmax,
        "proj.weight.quant_map": FP4,
        "proj.weight.quant_state.bitsandbytes__fp4": state(shape=[out_features, in_features], blocksize=blocksize),
    }
    save_file(tensors, path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (path / "config.json").write_text(json.dumps(config))
    return path, weight


@pytest.mark.parametrize(
    ("in_features", "blocksize", "scheme"),
    [(128, 64, "w8a16-g64"), (256, 4096, "w8a16-g128"), (384, 256, "w8a16-g128"), (64, 32, "w8a16-g32")],
)
def test_blocks_of_any_size_are_groups(tmp_path, in_features, blocksize, scheme):
    folder, weight = table_folder(tmp_path / "x", 5, in_features, blocksize)
    layer = open_checkpoint(folder, Losses("report")).layers["proj"]
    assert layer.scheme.name == scheme
    assert float((weight_of(layer) - weight).abs().max() / weight.abs().max()) < 1 / 240 + 1e-6


def test_blocks_that_cross_rows_are_quantized_again_or_refused(tmp_path):
    folder, weight = table_folder(tmp_path / "x", 5, 37, 64)
    with pytest.raises(LossError, match=r"blocks of 64 cross rows of 37.*pass on_loss='requantize'"):
        open_checkpoint(folder, Losses("report"))
    losses = Losses("requantize")
    layer = open_checkpoint(folder, losses).layers["proj"]
    assert layer.scheme.name == "w8a16-g64" and layer.in_features == 37
    assert torch.all((weight_of(layer) - weight).abs() <= weight.abs().amax(1, keepdim=True) / 253)
    assert [loss.what for loss in losses.entries] == ["weights that were quantized again"]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_the_library_writes_now(tmp_path, kind):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / kind)
    found = open_checkpoint(tmp_path / kind, Losses("report"))
    floats = {name: tensor.read() for name, tensor in found.floats.items()}
    kept = floats | {f"{name}.weight": weight_of(layer) for name, layer in found.layers.items()}
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "float").train()
    imported.load_state_dict(kept)
    exact = model.train()  # in mode eval its CPU kernel multiplies in bfloat16
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        ours, theirs = imported(ids).logits, exact(ids).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01
