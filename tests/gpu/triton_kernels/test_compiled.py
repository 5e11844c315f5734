"""The code Triton compiles, executed without a GPU: equal bits for integer products, on ragged shapes.

sm_80, sm_89 and sm_120 are executed, and of sm_90 the forward of w8a8; what the other targets get is inspected in
test_targets.py. Code that two targets share is executed once for each sample.
"""

import math

import op_samples
import pytest
import reference_ops
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

from gpu_emulation.project.aot import TARGETS, compile_launch
from gpu_emulation.project.executor import codes_of, execute_all
from helpers import assert_same_bits
from launch_checks import check, has_kernel, plan

from qkernels import QuantScheme, quantize_weight
from qkernels.kernels import dispatch
from qkernels.kernels.triton import matmul_kernels, ops
from qkernels.kernels.triton.launch import Launch
from qkernels.kernels.triton.target import Target

FIRST, OTHERS = "sm_80", ("sm_89", "sm_120")
EXECUTED = [FIRST, *(pytest.param(target, marks=pytest.mark.slow) for target in OTHERS)]
SAMPLES = 20
LEAST_EXECUTED = 6
MOST_BLOCKS = 40
LINEAR = (
    "w8a8",
    "w8a8-g64",
    "w8a8-ag32",
    "w8a8-g32-ag128",
    "w4a8-asym",
    "w4a8-g128",
    "w4a8-g32-asym",
    "w4a8-g64-ag32",
    "w8a16",
    "w4a16-g128",
    "w4a16-g32-asym",
    "w8a8s",
    "w8a8-g16",
    "w8a8-g16-ag32",
    "w8a16-g16",
    "w8a8-min",
    "w4a8-g32-min-ag64",
    "w4a16-g32-min",
)
CASES = [
    *(("linear", scheme) for scheme in LINEAR),
    *(
        ("grouped_linear", scheme)
        for scheme in ("w8a8", "w4a8-g32-asym", "w8a8-ag32", "w8a8-g16", "w4a16-g128", "w8a8s")
    ),
    *(("grouped_linear_grad_input", scheme) for scheme in ("w8a16", "w4a16-g64-asym")),
    *(("quantize_activation", scheme) for scheme in ("w8a8", "w8a8-ag32", "w8a8-ag128", "w8a8s")),
    ("grouped_linear", "w4a8-g64-min"),
    *(("dequantize_weight", scheme) for scheme in ("w8a8", "w4a8-g32-asym", "w4a8-g32-min")),
    *(("column_scales", scheme) for scheme in ("w8a8-g16", "w8a8-g64", "w4a8-g32-asym")),
    *(("int_grad_input", scheme) for scheme in ("w8a8", "w4a8", "w4a8-g32-asym", "w4a8-min")),
    *(("linear_grad_input", scheme) for scheme in ("w8a16", "w4a16-g64-asym")),
    ("quantize_rows_stochastic", "w8a8"),
    ("quantize_columns_stochastic", "w8a8"),
    ("linear_with_saved_input", "w8a8-ag32"),
    *(("quantize_weight", scheme) for scheme in ("w4a8", "w4a8-g32-asym")),
    ("mask_clipped", "w4a16-asym"),
    *((op, scheme) for op in ("quantize_weight_scaled", "scale_gradient") for scheme in ("w8a16", "w4a16-g32")),
]
# Rows, classes and features: a few chunks of 64 classes; more than the ranges they are summed in.
LOSS_SHAPES = ((5, 100, 33), (17, 65, 65), (3, 47, 130), (2, 130, 19), (1, 64, 64), (9, 63, 35))
MANY_CHUNKS = (4, 600, 47)
LOSS = {
    "w8a8": (*LOSS_SHAPES, MANY_CHUNKS),
    "w4a8-g32-asym": LOSS_SHAPES,
    "w4a16": LOSS_SHAPES[:1],
    "w4a8-min": LOSS_SHAPES[:1],
}


def executable(op: str, scheme: str, target: str) -> list[tuple[op_samples.Sample, tuple, list[Launch]]]:
    """The first samples of some but few blocks, for more of them run the same code; their results and launches."""
    found = []
    for sample in op_samples.samples(op, scheme, SAMPLES):
        if not has_kernel(op, sample.args):
            continue
        results, launches = plan(op, sample.args, TARGETS[target])
        if 0 < sum(math.prod(launch.grid) for launch in launches) <= MOST_BLOCKS:
            found.append((sample, results, launches))
        if len(found) == LEAST_EXECUTED:
            return found
    raise AssertionError(f"only {len(found)} samples are executed")


@pytest.mark.parametrize(("op", "scheme"), CASES)
def test_operator(op, scheme):
    for sample, results, launches in executable(op, scheme, FIRST):
        execute_all(launches, FIRST)
        check(op, scheme, sample, results)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "scheme"), CASES)
def test_operator_on_other_targets(op, scheme):
    """Code that a target before has, too, was executed with these arguments."""
    seen = {sample.label: {codes_of(launches, FIRST)} for sample, _, launches in executable(op, scheme, FIRST)}
    for target in OTHERS:
        for sample, results, launches in executable(op, scheme, target):
            codes = codes_of(launches, target)
            if codes in seen.setdefault(sample.label, set()):
                continue
            seen[sample.label].add(codes)
            execute_all(launches, target)
            check(op, scheme, sample, results)


