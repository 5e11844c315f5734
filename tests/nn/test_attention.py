"""`QuantMultiheadAttention` computes what `nn.MultiheadAttention` does, with quantized projections."""

import copy
import itertools

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk

E, HEADS, BATCH, QUERIES, KEYS = 32, 4, 3, 5, 7

OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    {"kdim": 24, "vdim": 40, "batch_first": True},
    {"kdim": 24, "bias": False, "add_bias_kv": True},
]


def attention(seed=0, **options) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(E, HEADS, **options).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def inputs(layer, kind, batched=True):
    """query, key, value; and the length of the keys."""

    def sequence(length, features):
        x = torch.randn(*([BATCH] if batched else []), length, features)
        return x.transpose(0, 1) if batched and not layer.batch_first else x

    query = sequence(QUERIES, E)
    if kind == "self":
        return query, query, query, QUERIES
    if kind == "memory":
        memory = sequence(KEYS, E)
        return query, memory, memory, KEYS
    return query, sequence(KEYS, layer.kdim), sequence(KEYS, layer.vdim), KEYS


def masks(keys, batched):
    """Names, and the keyword arguments of a call."""
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[:, -2:] = True
    padding = padding if batched else padding[0]
    some = torch.rand(QUERIES, keys) < 0.3
    some[:, 0] = False
    each = torch.randn((BATCH if batched else 1) * HEADS, QUERIES, keys)
    floats = torch.zeros_like(padding, dtype=torch.float).masked_fill(padding, -torch.inf)
    causal = {"attn_mask": torch.triu(torch.full((QUERIES, keys), -torch.inf), 1), "is_causal": True}
    return {
        "none": {},
        "bool": {"attn_mask": some},
        "each head": {"attn_mask": each},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": some, "key_padding_mask": padding},
        "both in float": {"attn_mask": each, "key_padding_mask": floats},
        "causal": causal,
        "causal and padding": {**causal, "key_padding_mask": floats},
    }


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_its_arguments_mean_what_they_mean_to_the_float_layer(options, batched):
    """The twin, in float still, against the layer."""
    layer = attention(**options)
    twin = qk.QuantMultiheadAttention(layer)
    for kind in ("self", "memory", "three") if "kdim" not in options else ("three",):
        *tensors, keys = inputs(layer, kind, batched)
        for (name, arguments), weights, average in itertools.product(
            masks(keys, batched).items(), (True, False), (True, False)
        ):
            if name.startswith("causal") and (kind != "self" or layer.bias_k is not None or layer.add_zero_attn):
                continue  # torch takes the hint for the mask, and loses the columns that were added
            call = {**arguments, "need_weights": weights, "average_attn_weights": average}
            for actual, expected in zip(twin(*tensors, **call), layer(*tensors, **call), strict=True):
                assert (actual is None) == (expected is None)
                if actual is not None:
                    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4, msg=f"{kind}, {name}")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
