"""The search for tiles, with times that are made up, and the file it leaves."""

import json
import re
import resource
import signal
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed: pip install 'qkernels[triton]'")

import op_samples
import torch
from gpu_emulation.project.aot import TARGETS

from qkernels import quantize_weight
from qkernels.kernels.triton import ops, tuning
from qkernels.kernels.triton.target import Target
from qkernels.kernels.triton.tiles import MatmulShape, bucket, choose

TARGET = TARGETS["sm_89"]
PRODUCTS = [
    MatmulShape(rows, 4096, 4096, operand, group, splittable=split)
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


def entries(**changed) -> dict:
    """The content of a good file with one entry for A, of which some parts are changed."""
    finding = tuning.Finding(bucket(PRODUCTS[2]), list(tuning.candidates(PRODUCTS[2], TARGET))[3], 1.0, 2.0, 9)
    entry = {"product": asdict(finding.product), "config": asdict(finding.config), "seconds": 1.0, "before": 2.0}
    return {"format": tuning.FORMAT, "devices": {"A": [{**entry, **changed}]}}


BROKEN = {
    "no object": b"[]",
    "empty": b"",
    "half": json.dumps(entries()).encode()[:-20],
    "no UTF-8": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "another version": json.dumps({**entries(), "format": 0}).encode(),
    "no devices": json.dumps({"format": tuning.FORMAT}).encode(),
    "devices of another kind": json.dumps({"format": tuning.FORMAT, "devices": [1]}).encode(),
    "no list": json.dumps({"format": tuning.FORMAT, "devices": {"A": 3}}).encode(),
    "entry of another kind": json.dumps({"format": tuning.FORMAT, "devices": {"A": ["x"]}}).encode(),
    "no product": json.dumps(entries(product=None)).encode(),
    "no config": json.dumps(entries(config={})).encode(),
    "unknown field": json.dumps(entries(product={**entries()["devices"]["A"][0]["product"], "x": 1})).encode(),
    "field of another type": json.dumps(
        entries(config={**entries()["devices"]["A"][0]["config"], "rows": "64"})
    ).encode(),
    "unknown operand": json.dumps(
        entries(product={**entries()["devices"]["A"][0]["product"], "operand": "int3"})
    ).encode(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, kind):
    """It is a ValueError for who reads or adds to it, is left alone, and is warned of where a GPU wants its tiles."""
    path = tmp_path / "qkernels" / "tuned.json"
    path.parent.mkdir()
    path.write_bytes(BROKEN[kind])
    for call in (
        lambda: tuning.load(path, "A"),
        lambda: tuning.save(path, "B", []),
        lambda: tuning.prepare(path),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is no file of qkernels tune"):
            call()
    assert path.read_bytes() == BROKEN[kind] and list(path.parent.iterdir()) == [path]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match=f"{re.escape(str(path))}.*run `qkernels tune`, or delete it"):
        assert tuning.tuned("A") == {}


def test_the_file_of_the_user_goes_before_that_of_the_package(tmp_path, monkeypatch):
    first, second, third = list(tuning.candidates(PRODUCTS[2], TARGET))[1:4]
    monkeypatch.setattr(tuning, "FILE", tmp_path / "package" / "tuned.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.user_file() == tmp_path / "qkernels" / "tuned.json"
    found = [
        tuning.Finding(bucket(product), config, 1.0, 2.0, 9)
        for product, config in zip((PRODUCTS[2], PRODUCTS[0], PRODUCTS[2]), (first, second, third), strict=True)
    ]
    tuning.save(tuning.FILE, "A", found[:2])
    tuning.save(tuning.user_file(), "A", found[2:])
    assert tuning.tuned("A") == {bucket(PRODUCTS[2]): third, bucket(PRODUCTS[0]): second}
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.user_file() == tmp_path / "home/.cache/qkernels/tuned.json"


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    config = list(tuning.candidates(PRODUCTS[2], TARGET))[3]
    tuning.save(path, "A", [tuning.Finding(bucket(PRODUCTS[2]), config, 1.0, 2.0, 9)])
    before = path.read_bytes()
    many = [tuning.Finding(MatmulShape(16 + i, 64, 64, "int8"), config, 1.0, 2.0, 9) for i in range(300)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # as on a disk that is full
    try:
        with pytest.raises(OSError, match="File too large"):
            tuning.save(path, "B", many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert tuning.load(path, "A") == {bucket(PRODUCTS[2]): config}


def test_launches_follow_the_file():
    """A whole operator, for any number of rows of the bucket."""
    stored = quantize_weight(torch.randn(64, 96), "w8a8")
    product = MatmulShape(40, 64, 96, "int8", splittable=True)
    config = list(tuning.candidates(product, TARGET))[5]
    tuned = Target("cuda", 89, 1, TARGET.shared_bytes, {bucket(product): config})
    for m in (33, 64):
        launch = ops.plan("linear", (torch.randn(m, 96), *stored, None, "w8a8"), tuned).launches[-1]
        assert launch.constants["BLOCK_M"] == config.rows and launch.constants["BLOCK_N"] == config.columns
        assert launch.reason == "measured by qkernels tune"


def test_every_product_can_be_tuned():
    """Each operator that multiplies says for what its tiles were chosen."""
    for op, scheme in (("linear", "w4a8-g32"), ("linear", "w8a16"), ("linear_grad_input", "w8a16")):
        sample = next(s for s in op_samples.samples(op, scheme) if s.args[0].numel())
        assert any(launch.product for launch in ops.plan(op, sample.args, TARGET).launches)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path):
    from qkernels.cli import app

    result = CliRunner().invoke(app, ["tune", "--output", str(tmp_path / "tuned.json")])
    assert result.exit_code == 2 and "finds none" in result.output
    assert not list(tmp_path.iterdir())
