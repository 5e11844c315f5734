"""`QuantLinear` under torch.compile, torch.func, threads and fork."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_same_bits, run_python
from torch import nn

from qkernels import QuantLinear
from qkernels.kernels import isa

K, N = 70, 19


def model_of(scheme: str) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        QuantLinear.from_float(nn.Linear(K, N), scheme), nn.ReLU(), QuantLinear.from_float(nn.Linear(N, 5), scheme)
    )


def forward_and_gradients(model, x: torch.Tensor, weights: nn.Module) -> list[torch.Tensor]:
    weights.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return [out.detach(), x.grad, *(p.grad for p in weights.parameters() if p.grad is not None)]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym", "w4a16-g32"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_traces_the_whole_graph(scheme, autocast, fresh_compiler):
    model = model_of(scheme)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((4, K), (4, K), (2, 3, K)):
        x = torch.randn(shape)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            expected, actual = forward_and_gradients(model, x, model), forward_and_gradients(compiled, x, model)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b, f"{scheme} {shape}")


def test_compile_with_dynamic_shapes_compiles_once(fresh_compiler):
    model = model_of("w8a8")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for rows in (2, 3, 50, 7):
            x = torch.randn(rows, K)
            assert_same_bits(compiled(x), model(x), str(rows))
    assert len(graphs) == 1


def test_compile_by_inductor(fresh_compiler):
    model = model_of("w4a8-g32-asym")
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, K)
    expected, actual = forward_and_gradients(model, x, model), forward_and_gradients(compiled, x, model)
    assert_same_bits(actual[0], expected[0])
    for a, b in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the sum of the bias gradient may be reordered


def test_export():
    model = model_of("w8a8").eval()
    x = torch.randn(4, K)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    for rows in (4, 9):
        x = torch.randn(rows, K)
        assert_same_bits(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_functional_gradients_and_vmap():
    layer = model_of("w8a8")[0]
    x = torch.randn(3, K)
    expected = torch.ones(3, N) @ layer.dequantize()
    gradient = torch.func.grad(lambda v: layer(v).sum())(x)
    torch.testing.assert_close(gradient, expected)
    assert_same_bits(torch.func.vmap(layer)(x.view(3, 1, K)).view(3, N), layer(x))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda v: layer(v).sum()))(x), expected)
    state = {name: p.detach() for name, p in layer.named_parameters()}
    assert_same_bits(torch.func.functional_call(layer, state, (x,)), layer(x))


def test_calls_from_many_threads():
    """Calls share no state, also while another thread switches the instruction set."""
    layers = [model_of(scheme) for scheme in ("w8a8", "w4a8-g32-asym", "w4a8-ag32")]
    inputs = [torch.randn(rows, K) for rows in (1, 7, 40, 130)]
    jobs = [(layer, x) for layer in layers for x in inputs]
    expected = [layer(x).detach() for layer, x in jobs]

    def work(seed: int) -> list[torch.Tensor]:
        with isa.force(isa.supported()[seed % len(isa.supported())]):
            return [layer(x).detach() for layer, x in jobs]

    with ThreadPoolExecutor(6) as pool:
        for outputs in pool.map(work, range(24)):
            for a, b in zip(outputs, expected, strict=True):
                assert_same_bits(a, b)


def test_backward_from_many_threads():
    layer = model_of("w4a8-g32")[0].requires_grad_(False)
    x = torch.randn(40, K)
    expected = forward_and_gradients(layer, x, layer)[1]
    with ThreadPoolExecutor(4) as pool:
        for a in pool.map(lambda _: forward_and_gradients(layer, x, layer)[1], range(12)):
            assert_same_bits(a, expected)


def test_fork_after_use():
    """A child forked after the parent has used its threads computes the same, on one thread as data loaders do."""
    run_python(
        """
import multiprocessing, torch, qkernels as qk
torch.manual_seed(0); torch.set_num_threads(2)
layer = qk.QuantLinear.from_float(torch.nn.Linear(300, 200), "w4a8-g32")
x = torch.randn(150, 300)
expected = layer(x).detach()

def child(queue):
    torch.set_num_threads(1)
    queue.put(layer(x).detach().numpy().tobytes())

context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
try:
    assert queue.get(timeout=60) == expected.numpy().tobytes()
finally:
    process.kill()
assert torch.equal(layer(x), expected)
"""
    )