def test_projections_are_the_products_of_quantized_linear_layers(kind, scheme):
    layer = attention(batch_first=True)
    quantized = qk.QuantMultiheadAttention.from_float(layer, scheme)
    query, key, value, _ = inputs(layer, kind)
    whole = nn.Linear(E, 3 * E)
    whole.weight, whole.bias = layer.in_proj_weight, layer.in_proj_bias
    whole, last = (qk.QuantLinear.from_float(part, scheme) for part in (whole, layer.out_proj))
    q, k, v = (
        whole(x).chunk(3, dim=-1)[part].unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part, x in enumerate((query, key, value))
    )
    heads = nn.functional.scaled_dot_product_attention(q, k, v)
    out, _ = quantized(query, key, value, need_weights=False)
    assert_same_bits(out, last(heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
def test_gradients_are_those_of_the_float_layer_but_for_the_rounding(kind, mode):
    layer = attention(batch_first=True).train()
    quantized = qk.QuantMultiheadAttention.from_float(copy.deepcopy(layer), "w8a8", mode=mode)
    *tensors, _ = inputs(layer, kind)
    found = []
    for each in (layer, quantized):
        leaf = tensors[0].detach().requires_grad_()
        query, key, value = (leaf if x is tensors[0] else x for x in tensors)
        each(query, key, value)[0].square().sum().backward()
        weight = each.in_proj_weight.grad if mode != "frozen" or each is layer else None
        found.append((leaf.grad, each.in_proj_bias.grad, each.out_proj.bias.grad, weight))
    for expected, actual in zip(*found, strict=True):
        if actual is not None:
            assert (actual - expected).norm() < 0.1 * expected.norm()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Transformer(E, HEADS, 1, 1, 64, batch_first=True)
        self.head = nn.Linear(E, 8)

    def forward(self, source, target):
        return self.head(self.body(source, target))


def model_and_inputs():
    torch.manual_seed(0)
    return Model().eval(), (torch.randn(2, QUERIES, E), torch.randn(2, KEYS, E))


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_a_transformer_of_torch_is_quantized_whole(mode):
    model, x = model_and_inputs()
    expected = model(*x)
    before = copy.deepcopy(model.state_dict())
    report = qk.quantize_(model, "w8a8", mode, strict=True)
    assert len(report.quantized) == 11 and report.quantized_share == 1
    notes = {row.name: row.note for row in report.rows}
    assert notes["body.encoder.layers.0.linear1"] == "nn.TransformerEncoderLayer's fast path is off: it reads floats"
    assert notes["body.decoder.layers.0.self_attn.in_proj"].startswith("nn.MultiheadAttention's fast path is off")
    assert notes["body.decoder.layers.0.linear1"] is notes["head"] is None
    with torch.no_grad():
        out = model(*x)
    assert 0 < (out - expected).norm() < 0.03 * expected.norm()
    other, _ = model_and_inputs()
    qk.quantize_(other, "w8a8", mode)
    other.load_state_dict(model.state_dict())
    assert_same_bits(other(*x), out)
    if mode == "qat":
        other.load_state_dict(before)  # of the float model
        assert_same_bits(other(*x), out)
    assert_same_bits(qk.freeze_(other)(*x), out)
    qk.dequantize_(model)
    assert list(model.state_dict()) == list(before)
    assert type(model.body.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert (model(*x) - expected).norm() < 0.03 * expected.norm()


def test_the_fast_path_is_not_taken():
    """It would multiply what it takes for float weights; evaluation without gradients is where torch takes it."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 64, batch_first=True), 2).eval()
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1, 3:] = True
    x = torch.randn(BATCH, QUERIES, E)
    model = nn.ModuleList([encoder])
    qk.quantize_(model, "w8a8")
    with torch.no_grad():
        out = encoder(x, src_key_padding_mask=padding)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = encoder(x, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert_same_bits(out, expected)


def test_calibration_reaches_the_projections():
    model, x = model_and_inputs()
    mix = torch.randn(E, E) / 4
    batches = [tuple(torch.randn(8, length, E) @ mix for length in (QUERIES, KEYS)) for _ in range(8)]
    x = tuple(part @ mix for part in x)
    expected, errors = model(*x), []
    for calibration in (None, batches):
        quantized = copy.deepcopy(model)
        assert qk.quantize_(quantized, "w4a8-g32", calibration=calibration, strict=True).warnings == []
        errors.append((quantized(*x) - expected).norm())
    assert errors[1] < 0.9 * errors[0]
    assert torch.backends.mha.get_fastpath_enabled() and "forward" not in vars(model.body.encoder.layers[0].self_attn)


def test_skipped_projections_stay_in_float():
    model, x = model_and_inputs()
    report = qk.quantize_(model, "w8a8", skip=["*.in_proj"])
    layer = model.body.encoder.layers[0].self_attn
    assert type(layer.in_proj) is nn.Linear and isinstance(layer.out_proj, qk.QuantLinear)
    assert sum(row.reason == "skipped by pattern" for row in report.rows) == 3
    model(*x)
    untouched, _ = model_and_inputs()
    qk.quantize_(untouched, "w8a8", skip=["*self_attn*", "*multihead_attn*"])
    assert type(untouched.body.encoder.layers[0].self_attn) is nn.MultiheadAttention
    untouched(*x)


class Shifted(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_subclass_stays_in_float_with_the_reason():
    model = nn.ModuleList([Shifted(E, HEADS), nn.Linear(E, E)])
    report = qk.quantize_(model, "w8a8")
    reason = "Shifted is a subclass of nn.MultiheadAttention: its forward may compute something else"
    assert [row.reason for row in report.rows] == [reason, reason, None]
    with pytest.raises(TypeError, match="Shifted is a subclass"):
        qk.QuantMultiheadAttention.from_float(model[0], "w8a8")
    with pytest.raises(TypeError, match=r"must be an nn\.MultiheadAttention, got Linear"):
        qk.QuantMultiheadAttention.from_float(nn.Linear(2, 2), "w8a8")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(2, 5, E), (2, 5, E), (2, 6, E)], "key and value must have one length"),
        ([(2, 5, E), (3, 5, E), (3, 5, E)], "one batch size"),
        ([(2, 5, E), (5, E), (5, E)], "all be batched"),
        ([(2, 5, 3), (2, 5, E), (2, 5, E)], r"query must have 32 features, got shape \[2, 5, 3\]"),
    ],
)
def test_wrong_shapes_are_refused(shapes, words):
    layer = qk.QuantMultiheadAttention.from_float(attention(batch_first=True), "w8a8")
    with pytest.raises(RuntimeError, match=words):
        layer(*map(torch.zeros, shapes))


def test_other_wrong_arguments_are_refused():
    layer, x = qk.QuantMultiheadAttention.from_float(attention(batch_first=True), "w8a8"), torch.randn(2, 5, E)
    for arguments, words in (
        ({"is_causal": True}, "hint about attn_mask"),
        ({"attn_mask": torch.zeros(4, 5)}, r"attn_mask must have shape \(5, 5\) or \(8, 5, 5\), got \[4, 5\]"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "attn_mask must be bool or float"),
        ({"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, r"key_padding_mask must have shape \(2, 5\)"),
    ):
        with pytest.raises(RuntimeError, match=words):
            layer(x, x, x, **arguments)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    with pytest.raises(RuntimeError, match="no nested tensors"):
        layer(nested, nested, nested)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    layer = attention(batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 5, E)
    expected = layer(x, x, x)[0]
    half = qk.QuantMultiheadAttention.from_float(copy.deepcopy(layer).to(dtype), "w8a8")
    out = half(x.to(dtype), x.to(dtype), x.to(dtype))[0]
    assert out.dtype == dtype and (out - expected).norm() < 0.05 * expected.norm()
    with torch.autocast("cpu", dtype):
        out = qk.QuantMultiheadAttention.from_float(layer, "w8a8")(x, x, x)[0]
    assert out.dtype == dtype and (out - expected).norm() < 0.05 * expected.norm()


def test_dropout_and_copies_and_compiled_code():
    layer = qk.QuantMultiheadAttention.from_float(attention(batch_first=True, dropout=0.5), "w8a8")
    x = torch.randn(2, 5, E)
    assert_same_bits(layer(x, x, x)[0], layer(x, x, x)[0])
    assert_same_bits(copy.deepcopy(layer)(x, x, x)[0], layer(x, x, x)[0])
    assert_same_bits(torch.compile(layer, backend="aot_eager")(x, x, x)[0], layer(x, x, x)[0])
    other = torch.randn(2, 7, E)
    for mode in ("qat", "int8"):
        torch._dynamo.reset()
        trained = qk.QuantMultiheadAttention.from_float(attention(batch_first=True), "w8a8", mode=mode)
        compiled = torch.compile(trained, backend="aot_eager", fullgraph=True)
        assert_same_bits(compiled(x, other, other)[0], trained(x, other, other)[0], mode)
    layer.train()
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_an_adapter_of_a_projection_is_never_passed_over():
    """PEFT wraps a projection, and then has its part in every call, also where rows would do."""
    peft = pytest.importorskip("peft")
    model, x = model_and_inputs()
    qk.quantize_(model, "w8a8")
    with pytest.raises(ValueError, match=r"name the projections of quantized attention.*in_proj.*out_proj"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["self_attn"]))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False))
    model.eval()
    for layer in (model.body.encoder.layers[0].self_attn, model.body.decoder.layers[0].multihead_attn):
        out = layer(x[0], x[1], x[1])[0]
        with model.disable_adapter():
            assert not torch.allclose(layer(x[0], x[1], x[1])[0], out)
    model(*x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_a_mask_of_the_projection_holds_in_cross_attention():
    torch.manual_seed(0)
    layer = qk.QuantMultiheadAttention.from_float(nn.MultiheadAttention(32, 4), "w8a8", mode="int8")
    mask = torch.rand(96, 32) < 0.5
    layer.in_proj.keep_zeros(mask)
    query, key = torch.randn(5, 2, 32), torch.randn(7, 2, 32)
    layer(query, key, key)[0].square().sum().backward()
    weight = layer.in_proj._parameters["weight"]
    assert weight.grad[mask].any() and not weight.grad[~mask].any()
