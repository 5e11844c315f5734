"""What the compiler makes of every kernel for every target, at the sizes of real layers."""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

from gpu_emulation.project.aot import TARGETS, compile_launch
from gpu_emulation.project.launches import real_launches
from gpu_emulation.usage import usage

pytestmark = pytest.mark.slow
# Kernels that multiply integers: their rules know no fused multiply-add, and division is IEEE.
INTEGER_KERNELS = (
    "quantize_rows",
    "quantize_groups",
    "linear_int",
    "reduce_slices",
    "int_grad_input",
    "random_rows",
    "column_ranges",
    "random_columns",
    "merge_groups",
    "int4_parameters",
    "int4_pack",
    "int4_mask",
    "invert_scales",
    "int8_clamp",
    "scale_gradient",
    "row_factors",
    "softmax_chunk",
    "loss_product",
    "loss_rows",
    "loss_gradient",
)
EXACT_KERNELS = (*INTEGER_KERNELS, "dequantize_weight", "column_scales")
INT_PRODUCTS = ("linear_int", "int_grad_input", "loss_product")
FLOAT_PRODUCTS = ("linear_float", "grad_input")
# Global loads of 16 bytes a thread; a tile of a group of 32 holds but 8 for each of 256 threads.
WIDE_LOAD = (
    r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x({0})\b|ld\.global[\w.:]*\.v4\.b32|cp\.async\.bulk"
)
FORBIDDEN = re.compile(r"\b(div\.full|div\.approx|rcp\.approx|fma\.rn\.f(32|64)\w*|[\w.]+\.ftz)[\w.]*")


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_code(target):
    seen = set()
    for name, launch in real_launches(TARGETS[target]).items():
        kernel = launch.kernel.__name__.removesuffix("_kernel")
        seen.add(kernel)
        compiled = compile_launch(launch, target)
        used = usage(compiled)
        assert used.spilled == 0, name
        assert used.registers <= (512 if target.startswith("gfx") else 255), name
        assert compiled.shared <= TARGETS[target].shared_bytes, name
        if kernel in INT_PRODUCTS:
            assert used.int_products and not used.float_products, name
        if kernel in FLOAT_PRODUCTS:
            assert used.float_products and not used.int_products, name
        if "ptx" in compiled.asm:
            if kernel in EXACT_KERNELS:
                assert not FORBIDDEN.search(compiled.asm["ptx"]), name
            if kernel in INT_PRODUCTS + FLOAT_PRODUCTS:
                wide = WIDE_LOAD.format("8|10" if "-g32" in name else "10")
                assert re.search(wide, compiled.asm["ptx"]), f"{name} reads few bytes at a time"
    assert seen == {*EXACT_KERNELS, *FLOAT_PRODUCTS}
