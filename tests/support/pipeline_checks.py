"""Checks of two_processes.py: pipeline stages of quantized layers, each on a process of its own."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline
from two_processes import assert_same, batch, check, model_of, rank

PARTS = 4  # microbatches


def square(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (out - target).square().mean()


def run(schedule: ScheduleGPipe, step: int) -> list[torch.Tensor]:
    losses: list[torch.Tensor] = []
    if rank() == 0:
        schedule.step(batch(step))
    else:
        schedule.step(target=torch.zeros(8, 17), losses=losses)
    return losses


@check
def pipeline_by_hand(folder: Path) -> None:
    """GPipe over two stages: the gradients of one process that accumulates the same microbatches, bit for bit."""
    for scheme, mode in (("w8a8", "qat"), ("w4a8-g32-asym", "qat"), ("w8a8", "int8"), ("w8a8", "frozen")):
        model = model_of(scheme, mode)
        alone, parts = copy.deepcopy(model), (model[:2], model[2:])
        stage = PipelineStage(parts[rank()], rank(), 2, torch.device("cpu"))
        found = run(ScheduleGPipe(stage, PARTS, loss_fn=square), 0)
        expected = [square(alone(part), torch.zeros(2, 17)) for part in batch(0).chunk(PARTS)]
        for loss in expected:
            (loss / PARTS).backward()
        if rank() == 1:
            assert [loss.item() for loss in found] == [loss.item() for loss in expected]
        own, others = dict(parts[rank()].named_parameters()), dict((alone[:2], alone[2:])[rank()].named_parameters())
        gradients = [{n: p.grad for n, p in both.items() if p.grad is not None} for both in (own, others)]
        assert gradients[0]
        assert_same(*gradients)


@check
def pipeline_of_a_traced_model(folder: Path) -> None:
    """torch.distributed.pipelining.pipeline cuts an exported program before the last layer."""
    model = model_of("w8a8", "qat")
    pipe = pipeline(model, mb_args=(batch(0).chunk(PARTS)[0],), split_spec={"2": SplitPoint.BEGINNING})
    schedule = ScheduleGPipe(pipe.build_stage(rank(), torch.device("cpu")), PARTS)
    with torch.no_grad():
        out = schedule.step(batch(0)) if rank() == 0 else schedule.step()
        if rank() == 1:
            assert torch.equal(out, model(batch(0)))
