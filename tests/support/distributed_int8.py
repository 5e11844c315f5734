"""What test_distributed.py runs on two ranks over gloo: `python distributed_int8.py CASE FOLDER`."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qkernels as qk
from qkernels.autograd.int8_weight import Int8Weight


def model_of(mode: str, grad_dtype: str = "float", features: int = 64, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(32, features), nn.ReLU(), nn.Dropout(0.1), nn.Linear(features, 17)).to(dtype)
    qk.quantize_(model, "w8a8", mode=mode, grad_dtype=grad_dtype)
    return model


def assert_ranks_agree(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        both = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(both, tensor.detach().contiguous())
        assert torch.equal(both[0].view(torch.uint8), both[1].view(torch.uint8)), name


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.as_subclass(torch.Tensor) for name, tensor in model.state_dict().items()}


def train(net: nn.Module, optimizer, rank: int, steps: int, dtype=torch.float32) -> None:
    """Batches of other contents and lengths on each rank, so that dropout draws other amounts of random numbers."""
    data = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        rows = int(torch.randint(4, 12, (), generator=data))
        net(torch.randn(rows, 32, generator=data).to(dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp(rank: int, folder: str) -> None:
    for grad, dtype in (("float", torch.float32), ("int8", torch.float32), ("float", torch.bfloat16)):
        torch.manual_seed(rank)  # also of the initial weights: DDP sends those of rank 0
        model = model_of("int8", grad, dtype=dtype)
        own = {name: tensor.clone() for name, tensor in plain_state(model).items()}
        net = DistributedDataParallel(model)
        assert_ranks_agree({name: t for name, t in plain_state(model).items() if "qweight" in name or "bias" in name})
        if rank == 0:
            assert all(torch.equal(own[name], tensor) for name, tensor in plain_state(model).items())
        train(net, torch.optim.AdamW(model.parameters(), lr=1e-3), rank, 200, dtype)
        if rank == 0:  # a copy that one rank updates, such as an average, disturbs nothing
            torch.optim.swa_utils.AveragedModel(model).update_parameters(model)
        train(net, torch.optim.SGD(model.parameters(), lr=1e-2), rank, 3, dtype)
        assert_ranks_agree(plain_state(model))


def zero(rank: int, folder: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(rank)
    net = DistributedDataParallel(model_of("int8"))
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-3)
    train(net, optimizer, rank, 20)
    assert_ranks_agree(plain_state(net.module))
    try:
        ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=1e-3, parameters_as_bucket_view=True)
    except NotImplementedError as error:
        assert "bucket" in str(error)
    else:
        raise AssertionError("a weight became a copy of its bucket")


def broadcast(rank: int, folder: str) -> None:
    torch.manual_seed(rank)
    model = model_of("int8", dtype=torch.bfloat16)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    assert_ranks_agree(plain_state(model))
    try:
        dist.all_reduce(model[0].weight.data)
    except NotImplementedError as error:
        assert "allreduce_ cannot write to an Int8Weight" in str(error)
    else:
        raise AssertionError("a write was lost")
    parts = [torch.empty(64, 32, dtype=torch.bfloat16) for _ in range(2)]
    dist.all_gather(parts, model[0].weight.data)
    assert torch.equal(parts[1 - rank], model[0].weight.dequantize())


def fsdp(rank: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for features in (64, 65):  # 17 outputs are sharded unevenly, too
        torch.manual_seed(0)
        twin, model = (model_of("int8", features=features) for _ in range(2))
        model.load_state_dict(twin.state_dict())
        start = {name: tensor.clone() for name, tensor in plain_state(twin).items()}
        for layer in (model[0], model[3]):
            fully_shard(layer)
        fully_shard(model)
        local = model[0].weight.to_local()
        assert type(local) is Int8Weight and local.qweight.numel() <= -(-features // 2) * 32
        x = torch.randn(6, 32)
        for net in (twin, model):
            net.eval()
        assert torch.equal(model(x), twin(x))
        model(x).square().mean().backward()
        twin(x).square().mean().backward()
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad.full_tensor(), other.grad, rtol=1e-5, atol=1e-7)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert type(model[0].weight.to_local()) is Int8Weight
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert sorted(full) == sorted(start)
        if full["0.qweight"].numel():
            assert full["0.qweight"].dtype == torch.int8 and not torch.equal(full["0.qweight"], start["0.qweight"])
        trained = {name: t.full_tensor().clone() for name, t in model.state_dict().items()}
        twin.load_state_dict(trained)
        assert torch.equal(model(x), twin(x))
        # Distributed checkpoint: save, spoil, load.
        path = f"{folder}/{features}"
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert not model(x).any()
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(model, state["model"])
        assert torch.equal(model(x), twin(x))

    half = model_of("int8")
    fully_shard(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    out = half(torch.randn(3, 32))
    assert out.dtype == torch.bfloat16
    out.sum().backward()


def fsdp1(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    try:
        FullyShardedDataParallel(model_of("int8"), use_orig_params=True, device_id=torch.device("cpu"))
    except NotImplementedError as error:
        assert "fully_shard" in str(error)
    else:
        raise AssertionError("FSDP1 took an Int8Weight")


def work(rank: int, case: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
    globals()[case](rank, folder)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo that are still at work when Python ends abort the process now and then


if __name__ == "__main__":
    mp.spawn(work, args=tuple(sys.argv[1:]), nprocs=2)
