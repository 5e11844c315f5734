"""One run: prepare every candidate, verify it, time all of them in turn, and compare with the limit of that minute."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..profiling.roofline import Roofline, measure
from ..profiling.timing import Turns, interleave
from . import ours
from .candidate import COLD, DTYPES, FORWARD, GRAD_INPUT, OVERHEAD, WARM, Candidate, Case, chosen, relative_error
from .results import Results, Row, Skipped, machine
from .shapes import parse_layers

VERIFIED_ROWS = 128  # of the result, evenly spread: rows do not depend on each other
MAX_COPIES_BYTES = 1 << 30  # of a candidate's cold weights
ROOFLINE_SECONDS, ROOFLINE_AGE = 1.0, 60.0
LARGE_OUTPUT = 32 << 20  # larger blocks are mapped afresh at each call, and the page faults would dominate the time
OVERHEAD_SHAPE = (1, 64, 64)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        layers: models or NxK, comma-separated; see `shapes.parse_layers`.
        rows: values of M.
        schemes: of ours.
        directions: "forward" and "grad-input".
        weights: "warm" and "cold".
        threads: numbers of them, one after the other.
        dtype: of the activations: "float32" or "bfloat16".
        seconds: of timing for each row.
        overhead: also time the calls themselves, at 1 x 64 x 64.
        peers: also time what `benchmarks/peers.txt` installs.
        compiled: also torch.compile.
        device: "cpu" or "cuda", a GPU, whose `threads` mean nothing.
        only: fnmatch patterns of the candidates' names; empty: all.
    """

    layers: str
    rows: tuple[int, ...]
    schemes: tuple[str, ...]
    directions: tuple[str, ...] = (FORWARD,)
    weights: tuple[str, ...] = (WARM,)
    threads: tuple[int, ...] = field(default_factory=lambda: (torch.get_num_threads(),))
    dtype: Literal["float32", "bfloat16"] = "float32"
    seconds: float = 0.4
    overhead: bool = True
    peers: bool = False
    compiled: bool = False
    device: str = "cpu"
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from ..formats.scheme import QuantScheme

        def expect(name: str, values: Sequence[Any], ok: Callable[[Any], bool], what: str) -> None:
            if not values or not all(map(ok, values)):
                raise ValueError(f"{name} must be {what}, got {', '.join(map(str, values)) or 'nothing'}")

        expect("rows", self.rows, lambda m: m >= 1, "at least 1")
        expect("threads", self.threads, lambda count: count >= 1, "at least 1")
        expect("directions", self.directions, (FORWARD, GRAD_INPUT).__contains__, f"{FORWARD} or {GRAD_INPUT}")
        expect("weights", self.weights, (WARM, COLD).__contains__, f"{WARM} or {COLD}")
        expect("dtype", (self.dtype,), DTYPES.__contains__, "float32 or bfloat16")
        expect("seconds", (self.seconds,), lambda s: s > 0, "positive")
        for scheme in self.schemes:
            QuantScheme.parse(scheme)
        parse_layers(self.layers)

    def cases(self, fast_bf16: bool) -> Iterator[Case]:
        """In the order they are run. `fast_bf16`: results beyond LARGE_OUTPUT are run in bfloat16."""
        for threads in self.threads:
            if self.overhead:
                yield Case("1 x 64 x 64", *OVERHEAD_SHAPE, OVERHEAD, WARM, self.dtype, threads)
            for layer in parse_layers(self.layers):
                for direction in self.directions:
                    for m in self.rows:
                        large = m * (layer.k if direction == GRAD_INPUT else layer.n) * 4 > LARGE_OUTPUT
                        dtype = "bfloat16" if large and fast_bf16 else self.dtype
                        for weights in self.weights:
                            yield Case(layer.name, m, layer.n, layer.k, direction, weights, dtype, threads)

    def candidates(self, case: Case) -> list[Candidate]:
        """All that compute a case; whether they can on this machine is asked later."""
        from ..formats.scheme import QuantScheme
        from . import gpu, torch_baselines

        found: list[Candidate] = [ours.Operator(case, scheme) for scheme in self.schemes]
        found += [
            ours.IntGradient(case, scheme) for scheme in self.schemes if QuantScheme.parse(scheme).int_activations
        ]
        if case.direction == OVERHEAD:
            found += [ours.Module(case, scheme) for scheme in self.schemes]
        if self.device == "cuda":
            found += gpu.baselines(case, compiled=self.compiled) + (gpu.peers(case) if self.peers else [])
        else:
            found += torch_baselines.baselines(case, compiled=self.compiled)
            if self.peers:
                from . import peers

                found += peers.peers(case)
        return chosen([candidate for candidate in found if case.direction in candidate.directions], self.only)


def run(plan: Plan, progress: Progress = lambda message: None) -> Results:
    """Run the plan.

    Raises:
        WrongResult: if a kernel of ours does not compute what the reference does.
    """
    from ..system.host import fast_bf16
    from . import gpu

    on_gpu = plan.device == "cuda"
    results = Results(machine() | ({"gpu": torch.cuda.get_device_name()} if on_gpu else {}), [], [], [])
    skipped: Counter[tuple[str, str]] = Counter()
    threads_before = torch.get_num_threads()
    measured_at = 0.0
    try:
        with torch.no_grad():
            for case in plan.cases(on_gpu or fast_bf16()):
                progress(str(case))
                torch.set_num_threads(case.threads)
                roofline = results.rooflines[-1] if results.rooflines else None
                if (
                    roofline is None
                    or roofline.threads != case.threads
                    or time.monotonic() - measured_at > ROOFLINE_AGE
                ):
                    roofline = (gpu.measure if on_gpu else measure)(case.threads, ROOFLINE_SECONDS)
                    results.rooflines.append(roofline)
                    measured_at = time.monotonic()
                candidates = plan.candidates(case)
                if not candidates:
                    continue
                rows, reasons = run_case(candidates, roofline, plan.seconds, plan.device)
                results.rows += rows
                skipped.update(reasons.items())
    finally:
        torch.set_num_threads(threads_before)
    results.skipped = [Skipped(name, reason, cells) for (name, reason), cells in skipped.items()]
    return results


