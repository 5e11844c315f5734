"""A layer whose columns have an order of their own computes as one without, on gathered features."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers_models import build

import qkernels as qk
from qkernels.checkpoints.losses import Losses
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.checkpoints.requantize import dequantize

SCHEMES = ("w8a8", "w4a16-g32", "w4a8-g32-asym")


def layers(scheme="w4a8-g32", grad_dtype="float", k=96, n=8):
    """A layer with an order, the same weight without one, and the order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(k, generator=generator).to(torch.int32)
    plain = qk.QuantLinear(k, n, scheme=scheme, grad_dtype=grad_dtype)
    plain.set_weight(qk.quantize_weight(torch.randn(n, k, generator=generator), scheme))
    plain.bias.data = torch.randn(n, generator=generator)
    ordered = copy.deepcopy(plain)
    ordered.set_weight(plain.quantized_weight(), order)
    return ordered, plain, order.long()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grad_dtype", ["float", "int8"])
@pytest.mark.parametrize("product", ["layer", "weight", "transposed"])
def test_products_and_gradients(scheme, grad_dtype, product):
    ordered, plain, order = layers(scheme, grad_dtype)
    x = torch.randn(2, 5, 96)
    outs, grads = [], []
    for layer, given in ((ordered, x), (plain, x[..., order])):
        given = given.clone().requires_grad_()
        torch.manual_seed(1)
        if product == "layer":
            out = layer(given)
        elif product == "weight":
            out = F.linear(given, layer.weight, layer.bias)
        else:
            out = given @ layer.weight.t() + layer.bias
        out.backward(torch.ones_like(out) * torch.arange(8))
        outs.append(out.detach())
        grads.append(given.grad)
    assert torch.equal(*outs)
    assert torch.equal(grads[0][..., order], grads[1])
    assert torch.equal(ordered(x), outs[0]) or product != "layer"
    with torch.no_grad():
        assert torch.equal(ordered(x), plain(x[..., order]))


def test_the_weight_has_the_order_of_the_features():
    ordered, plain, order = layers("w4a16-g32-asym")
    weight = ordered.dequantize()
    assert torch.equal(weight[:, order], plain.dequantize())
    assert torch.equal(ordered.weight.clone(), weight)
    assert torch.equal(ordered.weight[2:4].clone(), weight[2:4])
    assert torch.equal(ordered.weight[torch.tensor([1, 5])], weight[[1, 5]])
    assert torch.equal(ordered.weight.t().clone(), weight.t())
    assert torch.equal(ordered.weight.to(torch.bfloat16).clone(), weight.to(torch.bfloat16))
    x = torch.randn(3, 96)
    torch.testing.assert_close(ordered(x), F.linear(x, weight, ordered.bias))
    assert torch.equal(F.linear(x, ordered.weight[2:5]), F.linear(x[:, order], plain.weight[2:5]))
    ordered.weight = ordered.weight  # as parents that tie weights do
    model = nn.Sequential(copy.deepcopy(ordered))
    qk.dequantize_(model)
    assert torch.equal(model[0].weight, weight)


def test_the_order_goes_where_the_weight_goes():
    ordered, plain, _ = layers()
    state, x = ordered.state_dict(), torch.randn(3, 96)
    expected = ordered(x)
    assert state["input_order"].dtype == torch.int32 and "input_order" not in plain.state_dict()
    for assign in (False, True):
        fresh = qk.QuantLinear(96, 8, scheme="w4a8-g32")
        assert not any(fresh.load_state_dict(state, assign=assign))
        assert torch.equal(fresh(x), expected)
        assert not any(fresh.load_state_dict(plain.state_dict(), assign=assign))  # which has none
        assert fresh.input_order is None and torch.equal(fresh(x), plain(x))
    on_meta = qk.QuantLinear(96, 8, scheme="w4a8-g32", device="meta")
    on_meta.load_state_dict(state, assign=True)
    assert torch.equal(on_meta(x), expected)
    file = io.BytesIO()
    torch.save(ordered, file)
    file.seek(0)
    for other in (copy.deepcopy(ordered), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
    for cast in ("half", "bfloat16", "float"):
        assert getattr(copy.deepcopy(ordered), cast)().input_order.dtype == torch.int32
    assert torch.equal(copy.deepcopy(ordered).type(torch.float16).input_order, ordered.input_order)
    ordered.set_weight(plain.quantized_weight())
    assert ordered.input_order is None and torch.equal(ordered(x), plain(x))


def test_orders_that_do_not_fit_are_refused():
    ordered, plain, order = layers()
    expected = ordered.dequantize()
    for wrong, words in (
        (order, "must be torch.int32"),
        (order[:5].to(torch.int32), r"must be torch.int32 of shape \[96\], got torch.int32 of \[5\]"),
        (torch.zeros(96, dtype=torch.int32), "must be a permutation of 96 features"),
    ):
        with pytest.raises(ValueError, match=f"input_order {words}"):
            ordered.set_weight(plain.quantized_weight(), wrong)
        with pytest.raises(RuntimeError, match=f"input_order {words}"):
            ordered.load_state_dict({**ordered.state_dict(), "input_order": wrong}, strict=False)
    assert torch.equal(ordered.dequantize(), expected)
    with pytest.raises(RuntimeError, match="qweight is missing"):
        ordered.load_state_dict({"input_order": ordered.input_order.flip(0)}, strict=False)
    trained, _, order = layers("w8a8")
    with pytest.raises(ValueError, match="input_order must be None for mode='int8'"):
        trained.thaw_int8_()
    int8 = qk.QuantLinear(96, 8, scheme="w8a8", mode="int8")
    with pytest.raises(ValueError, match="input_order must be None in mode 'int8'"):
        int8.set_weight(trained.quantized_weight(), order.to(torch.int32))
    with pytest.raises(RuntimeError, match="input_order is given, but a QuantLinear of mode 'int8' has none"):
        int8.load_state_dict(trained.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="input_order is given, but a QuantEmbedding"):
        qk.QuantEmbedding(8, 96, "w4a16-g32").load_state_dict(layers("w4a16-g32")[0].state_dict(), strict=False)


def test_programs_that_record_a_layer():
    ordered, plain, order = layers()
    x = torch.randn(3, 96)
    expected = plain(x[:, order])
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(ordered, x)(x), expected)
        assert torch.equal(torch.export.export(ordered, (x,)).module()(x), expected)
    assert torch.equal(torch.func.vmap(ordered)(x), expected)
    tangents = torch.func.jvp(ordered, (x,), (x,))[1], torch.func.jvp(plain, (x[:, order],), (x[:, order],))[1]
    assert torch.equal(*tangents)
    grads = [
        torch.func.grad(lambda v, layer=layer: layer(v).sum())(v) for layer, v in ((ordered, x), (plain, x[:, order]))
    ]
    assert torch.equal(grads[0][:, order], grads[1])


