"""`QuantLinear`: the drop-in module; its state is plain tensors in the canonical storage."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..autograd.frozen import LowRank, adapted_linear, quant_linear
from ..autograd.input_order import gather_features
from ..autograd.layer_calls import autocast_dtype, check_input, traced
from ..autograd.trained import trained_linear
from ..distributed.dtensors import is_dtensor
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..formats.validate import STORAGE, input_order_problem, x_scale_problem
from ..kernels import ops
from ..kernels.quantizers import quantize_weight
from ..system.deprecation import renamed_keywords
from .adapters import find_adapter, is_frozen
from .matrix_layer import MatrixLayer
from .nested import over_values
from .storage import Storage
from .stored_parameter import plain

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# torch computes tensors of fewer elements on one thread: thousands of such operations do not wait for one another.
_SERIAL_ELEMENTS = 32768


class QuantLinear(MatrixLayer, nn.Linear):
    """A linear layer on an int8 or int4 weight.

    Gradients pass straight through every rounding. What is trained, and stored, is a matter of the mode:

    - "frozen": the bias, and the input that adapters such as LoRA need. A new layer is the zero weight, until
      `load_state_dict` or `set_weight`; `from_float` quantizes a layer. The state dict holds `qweight`, `scales`,
      `zeros` (asymmetric schemes) and `bias`, all plain tensors in the canonical storage that the kernels read
      directly. `weight` is a read-only view of them as a float tensor, made when it is read (see `FrozenWeight`).
    - "qat": a float `weight`, which is quantized in each forward; its gradient is 0 where clamping changed a 4-bit
      integer. The state dict is that of an `nn.Linear`; `freeze_()` makes the layer frozen, with the same outputs.
      With `weight_scale="learned"` the scales are a parameter too, `scales`, which the state dict holds as well.
    - "int8": a `weight` that is int8 itself (see `Int8Weight`) and is updated with stochastic rounding, for schemes
      with 8-bit weights of one scale a row. The state dict is that of the frozen layer.

    Under static activations (`a8s` schemes) each mode also holds `x_scale`, float32 [1], which calibration has chosen
    (`quantize_(..., calibration=...)` or `prepare_` and `convert_`); a new layer has 1. What lies outside of 127 scales
    is clamped. Gradients pass straight through that too, but for learned scales.

    A frozen weight may have its columns in an order of their own, in which GPTQ grouped them: the buffer `input_order`
    (see `set_weight`). Then each call gathers the input's features once; all that reads the weight, but for the stored
    tensors themselves, sees its columns in the order of the features.

    Shape: input float32, bfloat16 or float16 [..., in_features]; output [..., out_features] of the input's dtype, or
    of the autocast dtype under autocast. Any leading shape, also empty.

    Args:
        in_features: K, at most 131072 for `a8` schemes.
        out_features: N.
        bias: True for a layer with a bias [N].
        scheme: scheme name or `QuantScheme`.
        mode: "frozen", "qat" or "int8".
        grad_dtype: "float": gradients are computed with the gradient of the output in float. "int8": that is rounded
            stochastically to int8, with a seed from torch's default CPU generator, and multiplied in integers.
        weight_scale: how mode "qat" chooses the scales of the weight. "absmax": by its range, in each forward.
            "learned": they are trained (learned step size), for symmetric schemes, and begin with those of the range.
            So is `x_scale` of static activations then, which begins with the calibrated one; `x` gets no gradient
            where it was clamped.
        device, dtype: of the parameters; `dtype` applies to the bias and is the layer's `compute_dtype`. The scales
            are float32 always.

    Raises:
        ValueError: for an unknown scheme, mode, grad_dtype or weight_scale, a scheme that the mode cannot train,
            learned scales elsewhere than in mode "qat", or a shape that cannot be computed exactly.
    """

    float_type: type[nn.Module] = nn.Linear

    @renamed_keywords(grad="grad_dtype")
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | QuantScheme = "w8a8",
        *,
        mode: str = "frozen",
        grad_dtype: str = "float",
        weight_scale: str = "absmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        options = {"mode": mode, "grad_dtype": grad_dtype, "weight_scale": weight_scale}
        self._set_up(scheme, bias, **options, device=device, dtype=dtype)

    @classmethod
    @renamed_keywords(grad="grad_dtype")
    def from_float(
        cls,
        layer: nn.Module,
        scheme: str | QuantScheme,
        *,
        mode: str = "frozen",
        grad_dtype: str = "float",
        weight_scale: str = "absmax",
        x_scale: Tensor | None = None,
    ) -> QuantLinear:
        """Quantize a float linear layer; the bias parameter is shared with `layer`.

        So is, for mode "qat", the weight, if the layer holds it as [N, K].

        Args:
            layer: an `nn.Linear`, a transformers `Conv1D`, or a layer that `register_adapter` has made known.
            x_scale: float32 [1], the scale of the activations, for `a8s` schemes only; an observer
                (`qkernels.ptq.observers`) finds it.

        Raises:
            TypeError: for another kind of module.
            ValueError: if the weight holds NaN or Inf, the scheme does not fit, or `x_scale` does not fit the scheme.
        """
        adapter = find_adapter(layer)
        if adapter is None or adapter.lookup or not adapter.measured or is_frozen(layer):
            raise TypeError(
                "layer must be an nn.Linear, a transformers Conv1D or a layer with an adapter, "
                f"got {type(layer).__name__}"
            )
        if (problem := x_scale_problem(x_scale, QuantScheme.parse(scheme))) is not None:
            raise ValueError(f"x_scale {problem}; quantize_(model, scheme, calibration=...) finds it from inputs")
        weight = layer.weight.detach() if isinstance(layer, QuantLinear) else adapter.weight(layer)
        out_features, in_features = weight.shape
        options = {"mode": mode, "grad_dtype": grad_dtype, "weight_scale": weight_scale}
        quantized = cls(in_features, out_features, False, scheme, **options, device="meta", dtype=weight.dtype)
        key, transposed = adapter.key, adapter.transposed
        return quantized._begin_as(
            layer,
            lambda: nn.Parameter(weight.contiguous()) if transposed else getattr(layer, key),
            lambda: quantize_weight(weight, quantized.scheme),
            adapter.bias(layer),
            x_scale,
            key,
            transposed,
        )

    def _reset_weight(self) -> None:
        nn.Linear.reset_parameters(self)

    @property
    def input_order(self) -> Tensor | None:
        """int32 [K]: stored column j of the weight multiplies feature `input_order[j]`; None: feature j."""
        return self._buffers.get("input_order")

    @property
    def _may_order_input(self) -> bool:
        return self.mode == "frozen"

    def set_weight(self, weight: QuantizedWeight, input_order: Tensor | None = None) -> None:
        """Replace the quantized weight, and the order of its columns; see `MatrixLayer.set_weight`.

        >>> layer, order = qk.QuantLinear(4, 2, scheme="w8a16"), torch.tensor([2, 0, 3, 1], dtype=torch.int32)
        >>> layer.set_weight(qk.quantize_weight(torch.eye(4)[:2, order.long()], "w8a16"), order)
        >>> layer.dequantize().round().tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]

        Args:
            weight: the canonical storage of [N, K], as it is multiplied with the features in the order `input_order`.
            input_order: int32 [K], which is copied: column j of `weight` multiplies feature `input_order[j]` of the
                input. None: feature j.

        Raises:
            ValueError: naming the tensor that does not fit; the layer is left as it was.
        """
        if input_order is not None and not self._may_order_input:
            raise ValueError(f"input_order must be None in mode {self.mode!r}, which has no order of columns")
        if (problem := input_order_problem(input_order, self.in_features)) is not None:
            raise ValueError(f"input_order {problem}")
        super().set_weight(weight)
        with torch.inference_mode(False):
            self._order_input(None if input_order is None else input_order.detach().to(self._device()).clone())

    def _share_out(self, name: str, like: DTensor) -> None:
        from ..distributed.tensor_parallel import COLUMNS, check_columns, distribute, split_dimension

        if self.input_order is not None:
            raise NotImplementedError(
                "a layer with an input_order (activation order of GPTQ) cannot be shared out by tensor parallelism; "
                "use DDP or FSDP2 (fully_shard)"
            )
        if "weight_mask" in self._buffers:
            raise NotImplementedError(
                "a layer with a mask cannot be shared out by tensor parallelism; use DDP or FSDP2 (fully_shard)"
            )
        if self._learns_x_scale and self.scheme.static_activations:
            raise NotImplementedError(
                "a layer that learns the scale of its activations cannot be shared out by tensor parallelism; use DDP "
                "or FSDP2 (fully_shard), or weight_scale='absmax'"
            )
        mesh, dimension = like.device_mesh, split_dimension(like)
        if name == "weight" and dimension == COLUMNS:
            check_columns(self, mesh.size())
            for other in STORAGE:  # of a frozen weight, or learned scales
                if self._parameters.get(other) is not None:
                    shared = distribute(self, other, mesh, dimension)
                    self.register_parameter(other, nn.Parameter(shared, requires_grad=self.mode != "frozen"))

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return traced(self, input)
        if input.is_nested:
            return over_values(self.forward, input, trailing=1)
        own = self._parameters
        if is_dtensor(own["qweight"] if self.mode == "frozen" else own.get("weight")):
            from ..distributed.tensor_parallel import parallel_linear

            return parallel_linear(self, input)
        check_input(input, self.in_features)
        dtype = autocast_dtype(input.device.type)
        if self.mode == "frozen":
            args = (self._frozen_weight(), self.bias, self._scheme_name, dtype, self.grad_dtype)
            column_scales = self._column_scales_for(input) if self.grad_dtype == "int8" else None
            if "input_order" in self._buffers:
                input = gather_features(input, self.input_order)
            return quant_linear(input, *args, column_scales, self._activation_scale())
        weight, scales = self._trained_weight(), self._parameters.get("scales")
        if self.mode == "int8" and "weight_mask" in self._buffers:
            weight = self._masked(weight)
        x_scale = self._activation_scale()
        return trained_linear(input, weight, self.bias, self.scheme, dtype, self.grad_dtype, scales, x_scale)

    def forward_adapted(self, x: Tensor, adapter: LowRank) -> Tensor:
        """`forward(x)` of a frozen layer plus the product of a low-rank adapter, both in one autograd function."""
        if x.is_nested:
            return over_values(lambda values: self.forward_adapted(values, adapter), x, trailing=1)
        check_input(x, self.in_features)
        if (order := self.input_order) is not None:
            x, adapter = gather_features(x, order), adapter._replace(down=gather_features(adapter.down, order))
        args = (self._frozen_weight(), self.bias, self._scheme_name, adapter, autocast_dtype(x.device.type))
        return adapted_linear(x, *args, self.grad_dtype, self._column_scales_for(x), x_scale=self._activation_scale())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._options_repr()}"
        )


def stored_columns(quantized: Storage, weight: Tensor) -> Tensor:
    """A float weight [..., K] with its columns in the order in which the layer stores them."""
    order = quantized._buffers.get("input_order")
    return weight if order is None else weight.index_select(-1, order)


def relative_error(weight: Tensor, quantized: Storage) -> float:
    """Frobenius norm of (dequantized - weight) over that of the weight; 0 for a zero weight.

    Args:
        weight: float [out_features, in_features], or [E, out_features, in_features] of E experts.
        quantized: a layer with that weight.
    """
    stored = quantized.quantized_weight().map(plain)
    weight = stored_columns(quantized, weight)
    error, norm = 0.0, 0.0
    for matrix, own in [(weight, stored)] if weight.dim() == 2 else _each_expert(weight, stored):
        errors, norms = _squared_norms(matrix, own, quantized, torch.float32)
        if norms != 0 and not 1e-20 < norms < 1e30:  # float32 is too short for the squares, and much faster
            errors, norms = _squared_norms(matrix, own, quantized, torch.float64)
        error, norm = error + errors, norm + norms
    return (error / norm) ** 0.5 if norm > 0 else error**0.5


def _each_expert(weight: Tensor, stored: QuantizedWeight) -> Iterator[tuple[Tensor, QuantizedWeight]]:
    """The matrix of each expert, and how it is stored."""
    for at in range(weight.shape[0]):
        yield weight[at], stored.map(itemgetter(at))


@torch.no_grad()
def _squared_norms(
    weight: Tensor, stored: QuantizedWeight, quantized: Storage, dtype: torch.dtype
) -> tuple[float, float]:
    """Sums of squares, of the error and of the weight, whose parts are summed in `dtype`, and then in float64.

    The norm of each row of a bfloat16 or float16 weight is rounded to that dtype, which all rows together average out.
    """
    rows = max(1, (_SERIAL_ELEMENTS - 1) // quantized.in_features)
    qweight, scales, zeros = stored
    zero_blocks: Iterable[Tensor | None] = itertools.repeat(None) if zeros is None else zeros.split(rows)
    blocks = zip(weight.detach().split(rows), qweight.split(rows), scales.split(rows), zero_blocks, strict=False)
    errors = [torch.zeros((), dtype=dtype, device=weight.device)]
    for floats, q, s, z in blocks:
        error = ops.dequantize_weight(q, s, z, quantized.in_features, quantized.scheme).sub_(floats)
        errors.append(torch.linalg.vector_norm(error, dtype=dtype))
    norms = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=None if dtype == torch.float32 else dtype)
    squared_error, squared_norm = (n.to(torch.float64).square().sum().item() for n in (torch.stack(errors), norms))
    return squared_error, squared_norm
