"""`layer.weight`: a frozen one is read and multiplied but not written; products of a trained one are quantized."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import qkernels as qk
from qkernels.autograd.frozen_weight import FrozenWeight

SCHEMES = ("w8a8", "w4a8-g32-asym", "w8a8-ag32", "w4a16-g32")
TRAINED = (("qat", "w8a8", "absmax"), ("qat", "w4a8-g32-asym", "absmax"), ("qat", "w4a8-g32", "learned"))
TRAINED = (*TRAINED, ("int8", "w8a8", "absmax"))


def frozen(scheme="w8a8", **options):
    torch.manual_seed(0)
    return qk.QuantLinear.from_float(nn.Linear(64, 48), scheme, **options)


def gradients(out, leaves, grad_out):
    return torch.autograd.grad(out, leaves, grad_out)


def products(x, layer):
    """By name: the product of x [2, 5, K] with the weight, each way that a parent might write it."""
    w, rows = layer.weight, x.reshape(-1, x.shape[-1])
    return {
        "linear": F.linear(x, w),
        "T": x @ w.T,
        "t": torch.matmul(x, w.t()),
        "mT": x.matmul(w.mT),
        "transpose": x @ w.transpose(0, 1),
        "from the left": (w @ x.mT).mT,
        "mm": torch.mm(rows, w.t()).view(*x.shape[:2], -1),
        "addmm": torch.addmm(torch.zeros(1), rows, w.t()).view(*x.shape[:2], -1),
        "rows": torch.cat([F.linear(x, w[:16]), x @ w[16:].T], dim=-1),
        "vector": torch.stack([torch.stack([w @ v for v in batch]) for batch in x]),
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_with_a_frozen_weight_are_those_of_the_layer(scheme):
    layer, x = frozen(scheme), torch.randn(2, 5, 64, requires_grad=True)
    out = layer(x)
    grad_out = torch.randn_like(out)
    expected = gradients(out, [x, layer.bias], grad_out)
    whole = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(whole, out)
    for got, want in zip(gradients(whole, [x, layer.bias], grad_out), expected, strict=True):
        assert torch.equal(got, want)
    for name, product in products(x, layer).items():
        torch.testing.assert_close(product, F.linear(x, layer.weight), msg=name)
        assert "a16" in scheme or torch.equal(product, F.linear(x, layer.weight)), name
        torch.testing.assert_close(gradients(product, [x], grad_out)[0], expected[0], msg=name)
    with torch.no_grad():
        tile = torch.empty(5, 16)
        torch.mm(x[0], layer.weight[16:32].to(torch.float32).t(), out=tile)
        assert torch.equal(tile, F.linear(x, layer.weight)[0, :, 16:32])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize("make", [frozen, lambda scheme: qk.QuantEmbedding.from_float(nn.Embedding(48, 64), scheme)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_frozen_weight_answers_as_a_float_tensor(scheme, make):
    layer = make(scheme)
    w, values = layer.weight, layer.dequantize()
    assert (w.dtype, w.device, w.shape, w.requires_grad) == (torch.float32, values.device, values.shape, False)
    assert (w.numel(), w.element_size(), w.is_meta, w.dim(), len(w)) == (48 * 64, 4, False, 2, 48)
    assert w.stride() == values.stride() and not isinstance(w, nn.Parameter) and w.grad is None and hash(w)
    assert "FrozenWeight" in repr(w) and w.data_ptr() == layer.qweight.data_ptr()
    index = torch.tensor([[1, 5], [-3, 7]])
    for name, read in {
        "rows": lambda w: w[index],
        "row": lambda w: w[3] + 0,
        "block": lambda w: w[3:9, 2:5] + 0,
        "mask": lambda w: w[w[:, 0] > 0],
        "index_select": lambda w: w.index_select(0, index[0]),
        "embedding": lambda w: F.embedding(index.abs(), w),
        "sum": lambda w: w.sum(0),
        "add": lambda w: w + 1,
        "cat": lambda w: torch.cat([w, w]),
        "double": lambda w: w.double(),
        "einsum": lambda w: torch.einsum("nk,mk->nm", w, torch.ones(2, 64)),
        "clone": lambda w: w.clone(),
        "deepcopy": copy.deepcopy,
        "pickle": lambda w: pickle.loads(pickle.dumps(w)),
        "list": lambda w: torch.tensor(w.tolist()),
        "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    }.items():
        got = read(w)
        assert type(got) is torch.Tensor and torch.equal(got, read(values)), name
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight + 0, values.to(torch.bfloat16))
    assert (
        set(layer.state_dict()) == {name for name, _ in layer.named_parameters()} and "weight" not in layer.state_dict()
    )


def test_a_copy_of_a_frozen_weight_can_be_changed():
    layer = frozen()
    values = layer.dequantize()
    changed = layer.weight.to(torch.bfloat16)
    changed[0].zero_()
    changed.mul_(2)
    expected = values.bfloat16() * 2
    expected[0] = 0
    assert torch.equal(changed + 0, expected) and torch.equal(layer.dequantize(), values)


WRITES = {
    "data =": lambda layer, t: setattr(layer.weight, "data", t),
    "requires_grad_": lambda layer, t: layer.weight.requires_grad_(True),
    "requires_grad =": lambda layer, t: setattr(layer.weight, "requires_grad", True),
    "grad =": lambda layer, t: setattr(layer.weight, "grad", t),
    "add_": lambda layer, t: layer.weight.add_(1),
    "data.mul_": lambda layer, t: layer.weight.data.mul_(2),
    "detach.copy_": lambda layer, t: layer.weight.detach().copy_(t),
    "row": lambda layer, t: layer.weight[0].zero_(),
    "rows": lambda layer, t: layer.weight[1:3].zero_(),
    "setitem": lambda layer, t: layer.weight.__setitem__(slice(-2, None), t[-2:]),
    "columns": lambda layer, t: layer.weight.data[:, 0].fill_(1),
    "view": lambda layer, t: layer.weight.view(-1).zero_(),
    "T": lambda layer, t: layer.weight.T.zero_(),
    "chunk": lambda layer, t: layer.weight.chunk(2)[0].zero_(),
    "unbind": lambda layer, t: layer.weight.unbind()[0].zero_(),
    "out=": lambda layer, t: torch.add(t, t, out=layer.weight),
    "foreach": lambda layer, t: torch._foreach_mul_([layer.weight], 2.0),
    "inplace=": lambda layer, t: F.relu(layer.weight, inplace=True),
    "index_copy_": lambda layer, t: layer.weight.index_copy_(0, torch.tensor([1]), t[:1]),
    "set_": lambda layer, t: layer.weight.set_(t),
    "init": lambda layer, t: nn.init.kaiming_uniform_(layer.weight),
    "vector_to_parameters": lambda layer, t: nn.utils.vector_to_parameters(t.flatten(), [layer.weight]),
    "assign a parameter": lambda layer, t: setattr(layer, "weight", nn.Parameter(t)),
    "assign a tensor": lambda layer, t: setattr(layer, "weight", t),
    "assign None": lambda layer, t: setattr(layer, "weight", None),
    "delete": lambda layer, t: delattr(layer, "weight"),
    "register": lambda layer, t: layer.register_parameter("weight", nn.Parameter(t)),
    "Parameter": lambda layer, t: nn.Parameter(layer.weight),
    "prune": lambda layer, t: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_write_to_a_frozen_weight_is_refused(kind, write):
    layer = frozen() if kind == "linear" else qk.QuantEmbedding.from_float(nn.Embedding(48, 64), "w8a8")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"read-only.*set_weight.*skip=.*dequantize|cannot be pruned: .*qat"):
        write(layer, torch.zeros(48, 64))
    after = layer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
def test_a_frozen_weight_can_be_assigned_to_its_own_layer_alone(scheme):
    """As PEFT does when it puts the base layer back."""
    for make in (frozen, lambda scheme: qk.QuantEmbedding.from_float(nn.Embedding(48, 64), scheme)):
        layer, other = make(scheme), make(scheme)
        layer.weight = layer.weight
        with pytest.raises(RuntimeError, match="read-only"):
            layer.weight = other.weight


def test_a_frozen_weight_cannot_become_the_parameter_of_another_layer():
    with pytest.raises(TypeError, match="Parameter"):
        nn.Linear(64, 48).weight = frozen().weight


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym"])
def test_a_compiled_parent_multiplies_a_frozen_weight(scheme):
    layer, x = frozen(scheme), torch.randn(2, 5, 64, requires_grad=True)

    def parent(x):
        return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias) + x @ layer.weight.T

    torch._dynamo.reset()
    out = torch.compile(parent, backend="aot_eager")(x)
    assert torch.equal(out, parent(x))
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (out, parent(x))))
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


class Parent(nn.Module):
    """It multiplies the weight of its layer in one of these ways, and reads what others read."""

    WAYS = {
        "linear": lambda w, x: F.linear(x.to(w.device, w.dtype), w),
        "t": lambda w, x: x @ w.t(),
        "rows": lambda w, x: torch.cat([F.linear(x, w[:16]), x.matmul(w[16:].T)], dim=-1),
        "chunks": lambda w, x: torch.cat([x @ rows.mT for rows in w.chunk(3)], dim=-1),
        "cast": lambda w, x: torch.addmm(torch.zeros(1), x, w.to(x.dtype).transpose(0, 1)),
        "values": lambda w, x: torch.einsum("bk,nk->bn", x, w) + w.norm() * w.shape[0],
    }

    def __init__(self, layer, ways=tuple(WAYS)):
        super().__init__()
        self.layer, self.ways = layer, ways

    def forward(self, x):
        return torch.cat([self.WAYS[way](self.layer.weight, x) for way in self.ways] + [self.layer(x)], dim=-1)


@pytest.mark.parametrize("was_read", [False, True])
@pytest.mark.parametrize("mode, scheme, weight_scale", [("frozen", "w4a8-g32-asym", "absmax"), *TRAINED])
def test_exported_parents_multiply_the_weight_of_the_layer(mode, scheme, weight_scale, was_read):
    parent, x = Parent(frozen(scheme, mode=mode, weight_scale=weight_scale)), torch.randn(3, 64)
    expected = Parent(copy.deepcopy(parent.layer))(x)
    if was_read:
        parent.layer.weight  # noqa: B018
    for strict in (False, True):
        torch._dynamo.reset()
        program = torch.export.export(parent, (x,), strict=strict)
        assert torch.equal(program.module()(x), expected), strict


def test_a_parent_of_a_trained_layer_that_is_compiled_as_one_graph_is_told_why_it_cannot():
    torch._dynamo.reset()
    parent = Parent(frozen(mode="qat"))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"weight of a quantized layer.*fullgraph=True.*freeze_"):
        torch.compile(parent, backend="aot_eager", fullgraph=True)(torch.randn(3, 64))


@pytest.mark.parametrize("mode", ["frozen", "qat"])
def test_exported_parents_multiply_the_kernels_of_a_convolution(mode):
    torch.manual_seed(0)
    layer = qk.QuantConv2d.from_float(nn.Conv2d(8, 16, 3), "w8a8", mode=mode)
    parent, x = Parent(layer, ways=()), torch.randn(2, 8, 6, 6)
    parent.forward = lambda x: F.conv2d(x, layer.weight, layer.bias) + layer(x)
    expected = parent(x)
    assert torch.equal(torch.export.export(parent, (x,)).module()(x), expected)


def test_an_exported_write_to_a_frozen_weight_is_refused():
    parent = Parent(frozen(), ways=())
    parent.forward = lambda x: parent.layer.weight.mul_(2).sum() + x
    with pytest.raises(RuntimeError, match=r"mul_.*read-only.*set_weight"):
        torch.export.export(parent, (torch.randn(3, 64),))


def test_a_frozen_weight_on_meta_and_without_memory():
    from torch._subclasses import FakeTensorMode

    layer = qk.QuantLinear(64, 48, scheme="w4a8-g32", device="meta")
    assert layer.weight.is_meta and F.linear(torch.empty(3, 64, device="meta"), layer.weight).shape == (3, 48)
    with FakeTensorMode():
        layer = qk.QuantLinear(64, 48)
        assert (torch.empty(3, 64) @ layer.weight.T).shape == (3, 48)
    layer, x = frozen(), torch.randn(3, 64)
    with torch.inference_mode():
        assert torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))
    assert isinstance(layer.weight, FrozenWeight) and layer.weight is not layer.weight


@pytest.mark.parametrize("mode, scheme, weight_scale", TRAINED)
def test_products_with_a_trained_weight_are_those_of_the_layer(mode, scheme, weight_scale):
    layer, x = frozen(scheme, mode=mode, weight_scale=weight_scale), torch.randn(2, 5, 64, requires_grad=True)
    parameter = next(p for name, p in layer.named_parameters() if name == "weight")
    out = layer(x) - layer.bias
    grad_out = torch.randn_like(out)
    leaves = [x, parameter, *([layer.scales] if weight_scale == "learned" else [])]
    expected = gradients(out, leaves, grad_out)
    assert layer.weight is parameter and isinstance(parameter, nn.Parameter)
    for name, product in products(x, layer).items():
        torch.testing.assert_close(product, out, msg=name)
        for got, want in zip(gradients(product, leaves, grad_out), expected, strict=True):
            torch.testing.assert_close(got, want, msg=name)
    rows = torch.randn(3, 48)
    torch.testing.assert_close(rows @ layer.weight, rows @ layer.dequantize())
    einsum = torch.einsum("bsk,nk->bsn", x, layer.weight)
    torch.testing.assert_close(einsum, x @ layer.dequantize().T)


@pytest.mark.parametrize("mode, scheme, weight_scale", TRAINED)
def test_a_trained_weight_that_was_read_stays_a_parameter(mode, scheme, weight_scale):
    layer, x = frozen(scheme, mode=mode, weight_scale=weight_scale), torch.randn(3, 64)
    layer.weight  # noqa: B018  the parameter is followed from now on
    out = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), out) and torch.equal(F.linear(x, twin.weight, twin.bias), out)
    assert all(type(tensor.data) is torch.Tensor for tensor in layer.state_dict().values())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == layer.state_dict().keys()
    if mode == "qat":
        assert type(pickle.loads(pickle.dumps(layer.weight))) is nn.Parameter
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    layer(x).sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x), out)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))

    def parent(x):
        return F.linear(x, layer.weight, layer.bias)

    assert torch.equal(torch.compile(parent, backend="aot_eager")(x), layer(x))
    with pytest.warns(UserWarning, match=r"cat takes the weight of QuantLinear\(.*skip="):
        torch.cat([layer.weight, layer.weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.weight.detach().clone().norm()


@pytest.mark.parametrize("mode", ["frozen", "qat", "int8"])
def test_keyword_input(mode):
    layer, x = frozen(mode=mode), torch.randn(3, 64)
    assert torch.equal(layer(input=x), layer(x))


def small_net():
    net = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    qk.quantize_(net, "w8a8", embeddings=True)
    return net, torch.arange(6)


def test_fx_takes_a_layer_as_it_is_and_torchscript_is_refused():
    net, x = small_net()
    graph = torch.fx.symbolic_trace(net)
    assert torch.equal(graph(x), net(x)) and [n.op for n in graph.graph.nodes].count("call_module") == 4
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile a Quant.*torch\.export"):
        torch.jit.script(net)
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        net[1]([1.0])


def test_flops_are_those_of_the_float_layers():
    from torch.utils.flop_counter import FlopCounterMode

    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    x = torch.randn(8, 32, requires_grad=True)
    forward = 2 * 8 * (32 * 48 + 48 * 16)
    for quantized, backward in ((False, 2), (True, 1)):  # the frozen weight gets no gradient
        if quantized:
            qk.quantize_(net, "w8a8")
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        assert counter.get_total_flops() == forward * (1 + backward)


def test_a_layer_is_not_frozen_with_a_parametrization_that_is_no_mask():
    layer, x = frozen(mode="qat"), torch.randn(3, 64)
    parametrize.register_parametrization(layer, "weight", nn.Softsign())
    out = layer(x)
    with pytest.raises(RuntimeError, match="remove_parametrizations"):
        layer.freeze_()
    assert layer.mode == "qat" and torch.equal(layer(x), out)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.freeze_()(x), out)
