"""Checks of two_processes.py: `parallelize_module` on quantized layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from two_processes import assert_same, batch, calibration_of, check, plain_state, raises, rank

import qkernels as qk
from qkernels.autograd.int8_weight import Int8Weight
from qkernels.distributed import row_parallel
from qkernels.formats.scheme import QuantScheme
from qkernels.formats.storage import QuantizedWeight, weight_integers

# One scale a row, groups of weights, of activations, of both; zero points; activations in float; 4 bits.
SCHEMES = ("w8a8", "w4a8", "w4a8-asym", "w8a8-ag32", "w8a8-g32", "w4a8-g32-asym", "w4a8-g32-ag32", "w8a16", "w4a16-g32")
PLAN = {"0": ColwiseParallel, "2": RowwiseParallel}


def mesh() -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", (2,))


def mlp(scheme: str, mode: str, **options: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 17))
    qk.quantize_(model, scheme, mode, **options, **calibration_of(scheme))
    return model


def split(model: nn.Module, plan: dict[str, Callable[[], ParallelStyle]] = PLAN) -> nn.Module:
    """The model on two processes, made of the weights of process 0."""
    model = copy.deepcopy(model)
    if rank() == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    return parallelize_module(model, mesh(), {name: style() for name, style in plan.items()})


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered() -> ParallelStyle:
    """A column plan whose outputs are whole."""
    return ColwiseParallel(output_layouts=Replicate())


def is_exact(scheme: str) -> bool:
    """Whether the sums over K are integers to their end."""
    parsed = QuantScheme.parse(scheme)
    return parsed.int_activations and parsed.row_scaled and parsed.act_group_size is None


@check
def column_and_row_plans(folder: Path) -> None:
    """Outputs, gradients and state dicts of two processes beside those of one."""
    for scheme in SCHEMES:
        for mode in ("frozen", "qat"):
            alone = mlp(scheme, mode)
            net = split(alone)
            state = plain_state(net)
            assert_same(state, plain_state(alone))
            weight = net[2]._parameters["qweight" if mode == "frozen" else "weight"]
            assert weight.placements == (Shard(1),) and weight.to_local().shape[1] * 2 == weight.shape[1]
            xs = [batch(0).requires_grad_() for _ in range(2)]
            outs = net(xs[0]), alone(xs[1])
            if is_exact(scheme):
                assert torch.equal(*outs), (scheme, mode)
            torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
            for out in outs:
                out.square().mean().backward()
            # Under -ag, the gradient of a weight rounds x once more, with the scales of the columns that are there.
            close = {"rtol": 0.05, "atol": 2e-4} if mode == "qat" and "-ag" in scheme else {"rtol": 1e-4, "atol": 1e-7}
            torch.testing.assert_close(xs[0].grad, xs[1].grad, **close)
            for one, two in zip(alone.parameters(), net.parameters(), strict=True):
                if one.requires_grad:
                    torch.testing.assert_close(whole(two.grad), one.grad, **close)


@check
def row_plan_with_learned_scales(folder: Path) -> None:
    alone = mlp("w4a8-g32", "qat", weight_scale="learned")
    net = split(alone)
    for model in (alone, net):
        model(batch(0)).square().mean().backward()
    for one, two in zip(alone.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(whole(two.grad), one.grad, rtol=1e-4, atol=1e-7)
    raises(ValueError, "one learned scale", lambda: split(mlp("w8a8", "qat", weight_scale="learned")))


@check
def static_activations_in_parts(folder: Path) -> None:
    """One scale for all activations, which calibration has chosen."""
    for scheme in ("w8a8s", "w4a8s-g32"):
        alone = mlp(scheme, "frozen")
        net, x = split(alone), batch(0)
        x[3, 20] = torch.nan  # a column of one process, and a row of both
        outs = net(x), alone(x)
        torch.testing.assert_close(*outs, rtol=1e-5 if "-g" in scheme else 0, atol=0, equal_nan=True)
        assert_same(plain_state(net), plain_state(alone))
    learned = mlp("w8a8s", "qat", weight_scale="learned")
    raises(NotImplementedError, "learns the scale of its activations", lambda: split(learned))


@check
def tensor_parallel_training(folder: Path) -> None:
    """Five steps; where the forward is exact, what differs is the order of the sums in gradients."""
    for scheme, mode in (("w8a8", "qat"), ("w4a8-g32", "qat"), ("w8a8", "int8")):
        alone = mlp(scheme, mode)
        net = split(alone, PLAN if mode == "qat" else dict.fromkeys("02", gathered))
        losses = []
        for model in (alone, net):
            optimizer, own = torch.optim.AdamW(model.parameters(), lr=1e-3), []
            for step in range(5):
                loss = model(batch(step)).square().mean()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                own.append(loss.item())
            losses.append(own)
        torch.testing.assert_close(*losses, rtol=2e-3 if mode == "qat" else 0.05, atol=0)


@check
def tensor_parallel_integer_gradients(folder: Path) -> None:
    """The mean over 64 seeds of a stochastic gradient is that of one process."""
    for scheme in ("w8a8", "w4a8-g32"):
        exact, net = mlp(scheme, "frozen"), split(mlp(scheme, "frozen", grad_dtype="int8"))
        x = batch(0).requires_grad_()
        exact(x).sum().backward()
        expected, draws = x.grad.clone(), []
        for seed in range(64):
            torch.manual_seed(2 * seed + rank())
            x.grad = None
            net(x).sum().backward()
            draws.append(x.grad.clone())
        error = (torch.stack(draws).mean(0) - expected).norm() / expected.norm()
        single = (draws[0] - expected).norm() / expected.norm()
        assert 0 < single < 0.05 and error < 0.01, (error, single)


@check
def column_plan_of_an_int8_weight(folder: Path) -> None:
    """17 rows do not divide by two. The shards are integers, and so is what process 0 sends."""
    alone = mlp("w8a8", "int8")
    net = split(alone, dict.fromkeys("02", gathered))
    local = net[2].weight.to_local()
    assert type(local) is Int8Weight and len(local.qweight) == 9 - rank()
    assert torch.equal(net(batch(0)), alone(batch(0)))
    assert_same(plain_state(net), plain_state(alone))


@check
def sequence_parallel(folder: Path) -> None:
    """Norms on parts of the sequence; a column plan gathers it, a row plan hands on parts of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    qk.quantize_(model, "w8a8")
    net = parallelize_module(
        copy.deepcopy(model),
        mesh(),
        {
            "0": SequenceParallel(),
            "1": ColwiseParallel(input_layouts=Shard(1)),
            "3": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        },
    )
    x = torch.randn(2, 6, 32)
    out = net(x.chunk(2, dim=1)[rank()])
    assert out.placements == (Shard(1),) and torch.equal(out.full_tensor(), model(x))


