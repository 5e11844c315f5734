"""What the compiler makes of every kernel for every target, at the sizes of real layers."""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

from launches import real_launches

from qkernels.triton.aot import TARGETS, compile_launch
from qkernels.triton.configs import Config, Product, choose, slices, tiles
from qkernels.triton.inspect import usage
from qkernels.triton.launch import Target

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


A100 = TARGETS["sm_80"]


class TestConfigs:
    """The choice of tiles is a pure function."""

    @pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512, 8192])
    @pytest.mark.parametrize("operand", ["int8", "float16", "float32"])
    @pytest.mark.parametrize("group", [0, 32, 64, 128])
    @pytest.mark.parametrize("target", TARGETS)
    def test_what_holds_of_every_choice(self, rows, operand, group, target):
        product = Product(rows, 4096, 4096, operand, group, splittable=True)
        config = choose(product, TARGETS[target])
        assert config.reason
        assert config.rows >= 16 and config.columns >= 16 and config.depth >= 16
        assert not group or group % config.depth == 0
        assert operand != "int8" or not group or config.depth == group
        stage = (config.rows + config.columns) * config.depth * {"int8": 1, "float16": 2, "float32": 4}[operand]
        assert config.num_stages * stage <= TARGETS[target].shared_bytes
        if config.slice_depth:
            assert rows <= 16 and config.slice_depth % config.depth == 0
            assert 2 <= slices(product, config) <= 16

    def test_one_row_is_split_until_every_processor_has_work(self):
        product = Product(1, 1024, 8192, "int8", splittable=True)
        config = choose(product, A100)
        assert tiles(product, config) * slices(product, config) >= A100.processors
        assert "slices" in config.reason

    def test_many_rows_get_large_tiles(self):
        config = choose(Product(4096, 4096, 4096, "int8"), A100)
        assert (config.rows, config.columns) == (128, 128)

    def test_few_tiles_are_made_smaller(self):
        config = choose(Product(256, 512, 4096, "int8"), A100)
        assert (config.rows, config.columns) == (64, 64)

    def test_stages_that_do_not_fit_are_left_out(self):
        small = Target("cuda", 89, 128, 48 * 1024)
        config = choose(Product(4096, 4096, 4096, "float16"), small)
        assert isinstance(config, Config) and config.num_stages < 3
        assert "fit" in config.reason
