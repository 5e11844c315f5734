"""The search for tiles, with times that are made up, and the file it leaves."""

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

import op_samples
import torch

from qkernels import quantize_weight
from qkernels.triton import ops, tuning
from qkernels.triton.aot import TARGETS
from qkernels.triton.configs import Product, bucket, choose
from qkernels.triton.launch import Target

TARGET = TARGETS["sm_89"]
PRODUCTS = [
    Product(rows, 4096, 4096, operand, group, splittable=split)
    for rows, operand, group, split in (
        (1, "int8", 0, True),
        (16, "float16", 128, True),
        (500, "int8", 128, True),
        (2048, "float32", 0, False),
    )
]


class Clock:
    """Each measurement takes a second."""

    def __init__(self, times):
        self.now, self.times = 0.0, times

    def __call__(self) -> float:
        return self.now

    def measure(self, config) -> float:
        self.now += 1
        return self.times(config)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_candidates_can_be_launched(product):
    found = list(tuning.candidates(product, TARGET))
    assert found[0] == choose(product, TARGET)
    assert len(found) == len(set(found)) > 10
    for config in found:
        assert not product.group or product.group % config.depth == 0
        assert product.operand != "int8" or not product.group or config.depth == product.group
        assert config.slice_depth % config.depth == 0
        assert not config.slice_depth or product.splittable


def test_the_fastest_is_found():
    clock = Clock(lambda config: 1.0 if (config.rows, config.columns, config.num_warps) == (128, 64, 4) else 2.0)
    finding = tuning.search(PRODUCTS[2], TARGET, clock.measure, 1e6, clock)
    assert (finding.config.rows, finding.config.columns, finding.config.num_warps) == (128, 64, 4)
    assert (finding.seconds, finding.before) == (1.0, 2.0) and finding.better
    assert finding.tried == len(list(tuning.candidates(PRODUCTS[2], TARGET)))


@pytest.mark.parametrize(("budget", "tried"), [(0.0, 1), (5.0, 5)])
def test_the_budget_is_kept(budget, tried):
    clock = Clock(lambda config: 1.0)
    finding = tuning.search(PRODUCTS[0], TARGET, clock.measure, budget, clock)
    assert finding.tried == clock.now == tried
    assert not finding.better and finding.config == choose(PRODUCTS[0], TARGET)


def test_what_cannot_be_launched_is_not_chosen():
    first = choose(PRODUCTS[3], TARGET)
    clock = Clock(lambda config: 1.0 if config == first else float("inf"))
    assert tuning.search(PRODUCTS[3], TARGET, clock.measure, 1e6, clock).config == first


def test_file(tmp_path):
    """Findings come back, of this device only; worse ones are dropped, also when they were better before."""
    path = tmp_path / "tuned.json"
    assert tuning.load(path, "A") == {}
    config = list(tuning.candidates(PRODUCTS[2], TARGET))[3]
    better = tuning.Finding(bucket(PRODUCTS[2]), config, 1.0, 2.0, 9)
    noise = tuning.Finding(bucket(PRODUCTS[0]), config, 1.99, 2.0, 9)
    tuning.save(path, "A", [better, noise])
    tuning.save(path, "B", [])
    assert tuning.load(path, "A") == {bucket(PRODUCTS[2]): config}
    assert tuning.load(path, "B") == {}
    tuning.save(path, "A", [tuning.Finding(bucket(PRODUCTS[2]), config, 2.0, 2.0, 9)])
    assert tuning.load(path, "A") == {}
    path.write_text("[]")
    with pytest.raises(ValueError, match="tune"):
        tuning.load(path, "A")


def test_launches_follow_the_file():
    """A whole operator, for any number of rows of the bucket."""
    stored = quantize_weight(torch.randn(64, 96), "w8a8")
    product = Product(40, 64, 96, "int8", splittable=True)
    config = list(tuning.candidates(product, TARGET))[5]
    tuned = Target("cuda", 89, 1, TARGET.shared_bytes, {bucket(product): config})
    for m in (33, 64):
        launch = ops.PLANS["linear"](torch.randn(m, 96), *stored, None, "w8a8", device=tuned).launches[-1]
        assert launch.constants["BLOCK_M"] == config.rows and launch.constants["BLOCK_N"] == config.columns
        assert launch.reason == "measured by qkernels tune"


def test_every_product_can_be_tuned():
    """Each operator that multiplies says for what its tiles were chosen."""
    for op, scheme in (("linear", "w4a8-g32"), ("linear", "w8a16"), ("linear_grad_input", "w8a16")):
        sample = next(s for s in op_samples.samples(op, scheme) if s.args[0].numel())
        assert any(launch.product for launch in ops.PLANS[op](*sample.args, device=TARGET).launches)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path):
    from qkernels.cli import app

    result = CliRunner().invoke(app, ["tune", "--output", str(tmp_path / "tuned.json")])
    assert result.exit_code == 2 and "finds none" in result.output
    assert not list(tmp_path.iterdir())
