"""Many checks in one start of two processes: `torchrun --standalone --nproc-per-node 2 two_processes.py FOLDER`.

Starting processes takes longer than the checks, so that there is one start for all of them. Each process writes a line
to FOLDER/<rank>.jsonl for each check: its name, how long it took, and what failed. A failure ends the run, for the
processes may wait for each other afterwards. `tests/distributed/test_two_processes.py` starts it and reads the lines.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import qkernels as qk

ROWS, WIDTH, OUTPUTS = 8, 32, 17  # of a global batch; 17 outputs are an odd number for two processes
MODULES = ("data_parallel_checks", "pipeline_checks", "tensor_parallel_checks", "transformers_parallel_checks")
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Register a check, which every process calls with FOLDER."""
    CHECKS[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def model_of(scheme: str, mode: str, features: int = 64, **options: str) -> nn.Module:
    """Two layers [features, 32] and [17, features], the same on every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, features), nn.ReLU(), nn.Linear(features, OUTPUTS))
    qk.quantize_(model, scheme, mode, **options, **calibration_of(scheme))
    return model


def calibration_of(scheme: str) -> dict[str, list[Tensor]]:
    """The argument of `quantize_` for static activations."""
    return {"calibration": [batch(0)]} if qk.QuantScheme.parse(scheme).static_activations else {}


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The global batch of a step: [8, 32]."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 + step)).to(dtype)


def own_rows(x: Tensor) -> Tensor:
    """The part of a global batch that is this process's."""
    return x.chunk(dist.get_world_size())[rank()]


def mean_over_processes(value: Tensor) -> float:
    total = value.detach().clone()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).item()


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).float().square().mean()


def train_apart(
    net: nn.Module, optimizer, steps: int, after_backward: Callable[[], object] = lambda: None
) -> list[float]:
    """Train on this process's rows of each batch; the losses of the global batches."""
    losses = []
    for step in range(steps):
        loss = loss_of(net, own_rows(batch(step)))
        loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_processes(loss))
    return losses


def train_alone(
    net: nn.Module, optimizer, steps: int, after_backward: Callable[[], object] = lambda: None
) -> list[float]:
    """What one process does with the same global batches, accumulating the gradients of the parts of `train_apart`."""
    losses = []
    for step in range(steps):
        parts = batch(step).chunk(dist.get_world_size())
        each = [loss_of(net, part) for part in parts]
        for loss in each:
            (loss / len(parts)).backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((sum(loss.detach() for loss in each) / len(parts)).item())
    return losses


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, of whole plain tensors."""
    state = model.state_dict()
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).as_subclass(Tensor) for name, t in state.items()
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def assert_processes_agree(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        both = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(both, tensor.detach().contiguous())
        assert torch.equal(both[0].view(torch.uint8), both[1].view(torch.uint8)), name


def raises(kind: type[Exception], text: str, call: Callable[[], object]) -> None:
    try:
        call()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def run_all(folder: Path) -> None:
    with (folder / f"{rank()}.jsonl").open("w") as lines:
        for name, function in checks().items():
            start, failure = time.perf_counter(), None
            try:
                function(folder)
                dist.barrier()
            except Exception:
                failure = traceback.format_exc()
            lines.write(json.dumps({"name": name, "seconds": time.perf_counter() - start, "failure": failure}) + "\n")
            lines.flush()
            if failure is not None:
                os._exit(1)


def checks() -> dict[str, Callable[[Path], None]]:
    """All checks by name."""
    for module in MODULES:
        importlib.import_module(module)
    return sys.modules["two_processes"].CHECKS  # the checks import this file by its name, and register there


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    run_all(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo that are still at work when Python ends abort the process now and then
