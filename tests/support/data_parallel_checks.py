"""Checks of two_processes.py: DDP, FSDP2, ZeroRedundancyOptimizer, FSDP1, and distributed checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from two_processes import (
    WIDTH,
    assert_processes_agree,
    assert_same,
    batch,
    check,
    loss_of,
    mean_over_processes,
    model_of,
    own_rows,
    plain_state,
    raises,
    rank,
    train_alone,
    train_apart,
)

import qkernels as qk
from qkernels.autograd.int8_weight import Int8Weight

# Every kind of scheme, and every mode.
CASES = (
    ("w8a8s", "lora", {}),
    ("w8a8", "lora", {}),
    ("w8a8-ag32", "qat", {}),
    ("w4a8-g32-asym", "lora", {}),
    ("w4a8-g32", "qat", {"weight_scale": "learned"}),
    ("w4a16", "qat", {}),
    ("w8a8", "int8", {}),
    ("w8a16", "int8", {}),
)
LORA = {"target_modules": ["0", "2"], "r": 4, "init_lora_weights": False}


def model_to_train(scheme: str, mode: str, features: int = 64, **options: str) -> nn.Module:
    """`model_of`, with an adapter in the mode "lora"."""
    if mode != "lora":
        return model_of(scheme, mode, features, **options)
    return peft.get_peft_model(model_of(scheme, "frozen", features), peft.LoraConfig(**LORA))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2)


def shard(model: nn.Module, **options) -> nn.Module:
    """FSDP2 of each layer and of the rest."""
    for layer in [m for m in model.modules() if isinstance(m, (qk.QuantLinear, peft.tuners.lora.Linear))]:
        if not isinstance(layer, qk.QuantLinear) or not isinstance(model, peft.PeftModel):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


@check
def ddp_is_one_process_that_accumulates(folder: Path) -> None:
    """Losses, clipped gradients and weights after three steps of AdamW: the same bits."""
    for scheme, mode, options in CASES:
        alone = model_to_train(scheme, mode, **options)
        net = DistributedDataParallel(copy.deepcopy(alone))
        optimizers = adamw(alone), adamw(net)
        clips = (lambda net=net: nn.utils.clip_grad_norm_(net.parameters(), 0.05) for net in (alone, net))
        expected = train_alone(alone, optimizers[0], 3, next(clips))
        assert train_apart(net, optimizers[1], 3, next(clips)) == expected, (scheme, mode)
        assert_same(plain_state(net.module), plain_state(alone))


@check
def ddp_accumulates(folder: Path) -> None:
    """Two parts on each process, exchanged once: as one process with four parts, but for the order of the sums."""
    for mode in ("lora", "qat", "int8"):
        alone = model_to_train("w8a8", mode)
        net = DistributedDataParallel(copy.deepcopy(alone))
        for part in batch(0).chunk(4):
            (loss_of(alone, part) / 4).backward()
        first, second = own_rows(batch(0)).chunk(2)
        with net.no_sync():
            (loss_of(net, first) / 2).backward()
        (loss_of(net, second) / 2).backward()
        for one, two in zip(trained(alone), trained(net), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-8)


@check
def ddp_with_integer_gradients(folder: Path) -> None:
    """Each process rounds with its own numbers; the mean is exchanged, so that the weights agree."""
    for mode in ("lora", "qat", "int8"):
        net = DistributedDataParallel(
            model_to_train("w8a8", mode, **({} if mode == "lora" else {"grad_dtype": "int8"}))
        )
        torch.manual_seed(rank())
        losses = train_apart(net, adamw(net), 3)
        assert losses[-1] < losses[0]
        assert_processes_agree(plain_state(net.module))


@check
def ddp_int8_with_dropout_and_ragged_batches(folder: Path) -> None:
    """Other seeds, contents and lengths on each process; also in bfloat16, and with a copy on one of them."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(rank())
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 17)).to(dtype)
        qk.quantize_(model, "w8a8", "int8")
        own = {name: tensor.clone() for name, tensor in plain_state(model).items()}
        net = DistributedDataParallel(model)
        assert_processes_agree(plain_state(model))
        if rank() == 0:
            assert_same(own, plain_state(model))
        optimizer, data = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.Generator().manual_seed(rank())
        for step in range(30):
            rows = int(torch.randint(4, 12, (), generator=data))
            loss_of(net, torch.randn(rows, 32, generator=data).to(dtype)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 20 and rank() == 0:
                torch.optim.swa_utils.AveragedModel(model).update_parameters(model)
        assert_processes_agree(plain_state(model))


@check
def zero_redundancy_optimizer(folder: Path) -> None:
    for mode in ("lora", "qat", "int8"):
        alone = model_to_train("w8a8", mode)
        net = DistributedDataParallel(copy.deepcopy(alone))
        optimizer = ZeroRedundancyOptimizer(trained(net), torch.optim.AdamW, lr=1e-2)
        assert train_apart(net, optimizer, 3) == train_alone(alone, adamw(alone), 3)
        assert_same(plain_state(net.module), plain_state(alone))
    options = {"lr": 1e-3, "parameters_as_bucket_view": True}
    raises(
        NotImplementedError,
        "bucket",
        lambda: ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, **options),
    )


