"""`QuantGroupedLinear`: the matrices of fused experts, each of which multiplies rows of its own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autograd.experts import grouped_linear, trained_grouped_linear
from ..autograd.layer_calls import autocast_dtype, check_input
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..formats.validate import x_scale_problem
from ..kernels.quantizers import quantize_weight
from .adapters import LayerAdapter, register_adapter
from .layer_adapters import QuantizedAdapter
from .matrix_layer import MatrixLayer
from .storage import Storage


class GroupedLowRank(NamedTuple):
    """Adapters beside the matrices of E experts: each adds `(x @ down.T * scaling) @ up.T` to the output of its expert.

    Attributes:
        down: float [E, r, K].
        up: float [E, N, r].
        scaling: a number.
    """

    down: Tensor
    up: Tensor
    scaling: float


def float_products(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, N]: the products of rows that are sorted by expert, in float; 0 in rows of no expert.

    Args:
        x: float [M, K].
        weight: float [E, N, K].
        offsets: int64 [E], where the rows of each expert end.
        bias: float [E, N] or None.
    """
    ends = offsets.tolist()
    sizes = [end - begin for begin, end in pairwise([0, *ends])]
    *parts, rest = x.split([*sizes, len(x) - sum(sizes)])
    biases = [None] * len(sizes) if bias is None else bias.unbind()
    done = [
        F.linear(part, matrix, own)
        for part, matrix, own in zip(parts, weight.unbind(), biases, strict=True)
        if len(part)
    ]
    return torch.cat([*done, x.new_zeros(len(rest), weight.shape[1], dtype=weight.dtype)])


def add_low_rank(
    out: Tensor, x: Tensor, offsets: Tensor, rows: Tensor | None, adapters: tuple[GroupedLowRank, ...]
) -> Tensor:
    """The output [M, N] of grouped products with what adapters add to it, multiplied in its dtype."""
    if adapters:
        x = (x if rows is None else x[rows]).to(out.dtype)
    for down, up, scaling in adapters:
        middle = float_products(x, down.to(out.dtype), offsets) * scaling
        out = out + float_products(middle, up.to(out.dtype), offsets)
    return out


class GroupedLinear(nn.Module):
    """The matrices of E experts in float, as a transformers model holds them in one parameter.

    Attributes:
        weight: the parameter: [E, N, K], transposed [E, K, N], or the same with the experts below one another in a
            matrix, [E * N, K].
        bias: [E, N] or None.
        num_experts: E.
        transposed: each matrix is held as [K, N].
        flat: the parameter is a matrix.
        low_rank: adapters that add to the output.
    """

    low_rank: tuple[GroupedLowRank, ...] = ()
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, num_experts: int, *, transposed: bool = False
    ) -> None:
        super().__init__()
        self.num_experts, self.transposed, self.flat = num_experts, transposed, weight.dim() == 2
        self.register_parameter("bias", bias)
        self.register_parameter("weight", weight)

    def matrices(self) -> Tensor:
        """The weight as [E, N, K], a view of the parameter."""
        weight = self.weight.unflatten(0, (self.num_experts, -1)) if self.flat else self.weight
        return weight.mT if self.transposed else weight

    def reset_parameters(self) -> None:
        """Give the weight the random values of `nn.Linear`, and the bias zeros."""
        bound = self.matrices().shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
        """Like `QuantGroupedLinear.forward`."""
        dtype = autocast_dtype(x.device.type) or self.weight.dtype
        own = (x if rows is None else x[rows]).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        out = float_products(own, self.matrices().to(dtype), offsets, bias)
        return add_low_rank(out, x, offsets, rows, self.low_rank)

    def extra_repr(self) -> str:
        experts, out_features, in_features = self.matrices().shape
        return f"num_experts={experts}, in_features={in_features}, out_features={out_features}"


