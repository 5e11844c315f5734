"""`QuantLSTM`, `QuantGRU`, `QuantRNN` and their cells: recurrent layers whose products are quantized.

The products with the inputs are one for all time steps, those with the state are one a step. Gates and states are those
of floats, so that gradients pass through time as in the float layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ..formats.scheme import QuantScheme
from .adapters import CompositeAdapter, SplitLayer, adapter_of, register_adapter

# The state of a sequence: h, and c of an LSTM, each [rows, features].
State = tuple[Tensor, ...]

# A parameter of a float layer: kind, product, and which layer and direction of several.
_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)((?:_l\d+(?:_reverse)?)?)")


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    gates = x + h
    size = gates.shape[-1] // 4
    kept = torch.sigmoid(gates[:, : 2 * size])  # of the input, and of the former cell
    cell = torch.addcmul(kept[:, size:] * state[1], kept[:, :size], torch.tanh(gates[:, 2 * size : 3 * size]))
    return torch.sigmoid(gates[:, 3 * size :]) * torch.tanh(cell), cell


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    size = x.shape[-1] // 3
    reset, update = torch.sigmoid(x[:, : 2 * size] + h[:, : 2 * size]).chunk(2, dim=-1)
    new = torch.tanh(torch.addcmul(x[:, 2 * size :], reset, h[:, 2 * size :]))
    return (torch.lerp(new, state[0], update),)


def _rnn_tanh(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.tanh(x + h),)


def _rnn_relu(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.relu(x + h),)


# By `mode` of a float layer: how the products of a step with x and with h, and the state, make the next state.
_STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _rnn_tanh,
    "RNN_RELU": _rnn_relu,
}


class _Parts(SplitLayer):
    """A module whose `weight_ih_l0`, `bias_ih_l0`, ... are those of its linear layers `ih_l0`, ...."""

    @classmethod
    def from_float(cls, layer: nn.Module, scheme: str | QuantScheme, **layer_options: str) -> Any:
        """Quantize all products of a float layer; biases are shared with it.

        Args:
            layer_options: mode, grad_dtype and weight_scale, as in `QuantLinear`.

        Raises:
            TypeError: for another kind of module, or a subclass that computes something else.
            ValueError: if a weight holds NaN or Inf, or the scheme does not fit.
        """
        if not isinstance(layer, cls.float_type) or (why := RecurrentAdapter().reason(layer)) is not None:
            raise TypeError(
                f"layer must be an nn.{cls.float_type.__name__}, got {type(layer).__name__}"
                + (f": {why}" if isinstance(layer, cls.float_type) else "")
            )
        twin = RecurrentAdapter().split(layer)
        for name, part in list(twin.named_children()):
            setattr(twin, name, adapter_of(part).quantize(part, scheme, **layer_options))
        return twin

    def _take_parts(self, layer: nn.Module) -> None:
        """Make a linear layer of each weight, on the parameters of the float layer."""
        for name, weight in layer._parameters.items():
            found = _NAME.fullmatch(name)
            if found is not None and found[1] == "weight":
                assert weight is not None
                product, place = found[2], found[3]
                bias = layer._parameters.get(f"bias_{product}{place}")
                part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
                part.weight = weight
                part.register_parameter("bias", bias)
                setattr(self, f"{product}{place}", part)

    def __getattr__(self, name: str) -> Any:
        if (found := _NAME.fullmatch(name)) is not None:
            kind, product, place = found.groups()
            if (part := self._modules.get(f"{product}{place}")) is not None:
                return getattr(part, kind)
        return super().__getattr__(name)

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the weights of a float layer for those of the parts, where these are trained or in float."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if (found := _NAME.fullmatch(key[len(prefix) :])) is not None:
                kind, product, place = found.groups()
                state_dict[f"{prefix}{product}{place}.{kind}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """Do nothing: the layer is made of a float layer, and has its weights."""


class _Recurrent(_Parts):
    """A recurrent layer in the place of an `nn.RNNBase`."""

    _OPTIONS: ClassVar = (
        "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional",
        "proj_size",
    )  # fmt: skip

    def __init__(self, layer: nn.RNNBase) -> None:
        """A twin of `layer`, on the same parameters, whose products are those of float layers still."""
        nn.Module.__init__(self)
        for name in self._OPTIONS:
            setattr(self, name, getattr(layer, name))
        # What nn.RNNBase keeps of its parameters: there are none.
        self._flat_weights: list[Any] = []
        self._flat_weights_names: list[str] = []
        self._flat_weight_refs: list[Any] = []
        self._all_weights: list[list[str]] = []
        self._take_parts(layer)
        self.training = layer.training

    def flatten_parameters(self) -> None:
        """Do nothing: this is for cuDNN."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    __setstate__ = nn.Module.__setstate__

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Compute a sequence.

        Args:
            input: float [steps, batch, input_size], or [batch, steps, input_size] with `batch_first`, or unbatched
                [steps, input_size], or a `PackedSequence`.
            hx: the state before the first step, as of the float layer; None: zeros.

        Returns:
            The outputs of the last layer, of the form of `input`, and the state after the last step.

        Raises:
            RuntimeError: for shapes that do not fit.
        """
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None:
            x, sizes, unbatched = packed.data, packed.batch_sizes.tolist(), False
        else:
            if input.dim() not in (2, 3):
                raise RuntimeError(f"input must have 2 or 3 dimensions, got {input.dim()}")
            unbatched = input.dim() == 2
            steps = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if self.batch_first else input
            x, sizes = steps.flatten(0, 1), [steps.shape[1]] * steps.shape[0]
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"input must have {self.input_size} features, got shape {list(x.shape)}")
        if not sizes:
            raise RuntimeError("input must have at least one step")
        state = self._first_state(x, sizes[0], hx, unbatched)
        if packed is not None and packed.sorted_indices is not None:
            state = tuple(part.index_select(1, packed.sorted_indices) for part in state)
        out, last = self._layers(x, sizes, state)
        if packed is not None:
            if packed.unsorted_indices is not None:
                last = tuple(part.index_select(1, packed.unsorted_indices) for part in last)
            result: Any = PackedSequence(out, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        else:
            result = out.unflatten(0, (len(sizes), sizes[0]))
            result = result.squeeze(1) if unbatched else result.transpose(0, 1) if self.batch_first else result
        last = tuple(part.squeeze(1) for part in last) if unbatched else last
        return result, last if len(last) == 2 else last[0]

    def _first_state(self, x: Tensor, batch: int, hx: Any, unbatched: bool) -> State:
        """The state [layers * directions, batch, features] of the first step."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        widths = [self.proj_size or self.hidden_size] + ([self.hidden_size] if self.mode == "LSTM" else [])
        if hx is None:
            return tuple(x.new_zeros(rows, batch, width) for width in widths)
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        given = tuple(part.unsqueeze(1) for part in given) if unbatched else given
        expected = [(rows, batch, width) for width in widths]
        if [tuple(part.shape) for part in given] != expected:
            raise RuntimeError(
                f"hx must have the shapes {expected} (without the batch if unbatched), "
                f"got {[tuple(part.shape) for part in given]}"
            )
        return given

    def _layers(self, x: Tensor, sizes: Sequence[int], state: State) -> tuple[Tensor, State]:
        """All layers over x [sum of sizes, features]: the outputs, and the states after the last step."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        last = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for place, direction in enumerate(directions):
                own = tuple(part[layer * len(directions) + place] for part in state)
                out, after = self._direction(f"_l{layer}{direction}", x, sizes, own)
                outputs.append(out)
                last.append(after)
            x = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _direction(self, place: str, x: Tensor, sizes: Sequence[int], first: State) -> tuple[Tensor, State]:
        """One layer in one direction: sequences that are short leave early or, backwards, enter late."""
        products = self._modules[f"ih{place}"](x).split(sizes)  # type: ignore[misc]
        step, hidden = _STEPS[self.mode], self._modules[f"hh{place}"]
        project = self._modules.get(f"hr{place}")
        assert hidden is not None
        outputs: list[Tensor] = []
        ended: list[State] = []
        backwards = place.endswith("_reverse")
        state = tuple(part[: sizes[-1] if backwards else sizes[0]].to(products[0].dtype) for part in first)
        for gates in reversed(products) if backwards else products:
            rows, before = gates.shape[0], state[0].shape[0]
            if rows < before:
                ended.append(tuple(part[rows:] for part in state))
                state = tuple(part[:rows] for part in state)
            elif rows > before:
                entered = (part[before:rows].to(gates.dtype) for part in first)
                state = tuple(torch.cat(parts) for parts in zip(state, entered, strict=True))
            state = step(gates, hidden(state[0]), state)
            if project is not None:
                state = (project(state[0]), state[1])
            outputs.append(state[0])
        whole = [state, *reversed(ended)]
        state = tuple(torch.cat(parts) for parts in zip(*whole, strict=True)) if ended else state
        return torch.cat(outputs[::-1] if backwards else outputs), state


class QuantLSTM(_Recurrent, nn.LSTM):
    """A long short-term memory (Hochreiter and Schmidhuber 1997) in the place of an `nn.LSTM`.

    The matrices of layer 0 are the linear layers `ih_l0` and `hh_l0` (and `hr_l0` with proj_size), each a `QuantLinear`
    or, if it was skipped, in float; `weight_ih_l0` and the like can be read, as of the float layer. In mode "qat" the
    weight of the state is quantized anew in each step.

    Example:
        >>> layer = QuantLSTM.from_float(nn.LSTM(8, 16, batch_first=True), "w8a8")
        >>> out, (h, c) = layer(torch.randn(2, 5, 8))
        >>> out.shape, h.shape
        (torch.Size([2, 5, 16]), torch.Size([1, 2, 16]))
    """

    float_type = nn.LSTM


class QuantGRU(_Recurrent, nn.GRU):
    """Gated recurrent units (Cho et al. 2014, arXiv:1406.1078) in the place of an `nn.GRU`; see `QuantLSTM`."""

    float_type = nn.GRU


class QuantRNN(_Recurrent, nn.RNN):
    """An Elman network in the place of an `nn.RNN`; see `QuantLSTM`."""

    float_type = nn.RNN


class _Cell(_Parts):
    """One step of a recurrent layer, in the place of an `nn.RNNCellBase`."""

    def __init__(self, layer: nn.RNNCellBase) -> None:
        """A twin of `layer`, on the same parameters, whose products are those of float layers still."""
        nn.Module.__init__(self)
        for name in ("input_size", "hidden_size", "bias", "nonlinearity"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self._take_parts(layer)
        self.training = layer.training

    def _kind(self) -> str:
        return "LSTM"

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Compute one step.

        Args:
            input: float [batch, input_size] or [input_size].
            hx: the state before it, as of the float layer; None: zeros.

        Returns:
            The state after it.

        Raises:
            RuntimeError: for shapes that do not fit.
        """
        kind = self._kind()
        batch, parts = input.shape[:-1], 2 if kind == "LSTM" else 1
        given = (hx,) if isinstance(hx, Tensor) else hx
        if given is None:
            given = (input.new_zeros(*batch, self.hidden_size),) * parts
        expected = [(*batch, self.input_size), *[(*batch, self.hidden_size)] * parts]
        shapes = [tuple(input.shape), *(tuple(part.shape) for part in given)]
        if input.dim() not in (1, 2) or shapes != expected:
            raise RuntimeError(
                f"input must be [batch, {self.input_size}] and {'h and c' if parts == 2 else 'hx'} "
                f"[batch, {self.hidden_size}], or without the batch, got {shapes}"
            )
        x = self.ih(input)
        h = self.hh(given[0])
        if input.dim() == 1:
            rows = tuple(part.to(x.dtype).unsqueeze(0) for part in given)
            state = tuple(part.squeeze(0) for part in _STEPS[kind](x.unsqueeze(0), h.unsqueeze(0), rows))
        else:
            state = _STEPS[kind](x, h, tuple(part.to(x.dtype) for part in given))
        return state if kind == "LSTM" else state[0]