@check
def broadcast_of_an_int8_weight(folder: Path) -> None:
    torch.manual_seed(rank())
    model = nn.Sequential(nn.Linear(32, 64)).to(torch.bfloat16)
    qk.quantize_(model, "w8a8", "int8")
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    assert_processes_agree(plain_state(model))
    raises(
        NotImplementedError,
        "allreduce_ cannot write to an Int8Weight",
        lambda: dist.all_reduce(model[0].weight.data),
    )
    parts = [torch.empty(64, 32, dtype=torch.bfloat16) for _ in range(2)]
    dist.all_gather(parts, model[0].weight.data)
    assert torch.equal(parts[1 - rank()], model[0].weight.dequantize())


@check
def fsdp2_is_one_process_that_accumulates(folder: Path) -> None:
    """The same bits as one process; rows that do not divide by two processes are 65 and 17."""
    for scheme, mode, options in CASES:
        for features in (64, 65):
            alone = model_to_train(scheme, mode, features, **options)
            net = shard(copy.deepcopy(alone))
            expected = train_alone(alone, adamw(alone), 3)
            found = train_apart(net, adamw(net), 3)
            if mode == "int8":  # a shard rounds with a seed of its own
                assert found[0] == expected[0]
                torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
            else:
                assert found == expected, (scheme, mode, features, found, expected)
                assert_same(plain_state(net), plain_state(alone))


@check
def fsdp2_clips_and_accumulates(folder: Path) -> None:
    for mode in ("lora", "qat", "int8"):
        alone = model_to_train("w8a8", mode)
        net = shard(copy.deepcopy(alone))
        for model, parts in ((alone, batch(0).chunk(4)), (net, own_rows(batch(0)).chunk(2))):
            for index, part in enumerate(parts):
                if model is net:
                    net.set_requires_gradient_sync(index == len(parts) - 1)
                (loss_of(model, part) / len(parts)).backward()
        norms = [nn.utils.clip_grad_norm_(model.parameters(), 1e-3) for model in (alone, net)]
        torch.testing.assert_close(norms[1].full_tensor(), norms[0], rtol=1e-5, atol=0)
        for one, two in zip(trained(alone), trained(net), strict=True):
            torch.testing.assert_close(two.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-8)