@pytest.mark.slow
def test_a_compiled_layer():
    ordered, plain, order = layers()
    x = torch.randn(3, 96, requires_grad=True)
    compiled = torch.compile(ordered, fullgraph=True)
    compiled(x).sum().backward()
    given = x.detach()[:, order].requires_grad_()
    plain(given).sum().backward()
    assert torch.equal(compiled(x), plain(given)) and torch.equal(x.grad[:, order], given.grad)


def test_the_loss_of_a_head():
    ordered, plain, order = layers("w8a8")
    hidden, target = torch.randn(6, 96), torch.arange(6)
    losses, grads = [], []
    for head, given in ((ordered, hidden), (plain, hidden[:, order])):
        given = given.clone().requires_grad_()
        torch.manual_seed(1)
        loss = qk.linear_cross_entropy(given, head, target)
        loss.backward()
        losses.append(loss.detach())
        grads.append(given.grad)
    assert torch.equal(*losses) and torch.equal(grads[0][:, order], grads[1])


def llama_with_order():
    model = build("llama")
    qk.quantize_(model, "w4a16-g32")
    ordered = [module for module in model.modules() if isinstance(module, qk.QuantLinear)]
    for layer in ordered[::2]:
        order = torch.randperm(layer.in_features).to(torch.int32)
        weight = layer.dequantize()[:, order.long()]
        layer.set_weight(qk.quantize_weight(weight, layer.scheme), order)
    return model


def test_adapters_train_and_merge():
    peft = pytest.importorskip("peft")
    model, ids = llama_with_order(), torch.arange(12).view(2, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    floats = copy.deepcopy(model)
    qk.dequantize_(floats)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    expected = peft.get_peft_model(floats, config)
    expected.load_state_dict(
        {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}, strict=False
    )
    losses = []
    for one in (adapted, expected):
        loss = one(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    theirs = dict(expected.named_parameters())
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-2)
    layer = next(m for m in adapted.modules() if isinstance(m, qk.QuantLinear) and m.input_order is not None)
    order = layer.input_order.clone()
    adapted.merge_adapter()
    assert torch.equal(layer.input_order, order)
    errors = qk.integrations.peft.merge_errors(adapted)
    assert len(errors) > 3 and max(errors.values()) < 0.2
    adapted.unmerge_adapter()
    restored = adapted.unload().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in before.items())


def test_a_saved_model_keeps_the_orders(tmp_path):
    """In our own folder, and in one of GPTQ with activation order, which transformers loads too."""
    model, ids = llama_with_order(), torch.arange(12).view(2, 6)
    model.save_pretrained(tmp_path / "model")
    entries = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["layers"]
    ordered = {name for name, entry in entries.items() if isinstance(entry, dict)}
    assert ordered and all(entries[name]["input_order"] is True for name in ordered)
    loaded = type(model).from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    found = open_checkpoint(tmp_path / "model")
    assert {name for name, layer in found.layers.items() if layer.has_input_order} == ordered
    for name, layer in found.layers.items():
        read = dequantize(layer.read(), layer.in_features, layer.scheme)
        assert torch.equal(read, model.get_submodule(name).dequantize())
    parse_target("gptq")[0].write(found, tmp_path / "gptq", Losses("report"))
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] and open_checkpoint(tmp_path / "gptq").format == "gptq"
    imported = copy.deepcopy(qk.load(tmp_path / "gptq"))
    with torch.no_grad():
        torch.testing.assert_close(imported(ids).logits, model(ids).logits, atol=2e-3, rtol=1e-3)
    orders = {name for name, module in imported.named_modules() if getattr(module, "input_order", None) is not None}
    assert orders == ordered


def test_tensor_parallelism_refuses_an_order():
    from torch.distributed.tensor import DTensor  # noqa: F401  (the layer refuses before it looks at the mesh)

    ordered, _, _ = layers()
    with pytest.raises(NotImplementedError, match=r"input_order .activation order of GPTQ. cannot be shared out"):
        ordered._share_out("weight", None)
