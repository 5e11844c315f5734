"""The choice of a backend, and that it reaches the operators."""

import pytest
import reference_ops
import torch
from helpers import run_python

from qkernels import QuantScheme
from qkernels.formats.rules import quantize_weight
from qkernels.kernels import cuda_library, dispatch
from qkernels.kernels.dispatch import Choice, Facts, select

parse = QuantScheme.parse


@pytest.mark.parametrize(
    ("facts", "backend", "word"),
    [
        (Facts("cpu"), "cpu", "compiled"),
        (Facts("cpu", triton=True), "cpu", "compiled"),
        (Facts("cuda", 80, True), "triton", "triton"),
        (Facts("cuda", 120, True), "triton", "triton"),
        (Facts("cuda", 75, True), "reference", "7.5 is below 8.0"),
        (Facts("cuda", 90, False), "reference", "pip install"),
        (Facts("hip", 0, True), "triton", "triton"),
        (Facts("hip", 0, False), "reference", "pip install"),
        (Facts("mps", 0, True), "reference", "mps"),
        (Facts("cuda", 90, True, cuda=True), "cuda", "CUDA"),
        (Facts("cuda", 75, True, cuda=True), "reference", "7.5 is below 8.0"),
    ],
)
def test_choice(facts, backend, word):
    choice = select(facts)
    assert choice.backend == backend
    assert word in choice.reason


@pytest.mark.parametrize(
    ("call", "backend"),
    [
        (cuda_library.Call("linear", parse("w4a8-g32-asym"), torch.float32), "cuda"),
        (cuda_library.Call("linear", parse("w4a16-g128"), torch.bfloat16), "cuda"),
        (cuda_library.Call("linear", parse("w4a16-g128"), torch.float32), "triton"),
        (cuda_library.Call("linear", parse("w8a8-g16"), torch.bfloat16), "triton"),
        (cuda_library.Call("linear", parse("w4a8-g32-min"), torch.bfloat16), "triton"),
        (cuda_library.Call("linear_with_saved_input", parse("w8a8"), torch.bfloat16), "cuda"),
        (cuda_library.Call("linear_with_saved_input", parse("w8a8-ag64"), torch.bfloat16), "triton"),
        (cuda_library.Call("linear_grad_input", parse("w8a8"), torch.bfloat16), "triton"),
        (cuda_library.Call("grouped_linear", parse("w8a8"), torch.bfloat16), "triton"),
        (cuda_library.Call("grouped_linear_grad_input", parse("w8a8"), torch.bfloat16), "triton"),
    ],
)
def test_choice_for_a_call(call, backend):
    assert select(Facts("cuda", 90, triton=True, cuda=True), call).backend == backend
    assert select(Facts("cuda", 90, triton=True), call).backend == "triton"
    assert select(Facts("hip", 0, triton=True), call).backend == "triton"


def test_minima_are_found_by_the_reference_and_multiplied_by_triton():
    scheme, facts = parse("w4a8-g32-min"), Facts("cuda", 90, triton=True, cuda=True)
    found = select(facts, cuda_library.Call("quantize_weight", scheme))
    assert found.backend == "reference" and "finds minima (w4a8-g32-min)" in found.reason
    for operator in ("linear", "linear_with_saved_input", "int_grad_input"):
        call = cuda_library.Call(operator, scheme, torch.bfloat16)
        assert not cuda_library.supports(call) and select(facts, call).backend == "triton"


@pytest.mark.parametrize(
    ("capability", "scheme", "multiply_adds", "backend"),
    [
        (90, "w8a8", dispatch.WARPGROUP_MULTIPLY_ADDS, "triton"),
        (90, "w8a8", dispatch.WARPGROUP_MULTIPLY_ADDS - 1, "cuda"),
        (90, "w4a8", 2**40, "cuda"),
        (90, "w8a16", 2**40, "cuda"),
        (90, "w8a8-ag128", 2**40, "cuda"),
        (80, "w8a8", 2**40, "cuda"),
        (120, "w8a8", 2**40, "cuda"),
    ],
)
def test_large_int8_products_on_hopper_go_to_triton(capability, scheme, multiply_adds, backend):
    call = cuda_library.Call("linear", parse(scheme), torch.bfloat16, multiply_adds)
    assert select(Facts("cuda", capability, triton=True, cuda=True), call).backend == backend
    assert select(Facts("cuda", capability, cuda=True), call).backend == "cuda"


def test_call_of_arguments():
    x = torch.ones(2, 4, dtype=torch.float16)
    assert dispatch.call_of("quantize_activation", (x, parse("w8a8-ag32").code)) == cuda_library.Call(
        "quantize_activation", parse("w8a8-ag32"), torch.float16
    )
    stored = quantize_weight(torch.ones(3, 4), "w4a8")
    call = dispatch.call_of("linear", (x, *stored, None, parse("w4a8").code))
    assert call.scheme == parse("w4a8") and call.multiply_adds == 2 * 3 * 4
    assert dispatch.call_of("quantize_rows_stochastic", (x, None, torch.tensor(0), 1)).scheme is None


def test_library_is_not_loaded_without_cuda():
    library = cuda_library.library()
    assert torch.version.cuda or not library.loaded
    assert library.loaded or "without CUDA" in library.reason or "QKERNELS_CUDA=1" in library.remedy


def test_facts_of_devices_that_are_here():
    assert dispatch.facts_of(torch.device("cpu")) == Facts("cpu")
    assert dispatch.facts_of(torch.device("meta")) == Facts("meta")


def test_reference_is_run():
    x = torch.randn(3, 40)
    result = dispatch.run("quantize_activation", Choice("reference", ""), (x, parse("w8a8").code), {})
    assert all(map(torch.equal, result, reference_ops.quantize_activation(x, "w8a8")))


def test_a_backend_that_cannot_be_run_here_is_refused():
    with pytest.raises(ValueError, match="backend must be 'cuda', 'triton' or 'reference', got 'cpu'"):
        dispatch.run("quantize_activation", select(Facts("cpu")), (torch.ones(3, 40), parse("w8a8").code), {})


def test_every_operator_has_a_gpu_kernel():
    import op_samples

    for name in op_samples.SAMPLERS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{name}", "CUDA"), name


def test_operators_on_the_cpu_do_not_import_triton():
    code = """
import sys, torch, qkernels
layer = qkernels.QuantLinear.from_float(torch.nn.Linear(40, 8), "w4a8-g32")
layer(torch.randn(3, 40))
print("qkernels.kernels.triton" in sys.modules)
"""
    assert run_python(code).stdout.strip() == "False"


@pytest.mark.parametrize(("seed", "backend"), [(None, "triton"), (torch.tensor(1), "reference")])
def test_rounded_gradients_of_experts_have_no_gpu_kernel(seed, backend):
    weight = (torch.zeros(2, 4, 8, dtype=torch.int8), torch.ones(2, 4, 1), None)
    args = (torch.ones(3, 4), torch.tensor([1, 3]), *weight, 8, parse("w8a8").code, seed, None)
    choice = select(Facts("cuda", 90, triton=True), dispatch.call_of("grouped_linear_grad_input", args))
    assert choice.backend == backend
    assert backend == "triton" or "no GPU kernel of grouped_linear_grad_input" in choice.reason
    if seed is None:  # torch hands on no defaults at the end
        assert dispatch.call_of("grouped_linear_grad_input", args[:-2]) == dispatch.call_of(
            "grouped_linear_grad_input", args
        )
