"""`quant_conv` and `trained_conv`: convolutions with a quantized weight, with straight-through gradients.

Images are [N, H, W, C] here, as the operator takes them, and a weight is the matrix [O, K] of its kernels: the taps row
by row, and of each tap the C / groups channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from ..formats.philox import GRAD_WEIGHT, draw_seed
from ..formats.scheme import QuantScheme
from ..formats.storage import QuantizedWeight
from ..kernels import ops
from ..kernels.arguments import ConvGeometry
from .functions import (
    anchors,
    bias_gradient,
    differentiable,
    needs_gradient,
    once_differentiable,
    save,
    total_tangent,
)
from .int8_gradients import LinearWeight, int_product, quantized_rows
from .int8_weight import Int8Weight
from .trained import quantized_weight, x_scale_gradient


class Kernel(NamedTuple):
    """What a gradient needs to know of a quantized weight and of the convolution.

    Attributes:
        stored: the weight [O, K].
        scheme: its scheme.
        geometry: how the kernel moves.
        image: shape of x, [N, H, W, C].
    """

    stored: QuantizedWeight
    scheme: QuantScheme
    geometry: ConvGeometry
    image: tuple[int, ...]

    @property
    def in_features(self) -> int:
        """K."""
        return self.geometry.in_features(self.image[3])

    def dequantize(self) -> Tensor:
        """float32 [O, K]."""
        return ops.dequantize_weight(*self.stored, self.in_features, self.scheme.name)


class _FrozenConv(torch.autograd.Function):
    """`ops.conv` with gradients to x and bias; the quantized weight is a constant.

    As in `_FrozenLinear`, rounding the activations counts as the identity (straight-through estimator, Bengio et al.
    2013, arXiv:1308.3432), and no activation is saved.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        scheme: QuantScheme,
        geometry: ConvGeometry,
        out_dtype: torch.dtype | None,
        seed: Tensor | None,
        x_scale: Tensor | None,
    ) -> Tensor:
        return ops.conv(x, qweight, scales, zeros, bias, scheme.name, geometry, out_dtype, x_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, *stored, bias, ctx.scheme, ctx.geometry, _, seed, _ = inputs
        save(ctx, *stored, seed)
        ctx.image, ctx.x_dtype, ctx.out_dtype, ctx.shape = tuple(x.shape), x.dtype, output.dtype, output.shape
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            *stored, seed = ctx.saved_tensors
            kernel = Kernel(QuantizedWeight(*stored), ctx.scheme, ConvGeometry(*ctx.geometry), ctx.image)
            grad_x = _input_gradient(grad_out, kernel, seed, ctx.x_dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = bias_gradient(grad_out.flatten(0, 2), ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, *(None,) * 5

    @staticmethod
    def tangent(
        ctx: Any, x: Tensor | None, qweight: None, scales: None, zeros: None, bias: Tensor | None, *_: None
    ) -> Tensor | None:
        product = _tangent_product(x, ctx.saved_tensors[:3], ctx.scheme, ctx.geometry, ctx.out_dtype)
        return total_tangent(ctx.shape, ctx.out_dtype, product, bias)


class _TrainedConv(torch.autograd.Function):
    """`ops.conv` with gradients to x, bias and weight, which is quantized here, or is an `Int8Weight`.

    The rules are those of `_TrainedLinear`. Saved are x as int8 with a scale for each image (`a16` schemes: x itself),
    and the quantized weight.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        scheme: QuantScheme,
        geometry: ConvGeometry,
        out_dtype: torch.dtype | None,
        seed: Tensor | None,
        needs_weight: bool,
        x_scale: Tensor | None,
        needs_x_scale: bool,
        *graphs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        quantized = quantized_weight(weight, scales, scheme)
        out = ops.conv(x, *quantized, bias, scheme.name, geometry, out_dtype, x_scale)
        kept = (quantized.qweight, quantized.scales if scales is None else None, quantized.zeros)  # or an input
        if not (needs_weight and scheme.int_activations):
            return out, None, None, *kept
        qx, x_scales = ops.quantize_activation(_by_image(x), scheme.name, x_scale)
        return out, qx.view(x.shape), x_scales.flatten(), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, scales, bias, ctx.scheme, ctx.geometry, _, seed, *rest = inputs
        needs_weight, x_scale, needs_x_scale, *graphs = rest
        out, saved_x, x_scales, *kept = output
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        if needs_weight and saved_x is None:
            saved_x = x
        if scales is not None:
            kept[1] = scales
        clips = ctx.scheme.weight_bits == 4 or scales is not None
        master, learned = (weight, scales) if needs_weight and clips else (None, None)
        clamped = (x, x_scale) if needs_x_scale else (None, None)
        save(ctx, *kept, saved_x, x_scales, master, learned, seed, *clamped, *graphs)
        ctx.image, ctx.x_dtype, ctx.weight_dtype = tuple(x.shape), x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.out_dtype, ctx.shape = out.dtype, out.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        *stored, saved_x, x_scales, master, learned, seed, x, x_scale, _, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_scales, needs_bias = ctx.needs_input_grad[:4]
        kernel = Kernel(QuantizedWeight(*stored), ctx.scheme, ConvGeometry(*ctx.geometry), ctx.image)
        grad_x = grad_weight = grad_scales = grad_bias = grad_x_scale = None
        if needs_x or x_scale is not None:
            grad_x = _input_gradient(grad_out, kernel, seed, ctx.x_dtype)
        if x_scale is not None:
            assert grad_x is not None
            rows, grad_x_scale = x_scale_gradient(_by_image(grad_x), _by_image(x), x_scale)
            grad_x = rows.view(ctx.image)
        if needs_weight or needs_scales:
            if seed is not None and x_scales is not None:
                grad_weight = _int8_weight_gradient(grad_out, saved_x, x_scales, kernel, seed)
            else:
                inputs = saved_x if x_scales is None else saved_x * x_scales[:, None, None, None]
                grad_weight = _weight_gradient(grad_out, inputs, kernel)
            grad_weight = grad_weight.to(ctx.weight_dtype)
            if learned is not None:
                grad_weight, grad_scales = ops.scale_gradient(grad_weight, master, learned, ctx.scheme.name)
            elif master is not None:
                grad_weight = ops.mask_clipped(grad_weight, master, ctx.scheme.name)
        if needs_bias:
            grad_bias = bias_gradient(grad_out.flatten(0, 2), ctx.bias_dtype)
        return grad_x, grad_weight, grad_scales, grad_bias, *(None,) * 5, grad_x_scale, None, None, None

    @staticmethod
    def tangent(
        ctx: Any, x: Tensor | None, weight: Tensor | None, scales: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        *stored, saved_x, x_scales, master, learned = ctx.saved_tensors[:7]
        if scales is not None or rest[5] is not None:
            raise NotImplementedError("forward-mode derivatives with respect to learned scales are not implemented")
        parts = [_tangent_product(x, stored, ctx.scheme, ctx.geometry, ctx.out_dtype), bias]
        if weight is not None:
            if learned is not None:
                weight = ops.scale_gradient(weight, master, learned, ctx.scheme.name)[0]
            elif master is not None:
                weight = ops.mask_clipped(weight, master, ctx.scheme.name)
            inputs = saved_x if x_scales is None else saved_x * x_scales[:, None, None, None]
            parts.append(_float_conv(inputs.to(torch.float32), weight.to(torch.float32), ConvGeometry(*ctx.geometry)))
        return total_tangent(ctx.shape, ctx.out_dtype, *parts), None, None, None, None, None


_frozen_conv = differentiable(_FrozenConv)
_trained_conv = differentiable(_TrainedConv)


def quant_conv(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    scheme: QuantScheme,
    geometry: ConvGeometry,
    out_dtype: torch.dtype | None = None,
    grad_dtype: str = "float",
    x_scale: Tensor | None = None,
) -> Tensor:
    """`ops.conv` with straight-through gradients to x and bias.

    Args:
        x: float [N, H, W, C].
        weight: the canonical storage of a weight [O, K].
        bias, geometry, out_dtype, x_scale: as in `ops.conv`.
        grad_dtype: "int8" rounds the gradient of the output stochastically to int8 for the product with the weight.

    Returns:
        [N, H_out, W_out, O] of `out_dtype` or x.dtype.
    """
    needs_x, needs_bias = needs_gradient(x, bias)
    if not (needs_x or needs_bias):
        return ops.conv(x, *weight, bias, scheme.name, geometry, out_dtype, x_scale)
    seed = draw_seed() if grad_dtype == "int8" and needs_x else None
    return _frozen_conv(x, *weight, bias, scheme, geometry, out_dtype, seed, x_scale)


def trained_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: QuantScheme,
    geometry: ConvGeometry,
    out_dtype: torch.dtype | None = None,
    *,
    grad_dtype: str = "float",
    scales: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """`quant_conv` with a weight that is trained: it is quantized in each call, and gets a gradient.

    Args:
        x, bias, geometry, out_dtype, x_scale: as in `quant_conv`; a parameter `x_scale` is trained.
        weight: float [O, K], or an `Int8Weight`, which is multiplied as it is.
        scheme: the format and the activations.
        grad_dtype: "int8" rounds the gradient of the output stochastically to int8 for both products, except for the
            gradient of the weight under `a16`, whose x is a float.
        scales: float32 [O, groups] that a float weight is rounded to, and that are trained; None: those of its range.

    Returns:
        [N, H_out, W_out, O] of `out_dtype` or x.dtype.
    """
    needs_x, needs_weight, needs_scales, needs_bias = needs_gradient(x, weight, scales, bias)
    needs_x_scale = x_scale is not None and x_scale.requires_grad and needs_gradient(x_scale)[0]
    if torch.jit.is_tracing() and isinstance(weight, Int8Weight):  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace cannot hold a layer of mode 'int8'; qkernels.freeze_(model) makes it frozen, with the "
            "same outputs, and that can be traced"
        )
    if not (needs_x or needs_weight or needs_scales or needs_bias or needs_x_scale):
        quantized = quantized_weight(weight, scales, scheme)
        return ops.conv(x, *quantized, bias, scheme.name, geometry, out_dtype, x_scale)
    needs_weight = needs_weight or needs_scales
    seed = draw_seed() if grad_dtype == "int8" and (needs_x or needs_weight or needs_x_scale) else None
    graphs = anchors(x if needs_x else None, weight if needs_weight else None)
    needs = (needs_weight, x_scale, needs_x_scale)
    return _trained_conv(x, weight, scales, bias, scheme, geometry, out_dtype, seed, *needs, *graphs)


def _by_image(x: Tensor) -> Tensor:
    """Images [N, H, W, C] as a matrix with a row for each."""
    return x.reshape(len(x), -1)


def to_kernels(rows: Tensor, geometry: ConvGeometry) -> Tensor:
    """A matrix [O, K] as torch's weight [O, C / groups, kernel_height, kernel_width], a view."""
    return rows.unflatten(1, (*geometry[:2], -1)).permute(0, 3, 1, 2)


def to_rows(kernels: Tensor) -> Tensor:
    """Torch's weight [O, C / groups, ...] as a matrix [O, K], a view where that can be."""
    return kernels.movedim(1, -1).flatten(1)


def _float_conv(x: Tensor, rows: Tensor, geometry: ConvGeometry) -> Tensor:
    """The convolution of float images with a float matrix [O, K], by torch."""
    padded = F.pad(x.permute(0, 3, 1, 2), geometry[6:10])
    out = F.conv2d(padded, to_kernels(rows, geometry), None, geometry[2:4], 0, geometry[4:6], geometry.groups)
    return out.permute(0, 2, 3, 1)


def _padded_image(kernel: Kernel) -> tuple[int, int, int, int]:
    """Shape of x with its zeros, channels first."""
    images, height, width, channels = kernel.image
    left, right, top, bottom = kernel.geometry[6:10]
    return images, channels, top + height + bottom, left + width + right


def _cropped(padded: Tensor, kernel: Kernel) -> Tensor:
    """Padded images, channels first, without what lies over the zeros: [N, H, W, C]."""
    _, height, width, _ = kernel.image
    left, _, top, _ = kernel.geometry[6:10]
    return padded[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1)


def _computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch convolves gradients of `dtype`; not all CPUs can do that in float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _input_gradient(grad_out: Tensor, kernel: Kernel, seed: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Gradient with respect to x, [N, H, W, C]: of floats, by torch, or with a seed of integers."""
    geometry = kernel.geometry
    if seed is not None:
        return _int8_input_gradient(grad_out, kernel, seed).to(out_dtype)
    dtype = _computing_dtype(grad_out.dtype)
    weight, grads = to_kernels(kernel.dequantize().to(dtype), geometry), grad_out.to(dtype).permute(0, 3, 1, 2)
    shape = _padded_image(kernel)
    padded = nn_grad.conv2d_input(shape, weight, grads, geometry[2:4], 0, geometry[4:6], geometry.groups)
    return _cropped(padded, kernel).to(out_dtype)


def _weight_gradient(grad_out: Tensor, x: Tensor, kernel: Kernel) -> Tensor:
    """Gradient with respect to the weight, [O, K], of floats, by torch; `x` [N, H, W, C] is what was multiplied."""
    geometry, dtype = kernel.geometry, _computing_dtype(grad_out.dtype)
    padded = F.pad(x.to(dtype).permute(0, 3, 1, 2), geometry[6:10])
    shape = (grad_out.shape[3], kernel.image[3] // geometry.groups, *geometry[:2])
    grads = grad_out.to(dtype).permute(0, 3, 1, 2)
    kernels = nn_grad.conv2d_weight(padded, shape, grads, geometry[2:4], 0, geometry[4:6], geometry.groups)
    return to_rows(kernels)


def _int8_input_gradient(grad_out: Tensor, kernel: Kernel, seed: Tensor) -> Tensor:
    """float32 [N, H, W, C]: rules 6 and 8 on the rows of pixels; products of a pixel's patch are added in float32."""
    geometry, (images, pixels) = kernel.geometry, (len(grad_out), grad_out.shape[1] * grad_out.shape[2])
    outputs, shape = grad_out.shape[3] // geometry.groups, _padded_image(kernel)
    rows = grad_out.reshape(images * pixels, -1)
    padded = rows.new_empty(shape, dtype=torch.float32)
    channels = padded.split(shape[1] // geometry.groups, dim=1)
    for group in range(geometry.groups):
        own = slice(group * outputs, (group + 1) * outputs)
        stored = kernel.stored.map(lambda tensor, own=own: tensor[own])  # type: ignore[misc]
        grouped = not kernel.scheme.row_scaled
        columns = ops.column_scales(*stored, kernel.in_features, kernel.scheme.name) if grouped else None
        weight = LinearWeight(stored, kernel.in_features, kernel.scheme.name, columns)
        q_grad, grad_scales = quantized_rows(rows[:, own], weight, seed)
        for image in range(images):  # the patches of one are as many floats as K values of each of its pixels
            pixel = slice(image * pixels, (image + 1) * pixels)
            patches = int_product(q_grad[pixel], grad_scales[pixel], weight, torch.float32)
            patches = patches.view(pixels, geometry[0] * geometry[1], -1).permute(2, 1, 0).flatten(0, 1)
            channels[group][image] = F.fold(patches, shape[2:], geometry[:2], geometry[4:6], 0, geometry[2:4])
    return _cropped(padded, kernel)


def _int8_weight_gradient(grad_out: Tensor, qx: Tensor, x_scales: Tensor, kernel: Kernel, seed: Tensor) -> Tensor:
    """float32 [O, K]: rule 8 on the columns of the gradient, with the scales of the images folded in, and the sums of
    rule 10 over each image, which are added in float32, images ascending.
    """
    geometry, pixels = kernel.geometry, grad_out.shape[1] * grad_out.shape[2]
    rows, channels = grad_out.reshape(len(qx) * pixels, -1), kernel.image[3] // geometry.groups
    q_grad, grad_scales = ops.quantize_columns_stochastic(rows, x_scales.repeat_interleave(pixels), seed, GRAD_WEIGHT)
    total, outputs = rows.new_zeros((rows.shape[1], kernel.in_features), dtype=torch.float32), len(q_grad)
    outputs //= geometry.groups
    ones, pixel_scales = grad_scales.new_ones(outputs), grad_scales.new_ones(pixels, 1)
    padded = F.pad(qx, (0, 0, *geometry[6:10]))
    for image, pixel in zip(padded, range(0, len(rows), pixels), strict=True):
        for group in range(geometry.groups):
            own = slice(group * outputs, (group + 1) * outputs)
            patches = _patches(image[..., group * channels : (group + 1) * channels], kernel, grad_out.shape[1:3])
            multiplied = LinearWeight(QuantizedWeight(patches, pixel_scales, None), kernel.in_features, "w8a8")
            total[own] += int_product(q_grad[own, pixel : pixel + pixels], ones, multiplied, torch.float32)
    return total * grad_scales[:, None]


def _patches(image: Tensor, kernel: Kernel, size: torch.Size) -> Tensor:
    """The patches [pixels, K] of a padded image [H, W, C], a copy."""
    geometry, (row, column, channel) = kernel.geometry, image.stride()
    strides = (geometry.stride_height * row, geometry.stride_width * column)
    taps = (geometry.dilation_height * row, geometry.dilation_width * column)
    shape = (*size, *geometry[:2], image.shape[2])
    return image.as_strided(shape, (*strides, *taps, channel), image.storage_offset()).reshape(
        size[0] * size[1], kernel.in_features
    )


def _tangent_product(
    tangent: Tensor | None, stored: Any, scheme: QuantScheme, geometry: ConvGeometry, out_dtype: torch.dtype
) -> Tensor | None:
    """How the output changes with x, straight through the rounding of that."""
    if tangent is None:
        return None
    return ops.conv(tangent, *QuantizedWeight(*stored), None, scheme.of_floats, geometry, out_dtype)
