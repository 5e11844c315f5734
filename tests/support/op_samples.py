"""Sample arguments for every op: shapes, dtypes, layouts and values drawn with a seed for each scheme.

Shapes, dtypes and layouts are paired at random rather than multiplied out; over the schemes every pair occurs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import reference_ops
import torch
from helpers import one_thread
from torch import Tensor

from qkernels import QuantScheme
from qkernels.formats.storage import FLOAT_DTYPES, expand_groups, weight_integers
from qkernels.kernels import arguments, ops, reference
from qkernels.kernels.arguments import ConvGeometry

SCHEMES = QuantScheme.names()
INT_SCHEMES = [name for name in SCHEMES if QuantScheme.parse(name).int_activations]
FLOAT_SCHEMES = [name for name in SCHEMES if not QuantScheme.parse(name).int_activations]

# 0, 1, odd, one less and one more than the edges of tiles, row groups and K steps of the kernels, and large.
ROWS = (0, 1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 25, 33, 64, 65, 70, 130)
OUT_FEATURES = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 65, 100, 129)
IN_FEATURES = (1, 2, 3, 4, 5, 7, 15, 17, 31, 32, 33, 63, 64, 65, 80, 95, 127, 128, 129, 191, 193, 255, 257, 300)
LARGE = ((129, 259, 1030), (1, 1001, 2051), (40, 515, 771), (300, 70, 600))

LAYOUTS = ("contiguous", "contiguous", "transposed", "columns", "window", "offset")


class Sample(NamedTuple):
    """The arguments of one call, and what they are, for the message of a failing test."""

    args: tuple
    label: str


def x_scale_of(scheme: str) -> Tensor | None:
    """A scale of static activations that clamps a few of normal ones; None: the scheme has none."""
    return torch.tensor([0.02]) if QuantScheme.parse(scheme).static_activations else None


def relayout(matrix: Tensor, layout: str) -> Tensor:
    """The same values with other strides or another alignment."""
    if layout == "transposed":
        return matrix.t().contiguous().t()
    rows, columns = matrix.shape
    if layout == "columns":  # every second column
        out = matrix.new_zeros(rows, 2 * columns)[:, ::2]
    elif layout == "window":  # of a wider matrix
        out = matrix.new_zeros(rows, columns + 3)[:, 1 : columns + 1]
    elif layout == "offset":  # contiguous, but not aligned to a vector
        out = matrix.new_zeros(rows * columns + 1)[1:].view(rows, columns)
    else:
        return matrix.contiguous()
    return out.copy_(matrix)


class Draw:
    """Random arguments; the same seed gives the same sequence."""

    def __init__(self, seed: str) -> None:
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.choose.getrandbits(32))

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def dtype(self) -> torch.dtype:
        return self.choose.choice(FLOAT_DTYPES)

    def matrix(self, rows: int, columns: int, kind: str) -> tuple[Tensor, str]:
        """A float matrix and the words for it."""
        values = self.floats(rows, columns) * torch.exp2(self.floats(rows, 1) * 2)
        if kind == "extremes":
            values = torch.where(values < 0, -3.0, 3.0)
        elif kind == "ties":
            values = (values * 20).round() + 0.5
            values[:, :1] = 127.0
        elif kind == "special" and columns:
            for row in range(rows):
                value = self.choose.choice((0.0, -0.0, 1e-42, 2.0**-97, 6e4, torch.nan, torch.inf, -torch.inf))
                columns_hit = slice(None) if self.choose.random() < 0.5 else self.choose.randrange(columns)
                if self.choose.random() < 0.7:
                    values[row, columns_hit] = value
        layout, dtype = self.choose.choice(LAYOUTS), self.dtype()
        values = relayout(values.to(dtype), layout)
        if rows and self.choose.random() < 0.05:
            values, layout = values[:1].expand(rows, -1), "expanded"
        return values, f"{list(values.shape)} {dtype} {layout} {kind}"

    def weight(self, out_features: int, in_features: int, scheme: QuantScheme, tiny: bool = False) -> tuple:
        """Any storage a checkpoint may hold: the full range of integers, any sign of scale, any pad nibble."""
        shapes = scheme.storage_shapes(in_features, out_features)
        low, high, dtype = (-128, 128, torch.int8) if scheme.weight_bits == 8 else (0, 256, torch.uint8)
        qweight = torch.randint(low, high, shapes["qweight"], dtype=dtype, generator=self.generator)
        if self.choose.random() < 0.1:
            qweight = torch.full_like(qweight, self.choose.choice((low, high - 1)))
        scales = self.floats(*shapes["scales"]) * (2.0**-120 if tiny else 0.02)
        if self.choose.random() < 0.3:
            scales[:: self.choose.randint(1, 5)] = self.choose.choice((0.0, -0.0))
        zeros = None
        if scheme.has_min:
            zeros = self.floats(*shapes["zeros"]) * (2.0**-118 if tiny else 0.1)
        elif not scheme.symmetric:
            zeros = torch.randint(0, 16, shapes["zeros"], dtype=torch.uint8, generator=self.generator)
        if self.choose.random() < 0.15:
            layout = self.choose.choice(LAYOUTS[2:])
            qweight, scales = relayout(qweight, layout), relayout(scales, layout)
            zeros = None if zeros is None else relayout(zeros, layout)
        return qweight, scales, zeros

    def bias(self, out_features: int) -> Tensor | None:
        if self.choose.random() < 0.3:
            return None
        bias = self.floats(out_features).to(self.dtype())
        return bias.repeat_interleave(2)[::2] if self.choose.random() < 0.2 else bias

    def x_scale(self, scheme: QuantScheme) -> tuple[Tensor, ...]:
        """The scale of static activations, if the scheme has one: most clamp something, few count as 0."""
        if not scheme.static_activations:
            return ()
        return (torch.tensor([self.choose.choice((0.02, 0.005, 1.0, 3.7e-4, -0.1, 2.0**-96, 2.0**-97, 1e30))]),)

    def out_dtype(self) -> torch.dtype | None:
        return self.choose.choice((None, *FLOAT_DTYPES))

    def shapes(self, count: int) -> Iterator[tuple[int, int, int]]:
        """`count` small shapes, each list cycled in a random order, then a large one."""
        lists = [self.choose.sample(values, len(values)) for values in (ROWS, OUT_FEATURES, IN_FEATURES)]
        for i in range(count):
            yield tuple(values[i % len(values)] for values in lists)
        yield self.choose.choice(LARGE)

    def kind(self, scheme: QuantScheme) -> str:
        """Kinds of values; float products are bounded for ordinary ones only."""
        return self.choose.choice(("normal", "extremes", "ties", "special")) if scheme.int_activations else "normal"


def linear(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for rows, out_features, in_features in draw.shapes(count):
        x, words = draw.matrix(rows, in_features, draw.kind(scheme))
        tiny = scheme.int_activations and draw.choose.random() < 0.1
        weight, bias, out_dtype = draw.weight(out_features, in_features, scheme, tiny), draw.bias(out_features), None
        if x.dtype != torch.float16:  # float16 in, float16 out: anything else may overflow the output
            out_dtype = draw.out_dtype()
        label = f"x {words}, N {out_features}, bias {None if bias is None else bias.dtype}, out {out_dtype}"
        args = (x, *weight, bias, scheme.name, out_dtype, *draw.x_scale(scheme))
        yield Sample(args, label + (", tiny scales" if tiny else ""))


def expert_offsets(draw: Draw, experts: int, rows: int) -> Tensor:
    """int64 [experts]: rows dealt to all, to one, or to few of the experts, and perhaps some to none."""
    kind = draw.choose.choice(("all", "all", "one", "few"))
    taking = draw.choose.sample(range(experts), {"all": experts, "one": 1, "few": max(experts // 3, 1)}[kind])
    used = draw.choose.choice((rows, rows, rows // 2))
    counts = [0] * experts
    for _ in range(used):
        counts[draw.choose.choice(taking)] += 1
    return torch.tensor(counts).cumsum(0)


def expert_weights(draw: Draw, experts: int, out_features: int, in_features: int, scheme: QuantScheme) -> tuple:
    each = [draw.weight(out_features, in_features, scheme) for _ in range(experts)]
    return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True))


def grouped_linear(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for rows, out_features, in_features in draw.shapes(count):
        experts = draw.choose.choice((1, 2, 3, 7))
        x, words = draw.matrix(rows, in_features, draw.kind(scheme))
        weight = expert_weights(draw, experts, out_features, in_features, scheme)
        bias = None if draw.choose.random() < 0.4 else draw.floats(experts, out_features).to(draw.dtype())
        out_dtype = draw.out_dtype() if x.dtype != torch.float16 else None
        index = None
        if rows and draw.choose.random() < 0.6:
            index = torch.randint(rows, (draw.choose.choice((rows, 2 * rows, 1)),), generator=draw.generator)
        offsets = expert_offsets(draw, experts, rows if index is None else len(index))
        label = f"x {words}, N {out_features}, offsets {offsets.tolist()}, bias {None if bias is None else bias.dtype}"
        label += f", {'no index' if index is None else f'{len(index)} rows'}, out {out_dtype}"
        yield Sample((x, offsets, *weight, bias, scheme.name, out_dtype, index, *draw.x_scale(scheme)), label)


def grouped_linear_grad_input(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for i, (rows, out_features, in_features) in enumerate(draw.shapes(count)):
        experts = draw.choose.choice((1, 2, 3, 7))
        grad_out, words = draw.matrix(rows, out_features, "normal")
        weight = expert_weights(draw, experts, out_features, in_features, scheme)
        offsets, seed, columns = expert_offsets(draw, experts, rows), None, None
        if i % 2:
            seed = torch.tensor(draw.choose.getrandbits(63))
            if not scheme.row_scaled:
                each = [[None if part is None else part[e] for part in weight] for e in range(experts)]
                columns = torch.stack([reference_ops.column_scales(*w, in_features, scheme.name) for w in each])
        label = f"dy {words}, K {in_features}, offsets {offsets.tolist()}, seed {seed}"
        yield Sample((grad_out, offsets, *weight, in_features, scheme.name, seed, columns), label)


def grouped_rows(draw: Draw, rows: int, sources: int) -> Tensor | None:
    """int64 [rows] below `sources`."""
    if rows == sources and draw.choose.random() < 0.3:
        return None
    return torch.randint(max(sources, 1), (rows,), generator=draw.generator)


def grouped_linear_grad_weight(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for i, (rows, out_features, in_features) in enumerate(draw.shapes(count)):
        experts = draw.choose.choice((1, 2, 3, 7))
        grad_out, words = draw.matrix(rows, out_features, "normal")
        sources = draw.choose.choice((rows, max(rows // 2, 1)))
        qx = torch.randint(-127, 128, (sources, in_features), dtype=torch.int8, generator=draw.generator)
        layout = draw.choose.choice(LAYOUTS)
        seed = torch.tensor(draw.choose.getrandbits(63)) if i % 2 else None
        index = grouped_rows(draw, rows, sources)
        offsets = expert_offsets(draw, experts, rows)
        label = f"dy {words}, qx {list(qx.shape)} {layout}, offsets {offsets.tolist()}, seed {seed}"
        x_scales = draw.floats(sources).abs() * 0.02
        yield Sample((grad_out, offsets, relayout(qx, layout), x_scales, index, seed), label)


def grouped_outer(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for rows, out_features, in_features in draw.shapes(count):
        experts = draw.choose.choice((1, 2, 3, 7))
        grad_out, words = draw.matrix(rows, out_features, "normal")
        sources = draw.choose.choice((rows, max(rows // 2, 1)))
        x, x_words = draw.matrix(sources, in_features, "normal")
        offsets = expert_offsets(draw, experts, rows)
        label = f"dy {words}, x {x_words}, offsets {offsets.tolist()}"
        yield Sample((grad_out, offsets, x, grouped_rows(draw, rows, sources)), label)


def conv_products(args: tuple) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, Tensor]]:
    """A convolution as products, for each group: its output channels, patches, exact weight, bias and `magnitudes`."""
    x, *weight, bias, scheme, geometry = args[:7]
    channels, n = x.shape[3] // geometry.groups, weight[0].shape[0] // geometry.groups
    exact, sizes = (of(*weight, geometry.in_features(x.shape[3]), scheme) for of in (exact_weight, magnitudes))
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2).double(), geometry[6:10])
    patches = torch.nn.functional.unfold(padded, geometry[:2], geometry[4:6], 0, geometry[2:4])
    patches = patches.unflatten(1, (geometry.groups, channels, -1)).permute(1, 0, 4, 3, 2).flatten(3).flatten(1, 2)
    for group in range(geometry.groups):
        rows = slice(group * n, (group + 1) * n)
        own_bias = None if bias is None else bias[rows].to(torch.float64)
        yield rows, patches[group].to(x.dtype), exact[rows], own_bias, sizes[rows]


def conv(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    """The last sample has so many values that its output pixels are computed in blocks."""
    pick = draw.choose.choice
    for i in range(count + 1):
        groups, large = pick((1, 1, 1, 2, 4)), i == count
        channels, out = groups * pick((1, 3, 8, 32, 33)), groups * pick((1, 3, 8, 33))
        images, kernel = 3 if large else pick((0, 1, 1, 2)), (pick((1, 2, 3, 5)), pick((1, 1, 3, 4)))
        strides, dilations = (pick((1, 1, 2)), pick((1, 2, 3))), (pick((1, 1, 2)), pick((1, 1, 3)))
        zeros = [pick((0, 1, 2)) for _ in range(4)]
        size = [
            max(pick((1, 4, 9, 16)), dilation * (taps - 1) + 1) + 40 * large
            for taps, dilation in zip(kernel, dilations, strict=True)
        ]
        geometry = ConvGeometry(*kernel, *strides, *dilations, *zeros, groups)
        values, words = draw.matrix(images, channels * size[0] * size[1], draw.kind(scheme))
        layout, dtype = pick(("first", "last", "strided")), values.dtype
        if layout == "last":
            x = values.reshape(images, *size, channels)
        else:
            x = values.reshape(images, channels, *size).permute(0, 2, 3, 1)
            x = x.repeat_interleave(2, dim=2)[:, :, ::2] if layout == "strided" else x
        in_features = geometry.in_features(channels)
        weight, bias = draw.weight(out, in_features, scheme), draw.bias(out)
        out_dtype = None if dtype == torch.float16 else draw.out_dtype()
        label = f"x {list(x.shape)} {words} channels {layout}, O {out}, {geometry}, out {out_dtype}"
        yield Sample((x, *weight, bias, scheme.name, geometry, out_dtype, *draw.x_scale(scheme)), label)


def linear_grad_input(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for rows, out_features, in_features in draw.shapes(count):
        grad_out, words = draw.matrix(rows, out_features, "normal")
        out_dtype = draw.out_dtype()
        weight = draw.weight(out_features, in_features, scheme)
        yield Sample(
            (grad_out, *weight, in_features, scheme.name, out_dtype), f"dy {words}, K {in_features}, out {out_dtype}"
        )


def quantize_activation(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for rows, _, columns in draw.shapes(count):
        x, words = draw.matrix(rows, columns, draw.kind(scheme))
        x_scale = draw.x_scale(scheme)
        yield Sample((x, scheme.name, *x_scale), f"x {words}, scale {[scale.item() for scale in x_scale]}")


def dequantize_weight(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for _, out_features, in_features in draw.shapes(count):
        weight = draw.weight(out_features, in_features, scheme)
        yield Sample((*weight, in_features, scheme.name), f"N {out_features}, K {in_features}")


def column_scales(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for _, out_features, in_features in draw.shapes(count):
        tiny = draw.choose.random() < 0.2
        weight = draw.weight(out_features, in_features, scheme, tiny)
        label = f"N {out_features}, K {in_features}" + (", tiny scales" if tiny else "")
        yield Sample((*weight, in_features, scheme.name), label)


def int_grad_input(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for rows, out_features, in_features in draw.shapes(count):
        tiny = draw.choose.random() < 0.1
        weight = draw.weight(out_features, in_features, scheme, tiny)
        q_grad = torch.randint(-127, 128, (rows, out_features), dtype=torch.int8, generator=draw.generator)
        grad_scales = draw.floats(rows).abs()
        special = rows > 0 and draw.choose.random() < 0.2
        if special:  # a row that held Inf or NaN
            q_grad[rows // 2], grad_scales[rows // 2] = 0, torch.nan
        layout = draw.choose.choice(LAYOUTS)
        columns = None if scheme.row_scaled else reference_ops.column_scales(*weight, in_features, scheme.name)
        label = f"dy [{rows}, {out_features}] {layout}, K {in_features}" + (", tiny scales" if tiny else "")
        args = (relayout(q_grad, layout), grad_scales, *weight, in_features, scheme.name, columns)
        yield Sample(args, label + (", a row of NaN" if special else ""))


def linear_cross_entropy(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    """The last sample's vocabulary has several chunks."""
    for i, (rows, out_features, in_features) in enumerate(draw.shapes(count)):
        if i == count:
            rows, out_features = 9, 2 * reference.LOSS_CHUNK + 17
        hidden, words = draw.matrix(rows, in_features, draw.kind(scheme))
        weight, bias = draw.weight(out_features, in_features, scheme), draw.bias(out_features)
        target = torch.randint(0, out_features, (rows,), generator=draw.generator)
        target[: rows // 4] = -100
        dither = torch.randint(2**32, (rows,), generator=draw.generator) if draw.choose.random() < 0.8 else None
        label = f"hidden {words}, N {out_features}, bias {bias is not None}, dither {dither is not None}"
        yield Sample((hidden, target, *weight, bias, scheme.name, dither, *draw.x_scale(scheme)), label)


def float_weight(draw: Draw, out_features: int, in_features: int) -> tuple[Tensor, str]:
    """A weight to quantize, with groups of zeros and rows of one sign."""
    weight, words = draw.matrix(out_features, in_features, draw.choose.choice(("normal", "extremes", "ties")))
    weight = weight.clone()
    for row in range(0, out_features, 3):
        kind = draw.choose.choice(("zeros", "positive", "tiny", "start"))
        if kind == "positive":
            weight[row] = weight[row].abs()
        elif kind == "start":
            weight[row, : in_features // 2] = 0
        else:
            weight[row] = 0.0 if kind == "zeros" else -(2.0**-98)
    return weight, words


def quantize_weight(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for _, out_features, in_features in draw.shapes(count):
        weight, words = float_weight(draw, out_features, in_features)
        yield Sample((weight, scheme.name), f"w {words}")


def mask_clipped(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for _, out_features, in_features in draw.shapes(count):
        weight, words = float_weight(draw, out_features, in_features)
        grad, grad_words = draw.matrix(out_features, in_features, "normal")
        yield Sample((grad, weight, scheme.name), f"w {words}, grad {grad_words}")


def given_scales(draw: Draw, out_features: int, in_features: int, scheme: QuantScheme) -> Tensor:
    """Of any sign, from far too small for the weight to far too large; some count as 0."""
    shape = (out_features, scheme.weight_groups(in_features))
    scales = draw.floats(*shape) * torch.exp2(4 * draw.floats(*shape) - 4)
    return torch.where(draw.floats(*shape) > 1.5, draw.choose.choice((0.0, -(2.0**-97), 2.0**-96, 1e30)), scales)


def quantize_weight_scaled(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for _, out_features, in_features in draw.shapes(count):
        weight, words = float_weight(draw, out_features, in_features)
        scales = given_scales(draw, out_features, in_features, scheme)
        yield Sample((weight, scales, scheme.name), f"w {words}")


def scale_gradient(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    for _, out_features, in_features in draw.shapes(count):
        weight, words = float_weight(draw, out_features, in_features)
        grad, grad_words = draw.matrix(out_features, in_features, "normal")
        scales = given_scales(draw, out_features, in_features, scheme)
        yield Sample((grad, weight, scales, scheme.name), f"w {words}, grad {grad_words}")


def quantize_randomly(draw: Draw, count: int, of_rows: bool) -> Iterator[Sample]:
    for rows, _, columns in draw.shapes(count):
        x, words = draw.matrix(rows, columns, draw.choose.choice(("normal", "extremes", "ties", "special")))
        factors = None if draw.choose.random() < 0.3 else draw.floats(columns if of_rows else rows)
        seed = torch.tensor(draw.choose.choice((0, -1, draw.choose.getrandbits(63))))
        rng_stream = draw.choose.choice((0, 1, 2, 2**32 - 1))
        label = f"x {words}, {'no ' if factors is None else ''}factors, seed {seed}, rng_stream {rng_stream}"
        yield Sample((x, factors, seed, rng_stream), label)


def quantize_rows_stochastic(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    return quantize_randomly(draw, count, of_rows=True)


def quantize_columns_stochastic(draw: Draw, scheme: QuantScheme, count: int) -> Iterator[Sample]:
    return quantize_randomly(draw, count, of_rows=False)


SAMPLERS: dict[str, Callable[[Draw, QuantScheme, int], Iterator[Sample]]] = {
    "column_scales": column_scales,
    "conv": conv,
    "dequantize_weight": dequantize_weight,
    "grouped_linear": grouped_linear,
    "grouped_linear_grad_input": grouped_linear_grad_input,
    "grouped_linear_grad_weight": grouped_linear_grad_weight,
    "grouped_outer": grouped_outer,
    "int_grad_input": int_grad_input,
    "linear": linear,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_grad_input": linear_grad_input,
    "linear_with_saved_input": linear,
    "mask_clipped": mask_clipped,
    "quantize_activation": quantize_activation,
    "quantize_columns_stochastic": quantize_columns_stochastic,
    "quantize_rows_stochastic": quantize_rows_stochastic,
    "quantize_weight": quantize_weight,
    "quantize_weight_scaled": quantize_weight_scaled,
    "scale_gradient": scale_gradient,
}
# What activations become does not depend on the weight format.
OP_SCHEMES = {name: SCHEMES for name in SAMPLERS} | {
    "quantize_activation": ("w8a8", "w8a8-ag32", "w8a8-ag64", "w8a8-ag128", "w8a8s")
}
OP_SCHEMES["linear_with_saved_input"] = INT_SCHEMES
OP_SCHEMES["conv"] = [name for name in SCHEMES if "-ag" not in name]
OP_SCHEMES["mask_clipped"] = [name for name in FLOAT_SCHEMES if name.startswith("w4") and "-min" not in name]
# Scales that are given have no zero points.
for _op in ("quantize_weight_scaled", "scale_gradient"):
    OP_SCHEMES[_op] = [name for name in FLOAT_SCHEMES if QuantScheme.parse(name).symmetric]
# These know no schemes at all; the names tell their sets of samples apart.
OP_SCHEMES |= dict.fromkeys(
    ("quantize_columns_stochastic", "quantize_rows_stochastic", "grouped_linear_grad_weight", "grouped_outer"),
    ("w8a8", "w8a16", "w4a8", "w4a16"),
)


def samples(op: str, scheme: str, count: int = 8) -> Iterator[Sample]:
    """`count` small samples and a large one for `op` under `scheme`, the same in every run."""
    for sample in SAMPLERS[op](Draw(f"{op} {scheme}"), QuantScheme.parse(scheme), count):
        yield sample._replace(label=f"{op} {scheme}: {sample.label}")


def schema_args(args: tuple) -> tuple:
    """The arguments as the schema of the operator takes them: the name of the scheme, their only string, as a code."""
    return tuple(QuantScheme.parse(value).code if isinstance(value, str) else value for value in args)


def call(op: str, args: tuple) -> Tensor | tuple[Tensor, ...]:
    """`ops.<op>` of the arguments of its schema, by their names: a wrapper takes few by position."""
    return getattr(ops, op)(**dict(zip(arguments.names(op), args, strict=False)))


def results(op: str, args: tuple) -> tuple[Tensor, ...]:
    """What `ops` computes, as the operator returns it: zero points that are None are a tensor of no columns."""
    out = call(op, args)
    out = out if isinstance(out, tuple) else (out,)
    return tuple(out[0].new_empty((len(out[0]), 0), dtype=torch.uint8) if tensor is None else tensor for tensor in out)


@cache
def expected(op: str, scheme: str, count: int = 8) -> list[tuple[Sample, tuple[Tensor, ...]]]:
    """The samples with what the reference makes of them."""
    with one_thread():
        results = [(sample, reference_ops.call(op, *sample.args)) for sample in samples(op, scheme, count)]
    return [(sample, result if isinstance(result, tuple) else (result,)) for sample, result in results]


def exact_weight(qweight, scales, zeros, in_features: int, scheme: str) -> torch.Tensor:
    """float64 [N, K]: integer times scale, plus minimum, without rounding."""
    parsed = QuantScheme.parse(scheme)
    integers = weight_integers(qweight, zeros, in_features, parsed).to(torch.float64)

    def by_column(per_group: Tensor) -> Tensor:
        return expand_groups(per_group.to(torch.float64), parsed.group_size, in_features)

    return integers * by_column(scales) + (by_column(zeros) if parsed.has_min else 0.0)


def magnitudes(qweight, scales, zeros, in_features: int, scheme: str) -> torch.Tensor:
    """float64 [N, K]: the magnitude of integer times scale, plus that of the minimum."""
    if not QuantScheme.parse(scheme).has_min:
        return exact_weight(qweight, scales, zeros, in_features, scheme).abs()
    product = exact_weight(qweight, scales, torch.zeros_like(zeros), in_features, scheme)
    return product.abs() + exact_weight(torch.zeros_like(qweight), scales, zeros.abs(), in_features, scheme)
