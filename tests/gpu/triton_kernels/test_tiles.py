"""The choice of tiles is a pure function of shape, dtype and target."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

from gpu_emulation.project.aot import TARGETS

from qkernels.kernels.triton.target import Target
from qkernels.kernels.triton.tiles import MatmulShape, Tile, choose, slices, tiles

A100 = TARGETS["sm_80"]


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512, 8192])
@pytest.mark.parametrize("operand", ["int8", "float16", "float32"])
@pytest.mark.parametrize("group", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_what_holds_of_every_choice(rows, operand, group, target):
    product = MatmulShape(rows, 4096, 4096, operand, group, splittable=True)
    config = choose(product, TARGETS[target])
    assert config.reason
    assert config.rows >= 16 and config.columns >= 16 and config.depth >= 16
    if operand == "int8":
        assert not group or config.depth == max(group, 32)
    else:
        assert not group or group % config.depth == 0
    stage = (config.rows + config.columns) * config.depth * {"int8": 1, "float16": 2, "float32": 4}[operand]
    assert config.num_stages * stage <= TARGETS[target].shared_bytes
    if config.slice_depth:
        assert rows <= 16 and config.slice_depth % config.depth == 0
        assert 2 <= slices(product, config) <= 16


def test_one_row_is_split_until_every_processor_has_work():
    product = MatmulShape(1, 1024, 8192, "int8", splittable=True)
    config = choose(product, A100)
    assert tiles(product, config) * slices(product, config) >= A100.processors
    assert "slices" in config.reason


def test_many_rows_get_large_tiles():
    config = choose(MatmulShape(4096, 4096, 4096, "int8"), A100)
    assert (config.rows, config.columns) == (128, 128)


def test_few_tiles_are_made_smaller():
    config = choose(MatmulShape(256, 512, 4096, "int8"), A100)
    assert (config.rows, config.columns) == (64, 64)


def test_stages_that_do_not_fit_are_left_out():
    small = Target("cuda", 89, 128, 48 * 1024)
    config = choose(MatmulShape(4096, 4096, 4096, "float16"), small)
    assert isinstance(config, Tile) and config.num_stages < 3
    assert "fit" in config.reason