class QuantGroupedLinear(MatrixLayer):
    """The int8 or int4 matrices of E experts: each row of the output is the product with one of them.

    Modes, gradients and what is saved are those of `QuantLinear`, whose bits each expert's product has. The state dict
    holds the canonical storage of every expert, one after the other: `qweight` [E, N, ...], `scales` and `zeros`
    [E, N, groups], and `bias` [E, N]; in mode "qat" `weight` [E, N, K]. Static activations (`a8s` schemes) have one
    `x_scale` [1] for all experts, which see one distribution of tokens, so that each is quantized once.

    Shape: `forward(x, offsets, rows)` takes x float [T, K], offsets int64 [E], where the rows of each expert end among
    the M rows of the output, and rows int64 [M], the row of x that each multiplies (None: M = T, as they are). The
    output is [M, N], of x.dtype or the autocast dtype; rows past the last offset are 0.

    Args:
        num_experts: E.
        in_features: K, at most 131072 for `a8` schemes.
        out_features: N.
        bias: True for biases [E, N].
        scheme, mode, grad_dtype, weight_scale, device, dtype: as in `QuantLinear`.

    Raises:
        ValueError: as `QuantLinear` does.

    Example:
        >>> from qkernels.nn.grouped_linear import QuantGroupedLinear
        >>> layer = QuantGroupedLinear(4, 64, 32, scheme="w4a8-g32")
        >>> layer(torch.randn(5, 64), torch.tensor([2, 2, 4, 5])).shape  # 2, 0, 2 and 1 rows for the experts
        torch.Size([5, 32])
    """

    float_type: type[nn.Module] = GroupedLinear
    low_rank: tuple[GroupedLowRank, ...] = ()  # adapters that add to the output

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        scheme: str | QuantScheme = "w8a8",
        *,
        mode: str = "frozen",
        grad_dtype: str = "float",
        weight_scale: str = "absmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.leading = in_features, out_features, (num_experts,)
        options = {"mode": mode, "grad_dtype": grad_dtype, "weight_scale": weight_scale}
        self._set_up(scheme, bias, **options, device=device, dtype=dtype)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.leading[0]

    def _frozen_view(self) -> Tensor:
        """The matrices [E, N, K] as they are multiplied, in `compute_dtype`: a copy."""
        return self.dequantize().to(self.compute_dtype)

    def _trained_view(self) -> Tensor:
        """The parameter: [E, N, K], in mode "int8" [E * N, K]."""
        return self._trained_weight()

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.flatten(0, -2)

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.view(self.weight_shape)

    def _reset_weight(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self._trained_weight(), -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as it is multiplied, in the canonical storage of each expert, one after the other."""
        weight = super().quantized_weight()
        return weight if self.mode == "frozen" else weight.map(self._by_expert)

    def _by_expert(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.num_experts, self.out_features))

    def _take(self, weight: QuantizedWeight) -> None:
        super()._take(weight if self.mode == "frozen" else weight.map(lambda tensor: tensor.flatten(0, 1)))

    def _allocate_column_scales(self, device: torch.device | str | None) -> None:
        """There are none."""
        if self.mode == "frozen":
            self.register_buffer("column_scales", None)

    @classmethod
    def from_float(
        cls,
        layer: GroupedLinear,
        scheme: str | QuantScheme,
        *,
        mode: str = "frozen",
        grad_dtype: str = "float",
        weight_scale: str = "absmax",
        x_scale: Tensor | None = None,
    ) -> QuantGroupedLinear:
        """Quantize the matrices of a `GroupedLinear`, one expert at a time; the bias parameter is shared with it.

        So is, for mode "qat", the weight, if the layer holds it as [E, N, K].

        Args:
            x_scale: float32 [1], the scale of the activations, for `a8s` schemes only.

        Raises:
            ValueError: if the weight holds NaN or Inf, the scheme does not fit, or `x_scale` does not fit the scheme.
        """
        if (problem := x_scale_problem(x_scale, QuantScheme.parse(scheme))) is not None:
            raise ValueError(f"x_scale {problem}")
        matrices = layer.matrices().detach()
        experts, out_features, in_features = matrices.shape
        options = {"mode": mode, "grad_dtype": grad_dtype, "weight_scale": weight_scale}
        quantized = cls(
            experts, in_features, out_features, False, scheme, **options, device="meta", dtype=matrices.dtype
        )
        as_held = layer.weight.shape == matrices.shape and not layer.transposed
        return quantized._begin_as(
            layer,
            lambda: layer.weight if as_held else nn.Parameter(matrices.contiguous()),
            lambda: stack_experts([quantize_weight(matrix, quantized.scheme) for matrix in matrices]),
            layer.bias,
            x_scale,
        )

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
        check_input(x, self.in_features)
        options: Any = {"out_dtype": autocast_dtype(x.device.type), "grad_dtype": self.grad_dtype}
        options["x_scale"] = self._activation_scale()
        if self.mode == "frozen":
            out = grouped_linear(x, rows, offsets, self._frozen_weight(), self.bias, self.scheme, **options)
        else:
            weight, scales = self._trained_weight(), self._parameters.get("scales")
            if self.mode == "int8":
                weight = self._masked(weight)
            out = trained_grouped_linear(x, rows, offsets, weight, self.bias, self.scheme, scales=scales, **options)
        return add_low_rank(out, x, offsets, rows, self.low_rank)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._options_repr()}"
        )

    def _load_int8(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        names = (prefix + "qweight", prefix + "scales")
        rows = {name: state_dict[name].flatten(0, 1) for name in names if name in state_dict}
        super()._load_int8({**state_dict, **rows}, prefix, *args)


def stack_experts(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """The weights [N, K] of E experts as one [E, N, K]."""
    qweights, scales, zeros = zip(*weights, strict=True)
    return QuantizedWeight(torch.stack(qweights), torch.stack(scales), None if zeros[0] is None else torch.stack(zeros))


class GroupedAdapter(LayerAdapter[GroupedLinear]):
    """The adapter of `GroupedLinear`."""

    measured, static_activations = False, True

    def weight(self, layer: GroupedLinear) -> Tensor:
        return layer.matrices().detach()

    def quantize(self, layer: GroupedLinear, scheme: str | QuantScheme, **layer_options: Any) -> Storage:
        return QuantGroupedLinear.from_float(layer, scheme, **layer_options)

    def empty(
        self,
        layer: GroupedLinear,
        scheme: str | QuantScheme,
        *,
        dtype: torch.dtype | None = None,
        **layer_options: str,
    ) -> Storage:
        experts, out_features, in_features = layer.matrices().shape
        bias, dtype = layer.bias is not None, dtype or self.dtype(layer)
        return QuantGroupedLinear(
            experts, in_features, out_features, bias, scheme, device="meta", dtype=dtype, **layer_options
        )

    def to_float(self, quantized: Storage, weight: nn.Parameter, float_type: type[nn.Module]) -> GroupedLinear:
        """A layer that holds its weight as the one did that was quantized."""
        assert isinstance(quantized, QuantGroupedLinear)
        transposed, flat = (getattr(quantized, name, False) for name in ("transposed", "flat"))
        if transposed or flat:
            values = weight.detach().mT.contiguous() if transposed else weight.detach()
            weight = nn.Parameter(values.flatten(0, 1) if flat else values, requires_grad=weight.requires_grad)
        layer = GroupedLinear(weight, quantized.bias, quantized.num_experts, transposed=transposed)
        return layer.train(quantized.training)


register_adapter(GroupedLinear, GroupedAdapter())
register_adapter(QuantGroupedLinear, QuantizedAdapter(lookup=False, measured=False))
