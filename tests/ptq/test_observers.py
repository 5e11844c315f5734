"""Observers: their limits on known values, streaming, and what they refuse."""

import copy
import math

import pytest
import torch

from qkernels.ptq.observers import (
    BINS,
    OBSERVERS,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    observer_factory,
)


def normal(count: int = 200_000, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def observed(observer: Observer, *inputs: torch.Tensor) -> Observer:
    for x in inputs:
        observer.observe(x)
    return observer


def test_min_max_keeps_the_largest_magnitude():
    observer = observed(MinMaxObserver(), torch.tensor([1.0, -3.0]), torch.tensor([[2.0]]), torch.zeros(0))
    assert torch.equal(observer.scale(), torch.tensor([3.0 / 127]))
    assert observer.clipped_share() == 0.0


def test_moving_average_equals_that_of_torch_ao():
    ours = MovingAverageMinMaxObserver(0.1)
    theirs = torch.ao.quantization.MovingAverageMinMaxObserver(
        0.1, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127
    )
    for seed in range(8):
        x = normal(1000, seed).abs() * (seed + 1)  # so that the minimum, which theirs averages too, does not count
        ours.observe(x)
        theirs(x)
    assert ours.scale().item() == pytest.approx(theirs.calculate_qparams()[0].item(), rel=1e-5)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9])
def test_percentile_is_that_of_all_values_within_a_bin(percentile):
    batches = [normal(20_000, seed) * (seed + 1) for seed in range(6)]
    observer = observed(PercentileObserver(percentile), *batches)
    every = torch.cat(batches).abs()
    exact = every.sort().values[math.ceil(percentile / 100 * len(every)) - 1].item()
    assert exact <= observer.limit() * (1 + 1e-6) and observer.limit() - exact <= 2 * 2.0**5 / BINS
    assert observer.clipped_share() == pytest.approx(1 - percentile / 100, abs=5e-3)


def test_mse_is_near_the_best_of_all_limits():
    x = torch.cat((normal(), torch.tensor([60.0, -80.0])))
    limit = observed(MSEObserver(), x).limit()

    def error(limit: float) -> float:
        scale = limit / 127
        return ((x / scale).round().clamp(-127, 127) * scale - x).square().mean().item()

    best = min(error(80.0 * 2 ** (-i / 16)) for i in range(160))
    assert error(limit) <= 1.1 * best < 0.6 * error(80.0)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_the_order_of_magnitudes_does_not_matter_much(kind):
    """The histogram is widened as larger values come: small ones before large ones are not lost."""
    small, large = normal(50_000) * 1e-3, normal(50_000, 1) * 8
    if kind == "moving_average":
        return  # depends on the order by definition
    one, other = (observed(OBSERVERS[kind](), *inputs) for inputs in ((small, large), (large, small)))
    assert one.scale().item() == pytest.approx(other.scale().item(), rel=0.02)
    assert one.clipped_share() == pytest.approx(other.clipped_share(), abs=1e-3)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_zeros_and_tiny_values_have_a_scale(kind):
    assert observed(OBSERVERS[kind](), torch.zeros(10)).scale().item() == 1.0
    scale = observed(OBSERVERS[kind](), torch.full((10,), 2.0**-120)).scale()
    assert scale.isfinite() and scale.item() == 1.0
    assert observed(OBSERVERS[kind](), torch.full((10,), 3e38)).scale().isfinite()


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(kind, value):
    observer = observed(OBSERVERS[kind](), normal(1000))
    before = copy.deepcopy(observer)
    with pytest.raises(ValueError, match="must be finite, got NaN or Inf"):
        observer.observe(torch.tensor([1.0, value]))
    assert torch.equal(observer.scale(), before.scale())
    with pytest.raises(ValueError, match="nothing was observed"):
        OBSERVERS[kind]().scale()


def test_memory_does_not_grow():
    observer = observed(MSEObserver(), *(normal(1000, seed) for seed in range(20)))
    tensors = [value for value in vars(observer).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in tensors) == BINS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_counted_as_their_floats(dtype):
    x = normal(1000).to(dtype)
    one, other = observed(MSEObserver(), x), observed(MSEObserver(), x.float())
    assert torch.equal(one.scale(), other.scale())


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"observer must be one of .*'mse'"):
        observer_factory("entropy")
    with pytest.raises(TypeError, match="make a new observer for each layer"):
        observer_factory(MinMaxObserver())
    with pytest.raises(ValueError, match=r"percentile must be in \(0, 100\], got 101"):
        PercentileObserver(101)
    with pytest.raises(ValueError, match="averaging_constant"):
        MovingAverageMinMaxObserver(0.0)
