"""Observers: what they see of a layer's inputs decides the scale of its static activations (`a8s` schemes).

An observer is fed one input after the other and remembers a histogram of fixed size, however much it sees. Any object
with the methods of `Observer` can take the place of those here.

Example:
    >>> observer = PercentileObserver(99.0)
    >>> for batch in torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(0)):
    ...     observer.observe(batch)
    >>> round(observer.scale().item() * 127, 1), round(observer.clipped_share(), 3)
    (2.6, 0.01)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BINS = 2048
LEVELS = 127  # the largest int8 magnitude that activations are rounded to
_TINY = 2.0**-96


class Observer(ABC):
    """The magnitudes of all inputs that were seen, as a histogram of `BINS` bins over [0, top].

    When a larger magnitude comes, pairs of bins are merged and `top`, a power of two, is doubled.
    """

    def __init__(self) -> None:
        self.largest = 0.0  # magnitude that was seen
        self._top = 0.0
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._device = torch.device("cpu")

    @property
    def has_observed(self) -> bool:
        """Whether it was fed anything."""
        return bool(self._counts.sum() > 0)

    def observe(self, x: Tensor) -> None:
        """Take an input into account.

        Args:
            x: float, of any shape.

        Raises:
            ValueError: if x holds NaN or Inf; the observer is then as it was.
        """
        if x.numel() == 0:
            return
        magnitudes = x.detach().to(torch.float32).abs().flatten()
        largest = magnitudes.max().item()
        if not math.isfinite(largest):
            raise ValueError("an observed input must be finite, got NaN or Inf")
        self._device = x.device
        self._update(largest)
        self.largest = max(self.largest, largest)
        if self._top == 0.0:
            self._top = 2.0 ** math.ceil(math.log2(max(largest, _TINY)))
        while largest > self._top:
            self._counts = torch.cat((self._counts.view(-1, 2).sum(dim=1), self._counts.new_zeros(BINS // 2)))
            self._top *= 2.0
        # In float64, for the powers of two above 2^127 and below 2^-126.
        self._counts += torch.histc(magnitudes.to(torch.float64) / self._top, BINS, 0.0, 1.0).cpu()

    def _update(self, largest: float) -> None:  # noqa: B027  most observers need the histogram alone
        """Take note of the largest magnitude of an input that is about to be counted."""

    @abstractmethod
    def limit(self) -> float:
        """The largest magnitude that is not to be clamped."""

    def scale(self) -> Tensor:
        """The scale, float32 [1], on the device of the last input: `limit() / 127`, or 1 if all inputs were 0.

        Raises:
            ValueError: if nothing was observed.
        """
        if not self.has_observed:
            raise ValueError("nothing was observed: run the model on sample inputs first")
        limit = self.limit()
        return torch.tensor([limit / LEVELS if limit >= _TINY else 1.0], dtype=torch.float32, device=self._device)

    def clipped_share(self) -> float:
        """How many of the values that were seen lie outside of what the scale represents, in [0, 1]."""
        bound = (LEVELS + 0.5) * self.scale().item()  # is rounded to 127 at most
        if bound >= self.largest:
            return 0.0
        inside = bound / self._top * BINS
        whole = int(inside)
        kept = self._counts[:whole].sum() + (inside - whole) * self._counts[whole]
        return 1.0 - (kept / self._counts.sum()).item()

    def centers(self) -> Tensor:
        """The magnitudes in the middle of the bins, float64 [BINS]."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self._top / BINS)


class MinMaxObserver(Observer):
    """The largest magnitude that was ever seen: nothing is clamped, and one outlier makes all steps coarse."""

    def limit(self) -> float:
        return self.largest


class MovingAverageMinMaxObserver(Observer):
    """An exponential average of the largest magnitudes of the inputs, as torch.ao's observer of this name.

    Args:
        averaging_constant: the weight of the last input.
    """

    def __init__(self, averaging_constant: float = 0.01) -> None:
        super().__init__()
        if not 0.0 < averaging_constant <= 1.0:
            raise ValueError(f"averaging_constant must be in (0, 1], got {averaging_constant}")
        self.averaging_constant = averaging_constant
        self._average: float | None = None

    def _update(self, largest: float) -> None:
        before = largest if self._average is None else self._average
        self._average = before + self.averaging_constant * (largest - before)

    def limit(self) -> float:
        return self._average or 0.0


class PercentileObserver(Observer):
    """The magnitude that this many per cent of all values do not exceed.

    Args:
        percentile: in (0, 100].
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 0.0 < percentile <= 100.0:
            raise ValueError(f"percentile must be in (0, 100], got {percentile}")
        self.percentile = percentile

    def limit(self) -> float:
        cumulative = self._counts.cumsum(0)
        reached = cumulative >= self.percentile / 100.0 * cumulative[-1]
        edge = (reached.to(torch.int64).argmax().item() + 1) * (self._top / BINS)
        return min(edge, self.largest)


class MSEObserver(Observer):
    """The limit with the least mean squared error of the rounded and clamped values.

    A value below half a step costs its square, one in range the twelfth of a squared step, and one outside the square
    of its distance from the limit. The limits that are tried are the largest magnitude times 2^(-i / 8).
    """

    def limit(self) -> float:
        limits = self.largest * 2.0 ** (-torch.arange(81, dtype=torch.float64) / 8.0).unsqueeze(1)
        values, steps = self.centers().clamp(max=self.largest), limits / LEVELS
        inside = torch.where(values < steps / 2, values.square(), steps.square() / 12)
        error = torch.where(values > limits, (values - limits).square(), inside)
        return limits[(error * self._counts).sum(dim=1).argmin()].item()


def observe_input(name: str, observer: Observer, x: Tensor) -> None:
    """`observer.observe(x)`, with an error that names the layer."""
    try:
        observer.observe(x)
    except ValueError as error:
        raise ValueError(f"calibration input of {name!r}: {error}; nothing was changed") from error


class InputWatch:
    """The forward pre-hook of a layer that was prepared. It is copied and pickled with the model."""

    def __init__(self, name: str, observer: Observer) -> None:
        self.name, self.observer = name, observer

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe_input(self.name, self.observer, args[0] if args else next(iter(kwargs.values())))


def is_watched(model: nn.Module) -> bool:
    """True if `prepare_` has prepared a layer of `model`, and `convert_` has not converted it yet."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(hook, InputWatch) for hook in hooks)


def remove_watch(layer: nn.Module) -> None:
    """Let the inputs of a layer be observed no more, if they are."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, InputWatch):
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
}


def observer_factory(observer: str | Callable[[], Observer]) -> Callable[[], Observer]:
    """What makes an observer for each layer: a name in `OBSERVERS`, or a class or function without arguments.

    Raises:
        ValueError: for an unknown name.
        TypeError: for something else.
    """
    if isinstance(observer, str):
        if observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {tuple(OBSERVERS)}, got {observer!r}")
        return OBSERVERS[observer]
    if not callable(observer) or isinstance(observer, Observer):
        raise TypeError(
            f"observer must be one of {tuple(OBSERVERS)}, or make a new observer for each layer when it is called, "
            f"such as lambda: PercentileObserver(99.9), got {type(observer).__name__}"
        )
    return observer
