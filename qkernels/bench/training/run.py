"""One run: every contender of a case loaded, checked, and timed in turn."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...system import json_file
from ..candidate import chosen
from ..ours import WrongResult
from ..results import Skipped, machine
from .cases import CASES, Case, Training
from .contenders import Contender, contenders
from .memory import Memory, huge_pages, measure

FORMAT = 1
PROGRAM = "qkernels bench train"
FILE = "train.json"
MIN_ROUNDS = 2  # for quartiles


@dataclass(frozen=True)
class TrainRow:
    """One contender on one case. Times are seconds a step.

    Attributes:
        case, title: the case.
        name, ours, dtype: the contender.
        tokens: of a step.
        threads: torch's.
        metric: "loss" of the first step, or "error" of the gradient of the input against float32, and
        value: its value.
        median, quartiles, samples: of the times.
        memory: None: not measured.
    """

    case: str
    title: str
    name: str
    ours: bool
    dtype: str
    tokens: int
    threads: int
    metric: str
    value: float
    median: float
    quartiles: tuple[float, float]
    samples: int
    memory: Memory | None


@dataclass
class TrainResults:
    """A whole run."""

    machine: dict[str, Any]
    rows: list[TrainRow]
    skipped: list[Skipped]

    def save(self, folder: Path) -> Path:
        """Write `train.json` into `folder`."""
        path = folder / FILE
        json_file.write(path, {"format": FORMAT} | dataclasses.asdict(self))
        return path

    @classmethod
    def load(cls, path: Path) -> TrainResults:
        """Read what `save` wrote: the file, or the folder that holds it.

        Raises:
            ValueError: if it is not such a file.
        """
        file = path / FILE if path.is_dir() else path
        data = json_file.read(file, program=PROGRAM, version=FORMAT)
        with json_file.describing(file, PROGRAM):
            return cls(data["machine"], [_row(row) for row in data["rows"]], [Skipped(**s) for s in data["skipped"]])


def _row(values: dict[str, Any]) -> TrainRow:
    memory = values["memory"]
    return TrainRow(
        **values | {"quartiles": tuple(values["quartiles"]), "memory": None if memory is None else Memory(**memory)}
    )


@dataclass(frozen=True)
class TrainPlan:
    """What to run.

    Attributes:
        cases: names in `CASES`.
        schemes, grad_dtypes: of ours.
        rounds: steps of each contender that are timed, after one that is not.
        only: fnmatch patterns of contenders; empty: all.
        peers: also what `benchmarks/peers.txt` installs.
        memory: also measure memory, each contender in a process of its own; of the CPU only.
        device: "cpu" or "cuda", a GPU.
        compiled: also torch's bfloat16 under torch.compile.
    """

    cases: tuple[str, ...]
    schemes: tuple[str, ...]
    grad_dtypes: tuple[str, ...]
    rounds: int = 5
    only: tuple[str, ...] = ()
    peers: bool = False
    memory: bool = False
    device: str = "cpu"
    compiled: bool = False

    def __post_init__(self) -> None:
        from ...formats.scheme import QuantScheme

        unknown = [name for name in self.cases if name not in CASES]
        if unknown or not self.cases:
            raise ValueError(f"cases must be of {', '.join(CASES)}, got {', '.join(unknown) or 'nothing'}")
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds must be at least {MIN_ROUNDS}, got {self.rounds}")
        if self.device not in ("cpu", "cuda") or (self.memory and self.device != "cpu"):
            raise ValueError(f"device must be cpu or cuda, and cpu with memory, got {self.device!r}")
        for scheme in self.schemes:
            QuantScheme.parse(scheme)

    def contenders(self, case: Case) -> list[Contender]:
        found = contenders(
            case,
            self.schemes,
            self.grad_dtypes,
            peers=self.peers,
            compiled=self.compiled,
            device=self.device,
        )
        return chosen(found, self.only)


def run(plan: TrainPlan, progress: Callable[[str], None] = lambda message: None) -> TrainResults:
    """Run the plan.

    Raises:
        WrongResult: if a layer of ours computes a gradient far from float32's.
    """
    # Large blocks are mapped afresh at every step unless torch asks for huge pages, so the times depend on it.
    gpu = {"gpu": torch.cuda.get_device_name()} if plan.device == "cuda" else {}
    surroundings = machine() | gpu | {"huge_pages": huge_pages()}
    results = TrainResults(surroundings, [], [])
    for name in plan.cases:
        case = CASES[name]
        reason = case.unavailable()
        if reason is not None:
            results.skipped.append(Skipped(name, reason, 1))
            continue
        chosen, memories = plan.contenders(case), {}
        if plan.memory:  # before this process holds a model for each of them
            for contender in chosen:
                progress(f"{name}: memory of {contender.name}")
                if contender.unavailable() is None:
                    memories[contender.name] = _memory(plan, name, contender, results.skipped)
        rows, skipped = run_case(case, chosen, plan.rounds, progress, plan.device)
        results.rows += [dataclasses.replace(row, memory=memories.get(row.name)) for row in rows]
        results.skipped += skipped
    return results


def _memory(plan: TrainPlan, case: str, contender: Contender, skipped: list[Skipped]) -> Memory | None:
    try:
        return measure(case, contender.name, plan.schemes, plan.grad_dtypes)
    except RuntimeError as error:
        if contender.ours:
            raise
        skipped.append(Skipped(f"{case}: memory of {contender.name}", str(error), 1))
        return None


def run_case(
    case: Case,
    chosen: Sequence[Contender],
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
    device: str = "cpu",
) -> tuple[list[TrainRow], list[Skipped]]:
    """Time the contenders of one case in turn; also the reason for each that was left out.

    Raises:
        WrongResult: if a layer of ours computes a gradient far from float32's; nothing has been timed then.
    """
    ready: list[tuple[Contender, Training, float]] = []
    skipped = []
    for contender in chosen:
        progress(f"{case.name}: {contender.name}")
        reason = contender.unavailable()
        if reason is None:
            try:
                ready.append((contender, *_start(case, contender, device)))
                continue
            except Exception as error:
                if contender.ours:
                    raise
                # Whatever another library throws is the reason why its row is missing.
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        skipped.append(Skipped(f"{case.name}: {contender.name}", reason, 1))
    samples: dict[str, list[float]] = {contender.name: [] for contender, _, _ in ready}
    for turn in range(rounds + 1):
        progress(f"{case.name}: round {turn} of {rounds}")
        for contender, training, _ in ready:
            with contender.scope():
                start = time.perf_counter()
                training.step()
                _finish(device)
                samples[contender.name].append(time.perf_counter() - start)
    return [_timed(case, *item, samples[item[0].name][1:]) for item in ready], skipped


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _start(case: Case, contender: Contender, device: str) -> tuple[Training, float]:
    """A first step, and what it computed."""
    with contender.scope():
        model = contender.convert(case.model(contender.dtype)).to(device)
        training = case.start(model, contender.dtype, device)
        result = training.step()
    value = case.measure(result)
    if training.metric == "error" and not value <= contender.tolerance:
        raise WrongResult(
            f"{contender.name}, {case.name}: gradient off by {value:.3g}, allowed {contender.tolerance:g}"
        )
    return training, value


def _timed(case: Case, contender: Contender, training: Training, value: float, samples: list[float]) -> TrainRow:
    first, median, third = statistics.quantiles(samples, n=4)
    return TrainRow(
        case=case.name,
        title=case.title,
        name=contender.name,
        ours=contender.ours,
        dtype=str(contender.dtype).removeprefix("torch."),
        tokens=case.tokens,
        threads=torch.get_num_threads(),
        metric=training.metric,
        value=value,
        median=median,
        quartiles=(first, third),
        samples=len(samples),
        memory=None,
    )
