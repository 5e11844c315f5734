"""What stays in float is told: rows of the report, `strict`, and warnings of `quantize_` and of the first step."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qkernels as qk

transformers = pytest.importorskip("transformers")


def reasons(report):
    return {row.name: row.reason for row in report.left}


class UnknownExperts(nn.Module):
    """Fused experts of somebody's own, which no adapter knows."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, *shape)) for shape in ((48, 32), (32, 48)))


def test_fused_experts_of_an_unknown_class_are_told_and_strict_refuses_them():
    model = nn.ModuleDict({"experts": UnknownExperts(), "linear": nn.Linear(32, 32)})
    with pytest.raises(ValueError, match=r"strict=True, and nothing was changed: .*fused experts"):
        qk.quantize_(model, "w8a8", strict=True)
    report = qk.quantize_(model, "w8a8")
    experts = [row for row in report.left if row.reason.startswith("fused experts: ")]
    assert [row.name for row in experts] == ["experts.up", "experts.down"]
    assert all(len(row.shape) == 3 and row.scheme is None for row in experts)
    share = 32 * 32 / (32 * 32 + 2 * 4 * 32 * 48)
    assert report.quantized_share == pytest.approx(share)
    line = str(report).splitlines()[-1]
    assert f"{100 * share:.1f} % of the matrix weights" in line and "% fused experts" in line
    assert qk.quantize_(nn.Sequential(model), "w8a8", strict=True, skip=["*.experts.*"]).left


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lstm, self.gru = nn.Conv3d(3, 4, 3), nn.LSTM(8, 8), nn.GRUCell(8, 8)
        self.up, self.depthwise = nn.ConvTranspose2d(3, 4, 2), nn.Conv1d(8, 8, 3, groups=8)
        self.attention, self.both = nn.MultiheadAttention(8, 2), nn.Bilinear(4, 5, 6)
        self.table, self.gain = nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(1, 6))
        self.linear = nn.Linear(8, 8)


def test_every_other_matrix_has_a_row_with_its_reason():
    report = qk.quantize_(Mixed(), "w8a8")
    told = {name: reason.partition(":")[0] for name, reason in reasons(report).items()}
    assert told == {
        "conv": "convolution",
        "up": "transposed convolution",
        "depthwise": "depthwise convolution",
        "both": "nn.Bilinear",
        "table": "parameter of Mixed",
    }
    recurrent = ["lstm.ih_l0", "lstm.hh_l0", "gru.ih", "gru.hh"]
    attention = ["attention.in_proj", "attention.out_proj"]
    assert [row.name for row in report.quantized] == [*recurrent, *attention, "linear"]
    for pattern in ("conv", "lstm"):
        assert any("skipped by pattern" in row.reason for row in qk.quantize_(Mixed(), "w8a8", skip=[pattern]).left)
    skip = ["conv", "up", "depthwise", "lstm", "gru", "attention", "out_proj", "both", "table"]
    assert qk.quantize_(Mixed(), "w8a8", skip=skip, strict=True).quantized


class Plain(nn.Linear):
    """A subclass that computes what nn.Linear does."""

    def __init__(self, features):
        super().__init__(features, features)
        nn.init.zeros_(self.bias)


def test_subclasses_that_compute_the_same_are_quantized():
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.FalconForCausalLM(config).eval()
    ids = torch.arange(6)[None]
    before = model(ids).logits
    assert len(qk.quantize_(model, "w8a8").quantized) == 4
    assert 0 < (model(ids).logits - before).norm() < 0.05 * before.norm()
    assert len(qk.quantize_(nn.Sequential(Plain(8)), "w8a8", strict=True).quantized) == 1


PARTS = ("encoder.block.0.layer.1", "decoder.block.0.layer.2")


def test_float32_modules_of_transformers_stay_beside_float16_only():
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    for dtype, kept in ((torch.float16, True), (torch.bfloat16, False)):
        model = transformers.T5ForConditionalGeneration(config).to(dtype)
        left = reasons(qk.quantize_(model, "w8a8"))
        names = {name for name, reason in left.items() if reason.startswith("kept in float32")}
        assert names == ({f"{part}.DenseReluDense.wo" for part in PARTS} if kept else set())


