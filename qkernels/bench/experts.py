"""The fused experts of a mixture: ours beside transformers' `grouped_mm`, whole forwards, timed in turn."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..profiling.roofline import MatmulCost, Roofline, measure
from ..profiling.timing import Turns, interleave
from .candidate import COLD, DTYPES, HasName, chosen, relative_error
from .ours import WrongResult
from .results import Results, Row, machine
from .suite import ROOFLINE_SECONDS, Progress

DIRECTION = "experts"
# Of the whole forward: two products, the second of a rounded input.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.03, 8: 0.06, 4: 0.35}


@dataclass(frozen=True)
class ExpertsPlan:
    """What to run.

    Attributes:
        tokens: numbers of them, one after the other.
        experts: how many there are, of which each token takes `taken`, drawn at random.
        hidden, intermediate: the gate and up projections are [2 * intermediate, hidden], down [hidden, intermediate].
        schemes: of ours.
        threads: numbers of them, one after the other.
        seconds: of timing for each row.
        only: fnmatch patterns of the candidates' names; empty: all.
    """

    tokens: tuple[int, ...] = (512, 16, 1)
    experts: int = 64
    taken: int = 8
    hidden: int = 1024
    intermediate: int = 1024
    schemes: tuple[str, ...] = ("w8a8", "w4a8-g32")
    threads: tuple[int, ...] = field(default_factory=lambda: (torch.get_num_threads(),))
    seconds: float = 2.0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.taken <= self.experts:
            raise ValueError(f"taken must be between 1 and {self.experts} experts, got {self.taken}")

    @property
    def title(self) -> str:
        return f"{self.taken} of {self.experts} experts, hidden {self.hidden}, intermediate {self.intermediate}"


@dataclass
class Experts(HasName):
    """A module of fused experts to time.

    Attributes:
        name: stable, unique.
        kind: what it multiplies: "int8", "bfloat16" or "float32".
        bits: stored bits a weight, scales left out.
        dtype: of its activations.
        forward: (hidden_states, top_k_index, top_k_weights) -> [tokens, hidden].
        tolerance: largest relative error (Frobenius) against float32.
    """

    name: str
    kind: str
    bits: int
    dtype: torch.dtype
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    tolerance: float

    def call(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.forward(*inputs)

    @property
    def ours(self) -> bool:
        return self.name.startswith("qkernels ")


def float_experts(plan: ExpertsPlan) -> Any:
    """transformers' module with random float32 weights, which computes by `grouped_mm`."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config = OlmoeConfig(
        hidden_size=plan.hidden,
        intermediate_size=plan.intermediate,
        num_experts=plan.experts,
        num_experts_per_tok=plan.taken,
    )
    config._experts_implementation = "grouped_mm"
    module = OlmoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter.requires_grad_(False), std=parameter.shape[-1] ** -0.5, generator=generator)
    return module


def candidates(plan: ExpertsPlan, module: Any) -> list[Experts]:
    """All that compute the plan."""
    from ..convert.model import quantize_
    from ..formats.scheme import QuantScheme

    found = [
        Experts(f"transformers grouped_mm {name}", name, 8 * dtype.itemsize, dtype, module.to(dtype), TOLERANCES[name])
        for name, dtype, module in ((name, dtype, copy.deepcopy(module)) for name, dtype in DTYPES.items())
    ]
    for scheme in plan.schemes:
        holder = torch.nn.ModuleDict({"experts": copy.deepcopy(module)})
        quantize_(holder, scheme)
        parsed = QuantScheme.parse(scheme)
        for name, dtype in DTYPES.items():
            kind = "int8" if parsed.int_activations else name
            words = f"qkernels {scheme} {name}"
            tolerance = TOLERANCES[parsed.weight_bits]
            found.append(Experts(words, kind, parsed.weight_bits, dtype, holder["experts"], tolerance))
    return chosen(found, plan.only)


class Inputs:
    """Random tokens with their experts, and what the float32 module makes of them."""

    def __init__(self, plan: ExpertsPlan, tokens: int, module: Any):
        generator = torch.Generator().manual_seed(tokens)
        self.hidden = torch.randn(tokens, plan.hidden, generator=generator)
        weights, self.index = torch.randn(tokens, plan.experts, generator=generator).softmax(-1).topk(plan.taken)
        self.weights = weights / weights.sum(-1, keepdim=True)
        self.used = self.index.unique().numel()
        self.exact = module(self.hidden, self.index, self.weights).to(torch.float64)

    def of(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden.to(dtype), self.index, self.weights.to(dtype)

    def error(self, item: Experts) -> float:
        """The relative error of a candidate.

        Raises:
            WrongResult: if it exceeds the tolerance.
        """
        error = relative_error(item.call(self.of(item.dtype)), self.exact)
        if not error <= item.tolerance:
            raise WrongResult(f"{item.name}: relative error {error:.2g}, at most {item.tolerance:g} expected")
        return error


def run(plan: ExpertsPlan, progress: Progress = lambda message: None) -> Results:
    """Run the plan.

    Raises:
        WrongResult: if a candidate does not compute the experts within its tolerance.
    """
    results = Results(machine(), [], [], [])
    threads_before = torch.get_num_threads()
    try:
        with torch.no_grad():
            progress("preparing the experts")
            module = float_experts(plan)
            found = candidates(plan, module)
            for threads in plan.threads:
                torch.set_num_threads(threads)
                results.rooflines.append(measure(threads, ROOFLINE_SECONDS))
                for tokens in plan.tokens:
                    progress(f"{tokens} tokens, {plan.title}, {threads} threads")
                    inputs = Inputs(plan, tokens, module)
                    results.rows += run_case(plan, found, inputs, results.rooflines[-1])
    finally:
        torch.set_num_threads(threads_before)
    return results


def run_case(plan: ExpertsPlan, found: Sequence[Experts], inputs: Inputs, roofline: Roofline) -> list[Row]:
    """Time the candidates on the same tokens."""
    errors = [inputs.error(item) for item in found]
    turns = [Turns([item.call], inputs.of(item.dtype)) for item in found]
    interleave(turns, plan.seconds)
    return [
        _row(plan, inputs, item, error, samples.samples, roofline)
        for item, error, samples in zip(found, errors, turns, strict=True)
    ]


def _row(
    plan: ExpertsPlan, inputs: Inputs, item: Experts, error: float, samples: list[float], roofline: Roofline
) -> Row:
    first, median, third = statistics.quantiles(samples, n=4)
    tokens, columns = len(inputs.hidden), 3 * plan.intermediate
    pairs = tokens * plan.taken
    weight_bytes = inputs.used * columns * plan.hidden * item.bits // 8
    activations = pairs * (columns + 2 * plan.hidden) * item.dtype.itemsize
    cost = MatmulCost(pairs, columns, plan.hidden, item.kind, weight_bytes, activations)
    limit = roofline.limit(cost, cold=True)
    return Row(
        name=item.name,
        ours=item.ours,
        layer=f"{tokens} tokens, {plan.title}",
        m=pairs,
        n=columns,
        k=plan.hidden,
        direction=DIRECTION,
        weights=COLD,
        dtype=str(item.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        copies=1,
        check=f"relative error at most {item.tolerance:g}",
        error=error,
        median=median,
        quartiles=(first, third),
        samples=len(samples),
        limit=limit.seconds,
        limited_by=limit.by,
    )
