"""`quantize_`: which layers it swaps, what it reports, what survives the swap, and how much memory it takes."""

import json
import re
import warnings

import pytest
import torch
from helpers import assert_same_bits, run_python
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import qkernels as qk
from qkernels.convert.model import AFTER_QUANTIZE
from qkernels.convert.schemes import SchemeRules
from qkernels.convert.selection import NOT_ASKED, select_layers


class Block(nn.Module):
    def __init__(self, width: int = 48):
        super().__init__()
        self.up = nn.Linear(width, 80)
        self.down = nn.Linear(80, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """An embedding, two blocks and a head; `tied`: the head shares the embedding's weight."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(20, 48)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(48, 20)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def names(rows):
    return [row.name for row in rows]


def reasons(report):
    """Of the layers that this call left, but for the embeddings it was not asked for."""
    return {row.name: row.reason for row in report.left if row.reason != NOT_ASKED}


def assert_unchanged(model, before):
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym", "w4a16-g64"])
def test_each_layer_becomes_what_from_float_makes_of_it(scheme):
    model = Net()
    expected = {
        name: qk.QuantLinear.from_float(module, scheme)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    report = qk.quantize_(model, scheme)
    assert names(report.rows) == ["embed", *expected] and names(report.quantized) == list(expected)
    for row in report.quantized:
        layer, reference = model.get_submodule(row.name), expected[row.name]
        for name, tensor in reference.state_dict().items():
            assert_same_bits(layer.state_dict()[name], tensor, f"{row.name}.{name}")
        assert row.scheme == scheme and row.kind == "Linear"
        assert row.shape == (layer.out_features, layer.in_features)
        assert row.bytes_before == 4 * layer.in_features * layer.out_features
        assert row.bytes_after == layer.storage_bytes()
        assert 0 < row.weight_error < (0.02 if scheme.startswith("w8") else 0.15)
    assert model(torch.arange(20)).shape == (20, 20)


def test_report_prints_a_table_and_is_plain_data():
    report = qk.quantize_(Net(tied=True), "w8a8", skip=["down"])
    text = str(report)
    assert text.splitlines()[0].split() == [
        "layer",
        "kind",
        "shape",
        "scheme",
        "before",
        "after",
        "error",
        "left",
        "because",
        "/",
        "note",
    ]
    assert len(text.splitlines()) == 1 + 6 + 1
    assert "head" in text and "tied to embed" in text and "skipped by pattern" in text
    assert text.splitlines()[-1].startswith("total: 2 of 6 layers quantized to w8a8, 47.1 % of the matrix weights, ")
    assert text.splitlines()[-1].endswith("left as they were: 47.1 % skipped by pattern, 5.9 % embedding")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"] == 6 and data["quantized_layers"] == 2
    assert data["bytes_after"] == sum(row["bytes_after"] for row in data["rows"]) < data["bytes_before"]
    assert [row["name"] for row in data["rows"]][:2] == ["embed", "blocks.0.up"]
    with pytest.warns(UserWarning, match="nothing was quantized: the model has no linear layer"):
        report = qk.quantize_(nn.Sequential(nn.ReLU()), "w8a8")
    assert "total: 0 of 0 layers" in str(report) and str(report).splitlines()[-1].startswith("warning: nothing")


@pytest.mark.parametrize(
    ("patterns", "hit"),
    [
        (["head"], {"head"}),
        (["blocks.1.up"], {"blocks.1.up"}),
        (["up"], {"blocks.0.up", "blocks.1.up"}),
        (["blocks.0.*"], {"blocks.0.up", "blocks.0.down"}),
        (("*.down", "head"), {"blocks.0.down", "blocks.1.down", "head"}),
        ([], set()),
    ],
)
def test_patterns(patterns, hit):
    skipped = qk.quantize_(Net(), "w8a8", skip=patterns)
    assert set(reasons(skipped)) == hit
    assert set(reasons(skipped).values()) <= {"skipped by pattern"}
    included = qk.quantize_(Net(), "w8a8", include=patterns, strict=True)
    assert set(names(included.quantized)) == hit
    assert set(reasons(included).values()) <= {"not included"}


def test_skip_wins_over_include():
    report = qk.quantize_(Net(), "w8a8", include=["up"], skip=["blocks.0.*"])
    assert names(report.quantized) == ["blocks.1.up"]


def test_pattern_without_a_match_is_a_warning_and_with_strict_an_error():
    with pytest.warns(UserWarning, match=r"skip pattern 'lm_head' matches no layer"):
        report = qk.quantize_(Net(), "w8a8", skip=["lm_head"])
    assert report.warnings == ["skip pattern 'lm_head' matches no layer"]
    assert "warning: skip pattern 'lm_head'" in str(report)
    model = Net()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"include pattern 'attn' matches no layer"):
        qk.quantize_(model, "w8a8", include=["attn", "up"], strict=True)
    assert_unchanged(model, before)


@pytest.mark.parametrize("argument", ["skip", "include"])
def test_a_single_string_is_not_a_list_of_patterns(argument):
    with pytest.raises(TypeError, match=f"{argument} must be a sequence of patterns, got the string 'head'"):
        qk.quantize_(Net(), "w8a8", **{argument: "head"})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(scheme="w8a9"), ValueError, "unknown scheme 'w8a9'"),
        (dict(scheme="w8a8", mode="magic"), ValueError, "mode must be one of .*, got 'magic'"),
        (dict(scheme="w8a8", grad_dtype="int3"), ValueError, "grad_dtype must be one of .*, got 'int3'"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    model = Net()
    before = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        qk.quantize_(model, **arguments)
    assert_unchanged(model, before)


def test_a_linear_layer_itself_is_refused():
    for layer in (nn.Linear(4, 4), qk.QuantLinear(4, 4)):
        with pytest.raises(TypeError, match="use QuantLinear"):
            qk.quantize_(layer, "w8a8")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        qk.quantize_({}, "w8a8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_that_is_not_finite_names_the_layer_and_changes_nothing(bad, dtype):
    model = Net().to(dtype)
    model.blocks[1].down.weight.data[3, 5] = bad
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"weight of 'blocks.1.down' must be finite"):
        qk.quantize_(model, "w8a8")
    assert_unchanged(model, before)
    assert [*reasons(qk.quantize_(model, "w8a8", skip=["blocks.1.down"]))] == ["blocks.1.down"]


def test_weight_range_beyond_float32_names_the_layer_and_changes_nothing():
    model = Net()
    model.head.weight.data[0, :2] = torch.tensor([3e38, -3e38])
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"weight of 'head' spans more than float32 can hold"):
        qk.quantize_(model, "w4a8-g32-asym")
    assert_unchanged(model, before)
    assert reasons(qk.quantize_(model, "w4a8-g32")) == {}


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def parametrized():
    return parametrizations.weight_norm(nn.Linear(8, 8))


def pruned_bias():
    return prune.random_unstructured(nn.Linear(8, 8), "bias", amount=0.5)


def replaced_forward():
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


def with_a_parameter_of_its_own():
    layer = nn.Linear(8, 8)
    layer.register_parameter("gain", nn.Parameter(torch.ones(8)))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Scaled(8, 8), "Scaled is a subclass of nn.Linear: its forward may compute something else"),
        (lambda: nn.LazyLinear(8), "LazyLinear is a subclass of nn.Linear: its forward may compute something else"),
        (parametrized, "parametrized weight"),
        (pruned_bias, "pruned bias: make it permanent with torch.nn.utils.prune.remove(layer, 'bias')"),
        (with_a_parameter_of_its_own, "parametrized weight"),
        (replaced_forward, "forward is replaced on the instance"),
        (lambda: nn.Linear(8, 8, dtype=torch.float64), "torch.float64 weight"),
        (lambda: nn.Linear(131073, 1), "in_features 131073 is not in 1..131072"),
        (lambda: qk.QuantLinear(8, 8, scheme="w4a16-g32"), "already quantized (w4a16-g32, frozen)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_layers_left_as_they_are(make, reason):
    layer = make()
    model = nn.Sequential(nn.Linear(8, 8), layer)
    report = qk.quantize_(model, "w8a8")
    assert names(report.quantized) == ["0"] and reasons(report) == {"1": reason}
    assert model[1] is layer
    assert report.rows[1].scheme == ("w4a16-g32" if reason.startswith("already quantized") else None)
    assert report.rows[1].bytes_before == report.rows[1].bytes_after
    model = nn.Sequential(nn.Linear(8, 8), layer)
    if reason.startswith("already quantized"):
        assert names(qk.quantize_(model, "w8a8", strict=True).quantized) == ["0"]
    else:
        words = f"strict=True, and nothing was changed: 1 stays in float: {reason}"
        with pytest.raises(ValueError, match=re.escape(words)):
            qk.quantize_(model, "w8a8", strict=True)
        assert type(model[0]) is nn.Linear
        assert names(qk.quantize_(model, "w8a8", skip=["1"], strict=True).quantized) == ["0"]


def test_long_rows_are_fine_with_float_activations():
    model = nn.Sequential(nn.Linear(131073, 1))
    assert qk.quantize_(model, "w8a16", strict=True).left == []


def test_parametrized_layer_keeps_its_parametrization():
    model = nn.Sequential(parametrized())
    qk.quantize_(model, "w8a8")
    assert parametrize.is_parametrized(model[0])


def test_tied_head_stays_in_float_and_stays_tied():
    model = Net(tied=True)
    report = qk.quantize_(model, "w8a8")
    assert reasons(report) == {"head": "tied to embed"}
    assert model.head.weight is model.embed.weight
    with pytest.raises(ValueError, match="head stays in float: tied to embed"):
        qk.quantize_(Net(tied=True), "w8a8", strict=True)
    assert reasons(qk.quantize_(Net(), "w8a8", strict=True)) == {}


def test_two_layers_that_share_one_weight_stay_in_float():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    model["c"].bias = model["a"].bias  # a shared bias is no obstacle: the parameter is kept
    report = qk.quantize_(model, "w8a8")
    assert reasons(report) == {"a": "tied to b", "b": "tied to a"}
    assert model["c"].bias is model["a"].bias


def test_one_module_under_two_names_is_converted_once_and_stays_shared():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    report = qk.quantize_(model, "w8a8")
    assert names(report.rows) == ["first"]
    assert isinstance(model["first"], qk.QuantLinear) and model["second"][0] is model["first"]
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Sequential()})
    model["second"].append(model["first"])
    assert reasons(qk.quantize_(model, "w8a8", skip=["second.*"])) == {"first": "skipped by pattern"}


def test_hooks_training_flag_and_attributes_survive():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    calls = []
    model[0].register_forward_pre_hook(lambda module, args: calls.append(("pre", type(module).__name__)))
    handle = model[0].register_forward_hook(
        lambda module, args, kwargs, out: calls.append(("post", kwargs)), with_kwargs=True
    )
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: calls.append(("backward", None)))
    model[0].note = "kept"
    model[0].register_buffer("steps", torch.tensor(3))
    model[0].eval()
    bias = model[0].bias
    qk.quantize_(model, "w8a8")
    layer = model[0]
    assert isinstance(layer, qk.QuantLinear) and not layer.training and model[1].training
    assert layer.note == "kept" and layer.steps.item() == 3 and layer.bias is bias
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == [("pre", "QuantLinear"), ("post", {}), ("backward", None)]
    handle.remove()
    calls.clear()
    model(torch.randn(2, 8))
    assert calls == [("pre", "QuantLinear")]


def test_second_call_leaves_the_first_layers_alone():
    model = Net()
    qk.quantize_(model, "w8a8", include=["up"])
    up = model.blocks[0].up
    report = qk.quantize_(model, "w4a8-g32", strict=True)
    assert model.blocks[0].up is up and model.blocks[0].down.scheme.name == "w4a8-g32"
    assert {row.name: row.scheme for row in report.rows if row.name != "embed"} == {
        "blocks.0.up": "w8a8", "blocks.0.down": "w4a8-g32", "blocks.1.up": "w8a8", "blocks.1.down": "w4a8-g32",
        "head": "w4a8-g32",
    }  # fmt: skip


def test_quantized_model_trains_what_is_left():
    model = Net()
    qk.quantize_(model, "w8a8", skip=["head"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(20)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.embed.weight.grad.abs().sum() > 0


def test_callbacks_see_model_and_report():
    seen = []
    callback = lambda model, report: seen.append((model, report))  # noqa: E731
    AFTER_QUANTIZE.append(callback)
    try:
        model = Net()
        report = qk.quantize_(model, "w8a8")
    finally:
        AFTER_QUANTIZE.remove(callback)
    assert seen == [(model, report)]


def test_no_warning_without_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qk.quantize_(Net(tied=True), "w4a8-g32")


PEAK_MEMORY = """
import re
import torch
import qkernels as qk

def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))