def caught(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in seen if issubclass(warning.category, UserWarning)]


def test_nothing_quantized_warns_unless_patterns_say_so():
    (message,) = caught(lambda: qk.quantize_(nn.Sequential(nn.Conv3d(3, 4, 3)), "w8a8"))
    assert message.startswith("nothing was quantized: 0: convolution: only linear layers, convolutions of one or two")
    assert caught(lambda: qk.quantize_(nn.Sequential(nn.Linear(8, 8)), "w8a8", skip=["0"])) == []
    assert caught(lambda: qk.quantize_(nn.Sequential(nn.Linear(8, 8)), "w8a8", include=[])) == []


@pytest.mark.parametrize(
    ("first", "second", "advice"),
    [
        (("w8a8",), ("w4a8-g32",), "dequantize_"),
        (("w8a8",), ("w8a8", "qat"), "dequantize_"),
        (("w8a8", "int8"), ("w8a8",), "freeze_"),
        (("w8a8",), ("w8a8",), None),
    ],
)
def test_a_second_call_that_changes_nothing_warns_once(first, second, advice):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    assert caught(lambda: qk.quantize_(model, *first)) == []
    messages = caught(lambda: qk.quantize_(model, *second))
    if advice is None:
        assert messages == []
        return
    (message,) = messages
    assert message.startswith(
        f"already quantized ({first[0]}, {(*first, 'frozen')[1]}), and not changed to {second[0]}"
    )
    assert advice in message and "0 and 1 more layers" in message
    assert caught(lambda: qk.quantize_(model, *second, skip=["0", "1"])) == []


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 16), nn.LayerNorm(16)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(torch.relu(self.body(self.norm(self.embed(ids)))))


def step(model, parameters=None, steps=2):
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(9)).square().sum().backward()
        optimizer.step()


def test_training_a_frozen_model_as_it_is_warns_once():
    model = Classifier()
    qk.quantize_(model, "w8a8")
    assert caught(lambda: model.train()(torch.arange(9))) == []
    (message,) = caught(lambda: step(model))
    assert "quantized layers of this Classifier are frozen" in message and 'mode="qat"' in message
    assert caught(lambda: step(model)) == []


def lora(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["body", "head"], r=2))


def new_head(model):
    model.head = nn.Linear(16, 3)
    return model


def frozen_norms(model):
    model.norm.requires_grad_(False)
    return model


@pytest.mark.parametrize("change", [lora, new_head, frozen_norms, lambda m: nn.Sequential(m, nn.Linear(3, 2))])
def test_training_what_was_meant_to_be_trained_does_not_warn(change):
    model = Classifier()
    qk.quantize_(model, "w8a8")
    model = change(model)
    assert caught(lambda: step(model)) == []


@pytest.mark.parametrize("mode", ["qat", "int8"])
def test_training_in_a_mode_for_it_does_not_warn(mode):
    model = Classifier()
    qk.quantize_(model, "w8a8", mode)
    assert caught(lambda: step(model)) == []
    model = Classifier()
    qk.quantize_(model, "w8a8", skip=["head"])
    assert caught(lambda: step(model)) == []
    features, head = Classifier(), nn.Linear(3, 2)
    qk.quantize_(features, "w8a8")
    assert caught(lambda: step(nn.Sequential(features, head), head.parameters())) == []


def test_misuse_of_arguments_is_explained():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"got set; layers are chosen by name, with include= and skip="):
        qk.quantize_(model, {nn.Linear})
    with pytest.raises(TypeError, match=r"include must be patterns of layer names, such as 'lm_head', got <class"):
        qk.quantize_(model, "w8a8", include=[nn.Linear])
    with pytest.raises(TypeError, match=r"must be an nn.Module, got list; call it for each model"):
        qk.quantize_([model], "w8a8")
    with pytest.raises(TypeError, match=r"must be an nn.Module, got SimpleNamespace; pass its unet or vae"):
        qk.quantize_(SimpleNamespace(unet=model, vae=model, steps=3), "w8a8")
    with pytest.raises(TypeError, match=r"not scripted or traced"):
        qk.quantize_(torch.jit.script(model), "w8a8")
    assert type(model[0]) is nn.Linear