@check
def fsdp2_gathers_the_stored_bytes(folder: Path) -> None:
    """What a forward gathers of a layer [64, 32] with a bias: integers, scales and zero points, never the floats."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    class Counting(DefaultAllGather):
        total = 0

        def __call__(self, output_tensor, input_tensor, *args, **kwargs):
            type(self).total += output_tensor.numel() * output_tensor.element_size()
            return super().__call__(output_tensor, input_tensor, *args, **kwargs)

    for scheme, mode, weight_bytes in (
        ("w8a8", "frozen", 64 * 32 + 64 * 4),
        ("w8a8", "int8", 64 * 32 + 64 * 4),
        ("w4a8-g32-asym", "frozen", 64 * 16 + 64 * 5),
        ("w8a8", "qat", 64 * 32 * 4),
    ):
        layer = qk.QuantLinear.from_float(nn.Linear(32, 64), scheme, mode=mode)
        stored = layer.storage_bytes()
        fully_shard(layer)
        assert stored == weight_bytes
        local = [p.to_local() for p in layer.parameters()]
        kept = sum(t.qweight.numel() + 4 * t.scales.numel() if isinstance(t, Int8Weight) else t.nbytes for t in local)
        assert kept == (weight_bytes + 64 * 4) // 2  # and half of the bias
        Counting.total = 0
        layer.set_custom_all_gather(Counting())
        layer(batch(0))
        assert Counting.total == weight_bytes + 64 * 4, (scheme, mode, Counting.total)


@check
def fsdp2_mixed_precision(folder: Path) -> None:
    cases = (("w8a8", "lora"), ("w8a8s", "lora"), ("w4a8-g32-asym", "lora"), ("w8a8", "qat"), ("w8a8", "int8"))
    for scheme, mode in cases:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        net = shard(model_to_train(scheme, mode), mp_policy=policy)
        assert net(own_rows(batch(0))).dtype == torch.bfloat16
        losses = train_apart(net, adamw(net), 3)
        assert losses[-1] < losses[0]
        half = model_to_train(scheme, mode).to(torch.bfloat16)
        first = mean_over_processes(loss_of(half, own_rows(batch(0)).to(torch.bfloat16)))
        assert losses[0] == first, (scheme, mode)


@check
def fsdp2_state_of_an_int8_layer(folder: Path) -> None:
    for features in (64, 65):
        twin, net = model_of("w8a8", "int8", features), shard(model_of("w8a8", "int8", features))
        local = net[0].weight.to_local()
        assert type(local) is Int8Weight and local.qweight.numel() <= -(-features // 2) * 32
        train_apart(net, adamw(net), 3)
        assert type(net[0].weight.to_local()) is Int8Weight
        full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
        assert sorted(full) == sorted(twin.state_dict())
        twin.load_state_dict(plain_state(net))
        assert torch.equal(net(batch(0)), twin(batch(0)))


def _shown(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(9))


def save_alone(folder: Path) -> None:
    """Before the start of the two processes: a checkpoint of one."""
    for scheme, mode, options in CASES:
        model = model_to_train(scheme, mode, 65, **options)
        name = f"{scheme}-{mode}"
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / f"one-{name}", no_dist=True)
        torch.save(model.state_dict(), folder / f"one-{name}.pt")


@check
def checkpoints_between_one_and_two_processes(folder: Path) -> None:
    """Load what one process saved, train, save; `load_alone` loads that in one process: equal bits."""
    for scheme, mode, options in CASES:
        name = f"{scheme}-{mode}"
        net = shard(model_to_train(scheme, mode, 65, **options))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        state = {"model": get_model_state_dict(net)}
        dcp.load(state, checkpoint_id=folder / f"one-{name}")
        set_model_state_dict(net, state["model"])
        assert_same(plain_state(net), torch.load(folder / f"one-{name}.pt"))
        train_apart(net, adamw(net), 2)
        dcp.save({"model": get_model_state_dict(net)}, checkpoint_id=folder / f"two-{name}")
        expected = plain_state(net)
        if rank() == 0:
            torch.save(expected, folder / f"two-{name}.pt")


def load_alone(folder: Path) -> None:
    """After the two processes have ended: one process loads what they saved."""
    for scheme, mode, options in CASES:
        name = f"{scheme}-{mode}"
        model = model_to_train(scheme, mode, 65, **options)
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=folder / f"two-{name}", no_dist=True)
        set_model_state_dict(model, state["model"])
        assert_same(plain_state(model), torch.load(folder / f"two-{name}.pt"))


@check
def fsdp1_trains_qat_and_refuses_the_others(folder: Path) -> None:
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    alone = model_of("w8a8", "qat")
    net = FullyShardedDataParallel(copy.deepcopy(alone), **options)
    torch.testing.assert_close(train_apart(net, adamw(net), 2), train_alone(alone, adamw(alone), 2), rtol=1e-5, atol=0)
    for mode in ("frozen", "int8"):
        raises(
            NotImplementedError,
            "fully_shard",
            lambda mode=mode: FullyShardedDataParallel(model_of("w8a8", mode), **options),
        )
    # Frozen layers may be left out of what it shards.
    lora = model_to_train("w8a8", "lora")
    frozen = [p for p in lora.parameters() if not p.requires_grad]
    net = FullyShardedDataParallel(lora, ignored_states=frozen, **options)
    losses = train_apart(net, torch.optim.AdamW(trained(net), lr=1e-2), 3)
    assert losses[-1] < losses[0]


@check
def embeddings_in_data_parallel(folder: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50))
        qk.quantize_(net, "w8a8", embeddings="w4a8-g32")
        return net

    tokens, alone = torch.arange(12).view(2, 6), model()
    expected = alone(tokens)
    assert torch.equal(DistributedDataParallel(model())(tokens), expected)
    net = model()
    fully_shard(net[0])
    assert torch.equal(fully_shard(net)(tokens), expected)


class Experts(nn.Module):
    """A mixture of experts of transformers, which stores the weights of all experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2}
        config = transformers.MixtralConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        self.layer = transformers.MixtralForCausalLM(config).model.layers[0].mlp

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[None], x[None], x[None], need_weights=False)[0][0]


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(len(x), 2, 4, 4)).flatten(1)


@check
def other_layers_in_data_parallel(folder: Path) -> None:
    for kind in (Experts, Attention, Convolution):
        for mode in ("frozen", "qat"):
            torch.manual_seed(0)
            model = kind()
            report = qk.quantize_(model, "w8a8", mode)
            assert report.quantized, (kind, report.left)
            if mode == "frozen":
                x = batch(0)
                for net in (DistributedDataParallel(copy.deepcopy(model)), fully_shard(copy.deepcopy(model))):
                    assert torch.equal(net(x), model(x)), kind
                continue
            for wrap in (DistributedDataParallel, fully_shard):
                alone, net = copy.deepcopy(model), wrap(copy.deepcopy(model))
                expected = train_alone(alone, adamw(alone), 2)
                torch.testing.assert_close(train_apart(net, adamw(net), 2), expected, rtol=1e-4, atol=0)