class QuantLSTMCell(_Cell, nn.LSTMCell):
    """One step of an LSTM in the place of an `nn.LSTMCell`; its products are `ih` and `hh`."""

    float_type = nn.LSTMCell


class QuantGRUCell(_Cell, nn.GRUCell):
    """One step of gated recurrent units in the place of an `nn.GRUCell`; its products are `ih` and `hh`."""

    float_type = nn.GRUCell

    def _kind(self) -> str:
        return "GRU"


class QuantRNNCell(_Cell, nn.RNNCell):
    """One step of an Elman network in the place of an `nn.RNNCell`; its products are `ih` and `hh`."""

    float_type = nn.RNNCell

    def _kind(self) -> str:
        return f"RNN_{self.nonlinearity.upper()}"


_TWINS: dict[type[nn.Module], type[_Parts]] = {
    nn.LSTM: QuantLSTM,
    nn.GRU: QuantGRU,
    nn.RNN: QuantRNN,
    nn.LSTMCell: QuantLSTMCell,
    nn.GRUCell: QuantGRUCell,
    nn.RNNCell: QuantRNNCell,
}


class RecurrentAdapter(CompositeAdapter[nn.Module]):
    """Splits recurrent layers and cells into their products."""

    def reason(self, layer: nn.Module) -> str | None:
        if (why := super().reason(layer)) is not None:
            return why
        own = layer._parameters  # a cell without biases holds None for them
        known = all(_NAME.fullmatch(name) and (own[name] is not None or name.startswith("bias")) for name in own)
        return None if known else "parametrized weight"

    def split(self, layer: nn.Module) -> _Parts:
        kind = next(kind for kind in _TWINS if isinstance(layer, kind))
        return _TWINS[kind](layer)

    def join(self, twin: SplitLayer, float_type: type[nn.Module]) -> nn.Module:
        sizes: dict[str, Any] = {"device": "meta", "bias": twin.bias}
        if isinstance(twin, _Recurrent):
            names = ["num_layers", "batch_first", "dropout", "bidirectional"]
            names += ["proj_size"] if twin.mode == "LSTM" else []
            sizes |= {name: getattr(twin, name) for name in names}
            if isinstance(twin, nn.RNN):
                sizes["nonlinearity"] = twin.mode.removeprefix("RNN_").lower()
        elif isinstance(twin, nn.RNNCell):
            sizes["nonlinearity"] = twin.nonlinearity
        kind = next(kind for kind in _TWINS if issubclass(float_type, kind))
        layer = kind(twin.input_size, twin.hidden_size, **sizes)
        layer.__class__ = float_type
        for name in list(layer._parameters):
            if layer._parameters[name] is not None:
                setattr(layer, name, getattr(twin, name))
        return layer


for _kind in _TWINS:
    register_adapter(_kind, RecurrentAdapter())