@pytest.mark.parametrize("target", EXECUTED)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8-g128", "w4a8-g32-asym", "w4a16-g64"])
def test_tiles_of_many_rows(scheme, target):
    """Shapes too small for them, for a device with a single processor."""
    few = Target("cuda", TARGETS[target].capability, 1, TARGETS[target].shared_bytes)
    x, bias = torch.randn(140, 336).to(torch.bfloat16), torch.randn(144)
    weight = quantize_weight(torch.randn(144, 336), scheme)
    (out,), launches = plan("linear", (x, *weight, bias, scheme, torch.float32), few)
    assert launches[-1].constants["BLOCK_N"] == 128
    execute_all(launches, target)
    args = (x, *weight, bias, scheme, torch.float32)
    check("linear", scheme, op_samples.Sample(args, f"{scheme} {target}"), (out,))


@pytest.mark.parametrize("target", EXECUTED)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-ag64", "w4a8-g128", "w4a16-g128", "w8a16"])
def test_sliced_depth(scheme, target):
    """Few rows of a deep product: its slices are added in a fixed order."""
    x, bias = torch.randn(3, 1040).to(torch.bfloat16), torch.randn(80).to(torch.bfloat16)
    args = (x, *quantize_weight(torch.randn(80, 1040), scheme), bias, scheme, None)
    (out,), launches = plan("linear", args, TARGETS[target])
    assert launches[-1].kernel is matmul_kernels.reduce_slices_kernel
    execute_all(launches, target)
    check("linear", scheme, op_samples.Sample(args, f"{scheme} {target}"), (out,))
    first = out.clone()
    execute_all(launches, target)
    assert_same_bits(out, first)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "shape", [(70, 72, 272), (65, 17, 40), (140, 144, 336), (200, 80, 100), (128, 128, 512), (99, 257, 129)]
)
def test_warp_groups_of_sm_90(shape, large):
    """The forward of w8a8 on Hopper's own instruction, whose tiles have 64 rows or more."""
    m, n, k = shape
    target = Target("cuda", 90, 1, TARGETS["sm_90"].shared_bytes) if large else TARGETS["sm_90"]
    weight, bias = quantize_weight(torch.randn(n, k), "w8a8"), torch.randn(n)
    args = (torch.randn(m, k).to(torch.bfloat16), *weight, bias, "w8a8", torch.bfloat16)
    (out,), launches = plan("linear", args, target)
    assert "wgmma.mma_async" in compile_launch(launches[-1], "sm_90").asm["ptx"]
    execute_all(launches, "sm_90")
    check("linear", "w8a8", op_samples.Sample(args, f"sm_90 {shape}"), (out,))


@pytest.mark.parametrize("target", EXECUTED)
@pytest.mark.parametrize("scheme", LOSS)
def test_linear_cross_entropy(scheme, target):
    for shape in LOSS[scheme]:
        m, n, k = shape
        draw = op_samples.Draw(f"{scheme} {shape}")
        classes = torch.randint(0, n, (m,), generator=draw.generator)
        classes[1::4] = -100
        dither = torch.randint(2**32, (m,), generator=draw.generator)
        hidden = draw.floats(m, k).to(torch.bfloat16)
        args = (hidden, classes, *draw.weight(n, k, QuantScheme.parse(scheme)), draw.bias(n), scheme, dither)
        results, launches = plan("linear_cross_entropy", args, TARGETS[target])
        execute_all(launches, target)
        check("linear_cross_entropy", scheme, op_samples.Sample(args, f"{scheme} {target} {shape}"), results)


@pytest.mark.parametrize("target", EXECUTED)
def test_terms_of_the_loss(target):
    """Capped logits, and label smoothing, for which columns of the weight are summed in float64."""
    draw = op_samples.Draw("terms")
    storage = draw.weight(70, 33, QuantScheme.parse("w8a8"))
    classes, dither = torch.randint(0, 70, (5,)), torch.randint(2**32, (5,))
    args = (draw.floats(5, 33), classes, *storage, None, "w8a8", dither)
    for terms in ({"softcap": 5.0, "z_loss": 0.01}, {"label_smoothing": 0.3}):
        plan_of_terms = ops.plan("linear_cross_entropy", args, TARGETS[target], **terms)
        execute_all(plan_of_terms.launches, target)
        for result, expected in zip(
            plan_of_terms.results, reference_ops.linear_cross_entropy(*args, **terms), strict=True
        ):
            last_place = 2.0**-23 * expected.abs() if "label_smoothing" in terms else 0.0
            assert ((result - expected).abs() <= last_place).all(), f"{target} {terms}"


def test_all_kernels_are_executed():
    """Every operator that Triton has is among the cases above."""
    assert {op for op, _ in CASES} | {"linear_cross_entropy"} == set(ops.PLANS)
    assert set(ops.PLANS) == set(op_samples.SAMPLERS) - set(dispatch.WITHOUT_GPU_KERNEL)