@dataclass(frozen=True)
class Verified:
    """A candidate whose result was checked; `call` produced it."""

    candidate: Candidate
    call: Callable[[Any], Any]
    check: str
    error: float


def run_case(
    candidates: Sequence[Candidate], roofline: Roofline, seconds: float, device: str = "cpu"
) -> tuple[list[Row], dict[str, str]]:
    """Time the candidates of one case; also the reason for each that was left out.

    Raises:
        WrongResult: if a kernel of ours does not compute what the reference does; nothing has been timed then.
    """
    case = candidates[0].case
    inputs = Inputs(case, device)
    verified: list[Verified] = []
    reasons: dict[str, str] = {}
    for candidate in candidates:
        try:
            reason = candidate.unavailable() or _too_many_copies(candidate, roofline)
            if reason is None:
                verified.append(inputs.verify(candidate))
                continue
        except Exception as error:
            if isinstance(candidate, ours.Operator):
                raise
            # Whatever another library throws is the reason why its row is missing.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        reasons[candidate.name] = reason
    calls = [
        [
            item.call,
            *(item.candidate.prepare(inputs.weight, inputs.bias) for _ in range(_copies(item.candidate, roofline) - 1)),
        ]
        for item in verified
    ]
    turns = [
        Turns(copies, item.candidate.convert_input(inputs.x), item.candidate.scope, inputs.finish)
        for item, copies in zip(verified, calls, strict=True)
    ]
    interleave(turns, seconds)
    return [_row(*row, roofline) for row in zip(verified, map(len, calls), turns, strict=True)], reasons


def _row(item: Verified, copies: int, turns: Turns, roofline: Roofline) -> Row:
    candidate, case = item.candidate, item.candidate.case
    first, median, third = statistics.quantiles(turns.samples, n=4)
    limit = roofline.limit(candidate.product(), cold=case.weights == COLD)
    return Row(
        name=candidate.name,
        ours=isinstance(candidate, ours.Operator),
        layer=case.layer,
        m=case.m,
        n=case.n,
        k=case.k,
        direction=case.direction,
        weights=case.weights,
        dtype=str(candidate.dtype).removeprefix("torch."),
        threads=case.threads,
        copies=copies,
        check=item.check,
        error=item.error,
        median=median,
        quartiles=(first, third),
        samples=len(turns.samples),
        limit=limit.seconds,
        limited_by=limit.by,
    )


def _copies(candidate: Candidate, roofline: Roofline) -> int:
    """Of the weight: enough to exceed the last cache twice when it shall be cold."""
    if candidate.case.weights == WARM:
        return 1
    wanted = min(2 * roofline.caches["l3"], MAX_COPIES_BYTES)
    return -(-wanted // candidate.product().weight_bytes)


def _too_many_copies(candidate: Candidate, roofline: Roofline) -> str | None:
    copies, most = _copies(candidate, roofline), candidate.max_copies
    return f"a cold weight of this size takes {copies} copies, over {most}" if most and copies > most else None


class Inputs:
    """Random numbers of a case on a device, and the float64 result of some rows."""

    def __init__(self, case: Case, device: str = "cpu"):
        generator = torch.Generator().manual_seed(0)
        columns, _ = case.columns
        self.case = case
        self.x = torch.randn(case.m, columns, generator=generator).to(device)
        self.weight = torch.randn(case.n, case.k, generator=generator).to(device)
        self.bias = torch.randn(case.n, generator=generator).to(device)
        self.rows = torch.linspace(0, case.m - 1, min(case.m, VERIFIED_ROWS)).round().long()
        self._exact: Tensor | None = None

    def finish(self) -> None:
        """Wait for the device."""
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)

    @property
    def exact(self) -> Tensor:
        """float64 [rows, columns]."""
        if self._exact is None:
            x, weight = self.x[self.rows].to(torch.float64), self.weight.to(torch.float64)
            self._exact = x @ weight if self.case.direction == GRAD_INPUT else x @ weight.t() + self.bias
        return self._exact

    def verify(self, candidate: Candidate) -> Verified:
        """Run the candidate once and check its result.

        Raises:
            WrongResult: for a kernel of ours that does not compute what the reference does.
            ValueError: for a wrong shape, and for any other candidate whose error is beyond its tolerance.
        """
        call = candidate.prepare(self.weight, self.bias)
        x = candidate.convert_input(self.x)
        with candidate.scope():
            out = candidate.convert_output(call(x))
        expected = [self.case.m, self.case.columns[1]]
        if list(out.shape) != expected:
            raise ValueError(f"result of shape {list(out.shape)}, expected {expected}")
        rows = out[self.rows]
        error = relative_error(rows, self.exact)
        if isinstance(candidate, ours.Operator):
            check = candidate.verify(candidate.convert_input(self.x[self.rows]), rows, self.weight, self.bias)
        elif error <= candidate.tolerance:
            check = f"relative error at most {candidate.tolerance:g}"
        else:
            raise ValueError(f"relative error {error:.2g}, at most {candidate.tolerance:g} expected")
        return Verified(candidate, call, check, error)