@check
def whole_layers_on_parts_of_the_batch(folder: Path) -> None:
    """Each process has the whole weight: gradients of the parts of a batch are added."""
    alone = mlp("w8a8", "qat")
    net = copy.deepcopy(alone)
    for layer in (net[0], net[2]):
        for name, parameter in list(layer.named_parameters()):
            layer.register_parameter(
                name, nn.Parameter(torch.distributed.tensor.distribute_tensor(parameter.data, mesh(), [Replicate()]))
            )
    x = torch.distributed.tensor.distribute_tensor(batch(0), mesh(), [Shard(0)])
    out = net(x)
    assert torch.equal(out.full_tensor(), alone(batch(0)))
    out.square().sum().backward()
    alone(batch(0)).square().sum().backward()
    for one, two in zip(alone.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(whole(two.grad), one.grad, rtol=1e-4, atol=1e-5)


@check
def tensor_parallel_and_fsdp(folder: Path) -> None:
    """A mesh of two dimensions, each of which has both processes once."""
    for shape in ((1, 2), (2, 1)):
        grid = dist.init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        for mode in ("frozen", "qat"):
            alone = mlp("w8a8", mode)
            net = parallelize_module(
                copy.deepcopy(alone), grid["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
            )
            fully_shard(net, mesh=grid["data"])
            out = net(batch(0))
            assert torch.equal(out, alone(batch(0))), (shape, mode)
            out.square().mean().backward()


@check
def compiled_tensor_parallelism(folder: Path) -> None:
    """The sums over processes are in the graph that torch.compile makes."""
    for mode in ("frozen", "qat"):
        net = split(mlp("w8a8", mode))
        expected = net(batch(0))
        assert torch.equal(torch.compile(net, backend="aot_eager")(batch(0)), expected)


@check
def what_tensor_parallelism_refuses(folder: Path) -> None:
    def rows(scheme: str, features: int, mode: str = "frozen") -> nn.Module:
        model = nn.Sequential(nn.Linear(features, 8))
        qk.quantize_(model, scheme, mode)
        return parallelize_module(model, mesh(), {"0": RowwiseParallel()})

    raises(ValueError, "must be a multiple of 32", lambda: rows("w4a8-g32", 96))
    raises(ValueError, "1, 3 processes fit", lambda: rows("w8a8-ag32", 96))
    raises(ValueError, "must be a multiple of 2", lambda: rows("w4a8", 6))
    raises(ValueError, "rounded with one scale", lambda: rows("w8a8", 64, "int8"))
    net = split(mlp("w8a8", "frozen"))
    raises(RuntimeError, "must be a DTensor", lambda: net[0].forward(batch(0)))
    floats = parallelize_module(nn.Sequential(nn.Linear(8, 8)), mesh(), {"0": ColwiseParallel()})
    report = qk.quantize_(floats, "w8a8")
    assert report.left[0].reason == "weight is a DTensor: quantize the model before it is sharded"
    embedding = nn.Sequential(nn.Embedding(8, 32))
    qk.quantize_(embedding, "w8a8", embeddings=True)
    raises(ValueError, "cannot be split", lambda: parallelize_module(embedding, mesh(), {"0": ColwiseParallel()}))


@check
def embedding_in_parts(folder: Path) -> None:
    for scheme in ("w8a8", "w4a8-g32-asym"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(51, 32), nn.Linear(32, 51))
        qk.quantize_(model, scheme, embeddings=True)
        plan = {"0": RowwiseParallel(input_layouts=Replicate()), "1": gathered()}
        net, tokens = parallelize_module(copy.deepcopy(model), mesh(), plan), torch.arange(51).view(3, 17)
        assert len(net[0]._parameters["qweight"].to_local()) == 26 - rank()
        assert torch.equal(net(tokens), model(tokens))
        assert_same(plain_state(net), plain_state(model))


@check
def integer_sums_are_exact(folder: Path) -> None:
    """Sums above 2^24, which a float32 does not hold, also of the parts that q is cut into."""
    for scheme, columns in (("w8a8", 9000), ("w8a8", 40001), ("w4a8-asym", 20000)):
        parsed = QuantScheme.parse(scheme)
        q = torch.full((3, columns), 127, dtype=torch.int8)
        q[1] = torch.randint(-127, 128, (columns,), dtype=torch.int8)
        weight = qk.quantize_weight(torch.rand(5, columns) + 0.5, scheme)
        weight = QuantizedWeight(*(None if t is None else t.contiguous() for t in weight))
        if parsed.weight_bits == 8:
            weight.qweight[1] = -128
        integers = weight_integers(weight.qweight, weight.zeros, columns, parsed)
        expected = q.to(torch.int64) @ integers.to(torch.int64).t()
        assert expected.max() > 2**24
        assert torch.equal(row_parallel.integer_sums(q, weight, parsed).to(torch.int64), expected)