def model(layers, features, dtype):
    skip_init = torch.nn.utils.skip_init
    linears = [skip_init(torch.nn.Linear, features, features, bias=False, dtype=dtype) for _ in range(layers)]
    for linear in linears:
        torch.nn.init.ones_(linear.weight)
    return torch.nn.Sequential(*linears)

for dtype, scheme in ((torch.float32, "w8a8"), (torch.bfloat16, "w4a8-g32-asym")):
    qk.quantize_(model(1, 64, dtype), scheme)  # whatever is loaded on first use
    big = model(4, 2048, dtype)
    layer = big[0].weight.numel() * big[0].weight.element_size() / 1024
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
    before = kilobytes("VmRSS")
    qk.quantize_(big, scheme)
    print((kilobytes("VmHWM") - before) / layer, (kilobytes("VmRSS") - before) / layer)
"""


def test_peak_memory_stays_below_the_model_and_one_layer():
    # Blocks of 64 KiB and more go back to the system when freed, so that the resident size tells what is alive.
    lines = run_python(PEAK_MEMORY, MALLOC_MMAP_THRESHOLD_="65536", OMP_NUM_THREADS="2").stdout.splitlines()
    for line, kept in zip(lines, (0.26, 0.34), strict=True):
        peak, final = map(float, line.split())
        assert peak < 1.0, f"the peak lay {peak:.2f} layers above the float model"
        assert final < -4 * (1 - kept) + 0.8, f"{-final:.2f} of 4 float layers were freed"


def test_what_follows_the_mode_is_named():
    with pytest.raises(TypeError, match="positional"):
        qk.quantize_(Net(), "w8a8", "qat", ["head"])
    assert qk.quantize_(Net(), "w8a8", "qat").mode == "qat"


def test_a_selection_returns_its_warnings():
    layers, messages = select_layers(Net(), SchemeRules("w8a8"), ["lm_head"], ["up"])
    assert messages == ["skip pattern 'lm_head' matches no layer"]
    assert [layer.name for layer in layers if layer.reason is None] == ["blocks.0.up", "blocks.1.up"]


@pytest.mark.parametrize("breaks", ["weight", "hook"])
def test_a_model_that_cannot_be_frozen_is_left_as_it_was(breaks):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    qk.quantize_(model, "w8a8", "qat")
    if breaks == "weight":
        with torch.no_grad():
            model[1].weight[0, 0] = torch.nan
    else:
        nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    with pytest.raises(RuntimeError, match=r"1 cannot be frozen, and nothing was changed: .*weight"):
        qk.freeze_(model)
    assert [layer.mode for layer in model] == ["qat", "qat"]
