"""`QuantConv2d` and `QuantConv1d`: drop-in convolutions on the canonical storage."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autograd.conv import quant_conv, to_kernels, to_rows, trained_conv
from ..autograd.frozen_weight import FrozenKernel
from ..autograd.layer_calls import autocast_dtype, traced
from ..autograd.weight_products import follow
from ..formats.scheme import QuantScheme
from ..formats.validate import x_scale_problem
from ..kernels.arguments import ConvGeometry
from ..kernels.quantizers import quantize_weight
from .adapters import LayerAdapter, adapter_of, register_adapter
from .layer_adapters import QuantizedAdapter
from .matrix_layer import MatrixLayer
from .storage import Storage

# The arguments of a convolution's constructor that are its attributes, and what else it has beside weight and bias.
_ARGUMENTS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip
_SHAPE = (*_ARGUMENTS, "transposed", "output_padding", "_reversed_padding_repeated_twice")


class _QuantConv(MatrixLayer):
    """What both classes below share. A convolution of one dimension is one of two whose images have one row.

    Attributes:
        dimensions: 1 or 2.
    """

    dimensions: ClassVar[int]
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        scheme: str | QuantScheme = "w8a8",
        *,
        mode: str = "frozen",
        grad_dtype: str = "float",
        weight_scale: str = "absmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        float_type: Any = type(self).float_type
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode)
        self._shape_as(float_type(*shape, device="meta"))
        options = {"mode": mode, "grad_dtype": grad_dtype, "weight_scale": weight_scale}
        self._set_up(scheme, bias, **options, device=device, dtype=dtype)

    def _shape_as(self, conv: nn.Module) -> None:
        for name in _SHAPE:
            setattr(self, name, getattr(conv, name))

    def _set_up(self, scheme: str | QuantScheme, bias: bool, **options: Any) -> None:
        if QuantScheme.parse(scheme).act_group_size is not None:
            raise ValueError(
                f"scheme must have no activation groups for a convolution, got {QuantScheme.parse(scheme)}"
            )
        super()._set_up(scheme, bias, **options)

    @property
    def in_features(self) -> int:  # type: ignore[override]  # an attribute of a linear layer
        """K: the values of a patch that an output channel multiplies."""
        return math.prod(self.kernel_size) * (self.in_channels // self.groups)

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """O, by the name it has in a linear layer."""
        return self.out_channels

    @property
    def geometry(self) -> ConvGeometry:
        """How the kernel moves over images; zeros around them are left to `F.pad` if the padding is not of zeros."""
        one_row = (1,) * (2 - self.dimensions)
        numbers = [size for pair in (self.kernel_size, self.stride, self.dilation) for size in (*one_row, *pair)]
        numbers += [*self._reversed_padding_repeated_twice, 0, 0][:4] if self.padding_mode == "zeros" else [0] * 4
        numbers.append(self.groups)
        return ConvGeometry(*numbers)

    def _frozen_view(self) -> Tensor:
        """The read-only kernels [O, C / groups, ...], as floats, of a frozen layer."""
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return FrozenKernel(self.quantized_weight(), self._scheme_name, self.in_features, self.compute_dtype, shape)

    def _trained_view(self) -> Tensor:
        """The parameter [O, C / groups, ...]; in mode "int8" the matrix [O, K]."""
        weight = self._trained_weight()
        return weight if self.mode == "int8" else follow(weight, self)

    def _rows(self, weight: Tensor) -> Tensor:
        return to_rows(weight)

    def _from_rows(self, rows: Tensor) -> Tensor:
        kernels = to_kernels(rows, self.geometry)
        return (kernels.squeeze(2) if self.dimensions == 1 else kernels).contiguous()

    def _reset_weight(self) -> None:
        conv: Any = type(self).float_type
        conv.reset_parameters(self)

    def _allocate_column_scales(self, device: torch.device | str | None) -> None:
        """There are none: a gradient finds those of each group of channels."""
        if self.mode == "frozen":
            self.register_buffer("column_scales", None)

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        scheme: str | QuantScheme,
        *,
        mode: str = "frozen",
        grad_dtype: str = "float",
        weight_scale: str = "absmax",
        x_scale: Tensor | None = None,
    ) -> _QuantConv:
        """Quantize a float convolution; the bias parameter is shared with `layer`, and in mode "qat" the weight.

        Args:
            x_scale: float32 [1], the scale of the activations, for `a8s` schemes only.

        Raises:
            TypeError: for another kind of module.
            ValueError: if the weight holds NaN or Inf, the scheme does not fit, or `x_scale` does not fit the scheme.
        """
        if not isinstance(layer, cls.float_type) or isinstance(layer, Storage):
            raise TypeError(f"layer must be an nn.{cls.float_type.__name__}, got {type(layer).__name__}")
        if (problem := x_scale_problem(x_scale, QuantScheme.parse(scheme))) is not None:
            raise ValueError(f"x_scale {problem}")
        adapter: Any = adapter_of(layer)
        quantized: Any = adapter.empty(layer, scheme, mode=mode, grad_dtype=grad_dtype, weight_scale=weight_scale)
        own: Any = layer
        return quantized._begin_as(
            layer,
            lambda: own.weight,
            lambda: quantize_weight(adapter.weight(layer), quantized.scheme),
            adapter.bias(layer),
            x_scale,
        )

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return traced(self, input)
        dimensions = self.dimensions
        if input.dim() not in (dimensions + 1, dimensions + 2) or input.shape[-dimensions - 1] != self.in_channels:
            sizes = ", L" if dimensions == 1 else ", H, W"
            raise RuntimeError(f"input must have shape [N, {self.in_channels}{sizes}], got {list(input.shape)}")
        x = input if input.dim() == dimensions + 2 else input.unsqueeze(0)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        x = x.unsqueeze(2) if dimensions == 1 else x
        images = x.permute(0, 2, 3, 1)
        out = self._convolve(images).permute(0, 3, 1, 2)
        if dimensions == 1 or not _channels_last(x):
            out = out.contiguous()
        out = out.squeeze(2) if dimensions == 1 else out
        return out if input.dim() == dimensions + 2 else out.squeeze(0)

    def _convolve(self, images: Tensor) -> Tensor:
        dtype = autocast_dtype(images.device.type)
        if self.mode == "frozen":
            weight = self._frozen_weight()
            x_scale = self._activation_scale()
            return quant_conv(images, weight, self.bias, self.scheme, self.geometry, dtype, self.grad_dtype, x_scale)
        rows, scales = self._trained_weight(), self._parameters.get("scales")
        rows = self._masked(rows) if self.mode == "int8" else self._rows(rows)
        options: dict[str, Any] = {"grad_dtype": self.grad_dtype, "scales": scales, "x_scale": self._activation_scale()}
        return trained_conv(images, rows, self.bias, self.scheme, self.geometry, dtype, **options)

    def extra_repr(self) -> str:
        conv: Any = type(self).float_type
        return f"{conv.extra_repr(self)}, {self._options_repr()}"


class QuantConv2d(_QuantConv, nn.Conv2d):
    """A two-dimensional convolution on an int8 or int4 weight.

    Modes, gradients and what is saved are those of `QuantLinear`: the weight is the matrix [O, K] of the kernels, K =
    kernel_height * kernel_width * C / groups, in that order, so groups of the scheme run along the taps and channels.
    Under `a8` schemes each image has one scale of its activations, because a patch crosses pixels, and padding is
    exactly 0. In mode "qat" `weight` is that of an `nn.Conv2d`, [O, C / groups, kernel_height, kernel_width]; in mode
    "int8" it is the matrix.

    Shape: input float32, bfloat16 or float16 [N, C, H, W] or [C, H, W]; output [N, O, H_out, W_out] of the input's
    dtype, or of the autocast dtype under autocast, in the memory format of the input.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            `nn.Conv2d`.
        scheme: scheme name or `QuantScheme`, without activation groups.
        mode, grad_dtype, weight_scale, device, dtype: as in `QuantLinear`.

    Raises:
        ValueError: as `nn.Conv2d` and `QuantLinear` do, and for a scheme with activation groups.

    Example:
        >>> layer = qk.QuantConv2d.from_float(nn.Conv2d(16, 32, 3, padding=1), "w8a8")
        >>> layer(torch.randn(2, 16, 10, 10)).shape
        torch.Size([2, 32, 10, 10])
    """

    float_type: type[nn.Module] = nn.Conv2d
    dimensions = 2


class QuantConv1d(_QuantConv, nn.Conv1d):
    """A one-dimensional convolution on an int8 or int4 weight; see `QuantConv2d`.

    Shape: input float32, bfloat16 or float16 [N, C, L] or [C, L]; output [N, O, L_out], contiguous.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            `nn.Conv1d`.
        scheme, mode, grad_dtype, weight_scale, device, dtype: as in `QuantConv2d`.

    Raises:
        ValueError: as `QuantConv2d` does.

    Example:
        >>> layer = qk.QuantConv1d(80, 64, 3, padding="same", scheme="w4a8-g32")
        >>> layer(torch.randn(2, 80, 100)).shape
        torch.Size([2, 64, 100])
    """

    float_type: type[nn.Module] = nn.Conv1d
    dimensions = 1


def _channels_last(x: Tensor) -> bool:
    """True if torch would give the result of a convolution of x with channels last in memory."""
    return x.stride(1) == 1 and not x.is_contiguous()


class ConvAdapter(LayerAdapter[nn.Module]):
    """The adapter of `nn.Conv2d` and `nn.Conv1d`."""

    measured, static_activations = False, True

    def __init__(self, quantized_type: type[_QuantConv]) -> None:
        self.quantized_type = quantized_type

    def weight(self, layer: nn.Module) -> Tensor:
        """The matrix [O, K] of the kernels: a copy, unless they lie with channels last."""
        return to_rows(super().weight(layer))

    def shape(self, layer: Any) -> tuple[int, ...]:
        return layer.out_channels, math.prod(layer.kernel_size) * (layer.in_channels // layer.groups)

    def reason(self, layer: Any, scheme: QuantScheme) -> str | None:
        if (why := super().reason(layer, scheme)) is not None:
            return why
        if layer.in_channels == layer.groups > 1:
            return "depthwise convolution: each output channel multiplies one input channel, so no product pays"
        if scheme.act_group_size is not None:
            return f"convolution: {scheme} has activation groups, which a patch of pixels has not"
        return None

    def quantize(self, layer: nn.Module, scheme: str | QuantScheme, **layer_options: Any) -> Storage:
        return self.quantized_type.from_float(layer, scheme, **layer_options)

    def empty(
        self,
        layer: Any,
        scheme: str | QuantScheme,
        *,
        dtype: torch.dtype | None = None,
        **layer_options: Any,
    ) -> Storage:
        options: dict[str, Any] = {name: getattr(layer, name) for name in _ARGUMENTS} | layer_options
        return self.quantized_type(
            **options,
            bias=self.bias(layer) is not None,
            scheme=scheme,
            device="meta",
            dtype=dtype or self.dtype(layer),
        )

    def to_float(self, quantized: Storage, weight: nn.Parameter, float_type: type[nn.Module]) -> nn.Module:
        assert isinstance(quantized, _QuantConv)
        layer: Any = float_type.__new__(float_type)
        nn.Module.__init__(layer)
        for name in _SHAPE:
            setattr(layer, name, getattr(quantized, name))
        kernels = quantized._from_rows(weight.detach())
        layer.register_parameter("weight", nn.Parameter(kernels, requires_grad=weight.requires_grad))
        layer.register_parameter("bias", quantized.bias)
        return layer.train(quantized.training)


register_adapter(nn.Conv2d, ConvAdapter(QuantConv2d))
register_adapter(nn.Conv1d, ConvAdapter(QuantConv1d))
for _type in (QuantConv2d, QuantConv1d):
    register_adapter(_type, QuantizedAdapter(lookup=False, measured=False))
