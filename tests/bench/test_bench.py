"""The benchmark suite: limits by hand, verification before timing, files, comparison, and the console script."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import time

import pytest
import torch
from helpers import assert_refused, invoke

from qkernels import _native
from qkernels.bench import gpu, ours, peers, suite, torch_baselines
from qkernels.bench.candidate import COLD, FORWARD, GRAD_INPUT, OVERHEAD, WARM, Candidate, Case
from qkernels.bench.compare import compare, regressions
from qkernels.bench.results import Results
from qkernels.bench.shapes import MODELS, Layer, parse_layers
from qkernels.kernels import ops
from qkernels.profiling.roofline import Limit, MatmulCost, Roofline, cache_bytes, measure
from qkernels.profiling.timing import MIN_TURNS, Turns, interleave

pytest.importorskip("matplotlib")

# Round figures: 1000 and 100 op/s; 64, 16 and 4 byte/s from caches of 100 and 1000 bytes.
ROUND = Roofline(
    1,
    {"vpmaddwd-avx2": 1000.0, "fma-avx2": 100.0},
    {"l2": 64.0, "l3": 16.0, "dram": 4.0},
    {"l2": 100, "l3": 1000},
)


def case(direction: str = FORWARD, weights: str = WARM, m: int = 3, n: int = 32, k: int = 64) -> Case:
    return Case("test", m, n, k, direction, weights, "float32", 1)


@pytest.fixture(scope="module")
def results() -> Results:
    plan = suite.Plan(
        layers="32x64", rows=(1, 5), schemes=("w8a8", "w4a16-g32-asym"), directions=(FORWARD, GRAD_INPUT), threads=(1,),
        seconds=1e-3,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "ROOFLINE_SECONDS", 0.1)
        return suite.run(plan)


class TestRoofline:
    def test_bytes_of_a_product(self):
        # weight 4 x 64: int8 and 4 scales; nibbles, 2 groups of a scale and a zero point; float. x 2 x 64, out 2 x 4.
        def sizes(*arguments, **options):
            product = MatmulCost.of(2, 4, 64, *arguments, **options)
            return product.kind, product.weight_bytes, product.activation_bytes

        assert sizes("w8a8", "float32") == ("int8", 256 + 16, 2 * 68 * 4)
        assert sizes("w4a8-g32-asym", "bfloat16") == ("int8", 128 + 8 * 5, 2 * 68 * 2)
        assert sizes("w4a16-g32", "bfloat16") == ("bfloat16", 128 + 8 * 4, 2 * 68 * 2)
        assert sizes("w8a8", "float32", gradient=True) == ("float32", 256 + 16, 2 * 68 * 4)
        assert sizes("bfloat16", "bfloat16") == ("bfloat16", 512, 2 * 68 * 2)

    def test_limit_by_hand(self):
        small = MatmulCost(1, 1, 1, "int8", 48, 16)
        assert ROUND.limit(small) == Limit(64 / 64, "l2")
        assert ROUND.limit(small, cold=True) == Limit(48 / 4 + 16 / 64, "dram")
        assert ROUND.limit(MatmulCost(1, 1, 1, "int8", 400, 80)) == Limit(480 / 16, "l3")
        assert ROUND.limit(MatmulCost(1, 1, 1, "int8", 4000, 80)) == Limit(4080 / 4, "dram")
        assert ROUND.limit(MatmulCost(10, 100, 5, "int8", 40, 8)) == Limit(10000 / 1000, "vpmaddwd-avx2")
        assert ROUND.limit(MatmulCost(10, 100, 5, "float32", 40, 8)) == Limit(10000 / 100, "fma-avx2")
        assert ROUND.limit(MatmulCost(10, 100, 5, "bfloat16", 40, 8)) == Limit(10000 / 100, "fma-avx2")

    def test_level_counts_the_caches_of_all_threads(self):
        assert [ROUND.level(size) for size in (100, 101, 1000, 1001)] == ["l2", "l3", "l3", "dram"]
        assert dataclasses.replace(ROUND, threads=2).level(200) == "l2"

    def test_without_peaks_memory_is_the_limit(self):
        assert dataclasses.replace(ROUND, peaks={}).limit(MatmulCost(10, 100, 5, "int8", 40, 8)) == Limit(48 / 64, "l2")

    def test_measured_numbers_are_plausible(self):
        one, two = measure(1, 0.2), measure(2, 0.2)
        assert set(one.peaks) == set(_native.peak_probes())
        for values in (*(r.peaks for r in (one, two)), *(r.bandwidth for r in (one, two))):
            # A Gop/s and a hundred MB/s: less than any CPU that can be meant; the upper end: more than any has.
            assert all(math.isfinite(value) and 1e8 < value < 1e15 for value in values.values()), values
        if "vpmaddwd-avx2" in one.peaks:
            assert one.peaks["vpmaddwd-avx2"] > one.peaks["fma-avx2"] * 0.5
        for probe, peak in one.peaks.items():
            assert two.peaks[probe] < 4 * peak, probe

    def test_caches_are_found(self):
        caches = cache_bytes()
        assert 1 << 14 < caches["l2"] < caches["l3"] or caches == {"l2": 1 << 20, "l3": 32 << 20}

    def test_wrong_arguments_are_named(self):
        with pytest.raises(ValueError, match=r"probe must be one of those this CPU can run \(.*\), got 'sse9'"):
            _native.peak("sse9", 1, 0.1)
        with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
            _native.read_bandwidth(1 << 16, 0, 0.1)
        with pytest.raises(ValueError, match="seconds must be positive"):
            _native.read_bandwidth(1 << 16, 1, 0.0)
        with pytest.raises(ValueError, match="bytes_per_thread must be at least 4096, got 64"):
            _native.read_bandwidth(64, 1, 0.1)


class TestVerification:
    def test_every_row_is_checked(self, results):
        assert {(row.direction, row.m) for row in results.rows} == {
            (OVERHEAD, 1), (FORWARD, 1), (FORWARD, 5), (GRAD_INPUT, 1), (GRAD_INPUT, 5),
        }  # fmt: skip
        names = {row.name for row in results.rows if row.ours and row.direction == FORWARD}
        assert names == {"w8a8", "w4a16-g32-asym"}
        assert {row.name for row in results.rows if row.ours and row.direction == GRAD_INPUT} == {*names, "w8a8 int8"}
        assert {row.name for row in results.rows if row.direction == OVERHEAD} >= {"w8a8", "w8a8 QuantLinear"}
        for row in results.rows:
            assert row.check == (
                "equal to the reference"
                if row.name == "w8a8 int8" or (row.name.startswith("w8a8") and row.direction != GRAD_INPUT)
                else "within 0.0001 of the reference"
                if row.ours
                else row.check
            )
            assert row.median > 0 and row.quartiles[0] <= row.median <= row.quartiles[1] and row.samples >= MIN_TURNS
            assert row.limit > 0 and row.error < 0.2 and row.fraction == row.limit / row.median

    @pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
    @pytest.mark.parametrize("direction", [FORWARD, GRAD_INPUT])
    def test_a_wrong_kernel_is_refused_before_anything_is_timed(self, monkeypatch, scheme, direction):
        name = "linear" if direction == FORWARD else "linear_grad_input"
        real = getattr(ops, name)

        def wrong(*arguments):
            out = real(*arguments)
            out[-1, 7] += 0.01 * out.abs().mean()
            return out

        timed = []
        monkeypatch.setattr(ours.ops, name, wrong)
        monkeypatch.setattr(suite, "interleave", lambda *arguments: timed.append(arguments))
        with pytest.raises(ours.WrongResult, match=rf"{scheme}, {direction} 3 x 32 x 64"):
            suite.run_case([ours.Operator(case(direction), scheme)], ROUND, 1e-3)
        assert timed == []

    @pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-asym", "w8a8-ag32"])
    def test_gradient_that_is_quantized_already(self, monkeypatch, scheme):
        candidate = ours.IntGradient(case(GRAD_INPUT), scheme)
        (row,), _ = suite.run_case([candidate], ROUND, 1e-3)
        assert (row.name, row.check) == (f"{scheme} int8", "equal to the reference")
        assert row.error < (0.2 if scheme.startswith("w4") else 0.03)
        assert candidate.product().kind == "int8" and candidate.product().activation_bytes == 3 * (32 + 64 * 4)
        real = ops.int_grad_input
        monkeypatch.setattr(ours.ops, "int_grad_input", lambda *args, **options: real(*args, **options) * 1.0001)
        with pytest.raises(ours.WrongResult, match=rf"{scheme} int8, grad-input 3 x 32 x 64"):
            suite.run_case([candidate], ROUND, 1e-3)

    def test_others_beyond_their_tolerance_or_broken_are_left_out_with_the_reason(self):
        class Zero(torch_baselines.Float32):
            name = "zero"

            def prepare(self, weight, bias):
                return lambda x: torch.zeros(3, 32)

        class Broken(Zero):
            name = "broken"

            def prepare(self, weight, bias):
                raise OSError("no such\nthing")

        class Absent(Zero):
            name, module = "absent", "no_such_package"

        kinds: list[type[Candidate]] = [Zero, Broken, Absent, torch_baselines.Float32]
        rows, reasons = suite.run_case([kind(case()) for kind in kinds], ROUND, 1e-3)
        assert [row.name for row in rows] == ["torch float32"]
        assert reasons["zero"] == "ValueError: relative error 1, at most 1e-05 expected"
        assert reasons["broken"] == "OSError: no such"
        assert reasons["absent"].startswith("cannot import no_such_package: ModuleNotFoundError")

    def test_cold_weights_rotate_over_copies_beyond_l3(self, monkeypatch):
        limits = dataclasses.replace(ROUND, caches={"l2": 100, "l3": 10_000})
        candidate = ours.Operator(case(weights=COLD), "w8a8")
        seen = []
        real = ops.linear
        monkeypatch.setattr(ours.ops, "linear", lambda x, q, *rest: seen.append(q.data_ptr()) or real(x, q, *rest))
        (row,), _ = suite.run_case([candidate], limits, 1e-3)
        size = 32 * 64 + 32 * 4
        assert row.copies == len(set(seen)) == -(-20_000 // size)
        assert row.limited_by == "dram" and row.limit == pytest.approx(size / 4 + 3 * 96 * 4 / 16)
        slow = torch_baselines.Float32(case(weights=COLD))
        slow.max_copies = 2
        assert suite.run_case([slow], limits, 1e-3) == (
            [],
            {slow.name: "a cold weight of this size takes 3 copies, over 2"},
        )

    def test_peers_run_or_say_why_not(self):
        candidates = peers.peers(case(n=64, k=256))
        rows, reasons = suite.run_case(candidates, ROUND, 1e-3)
        assert {row.name for row in rows} | set(reasons) == {candidate.name for candidate in candidates}
        expected = ("cannot import", "it runs on all cores")
        assert {name: reason for name, reason in reasons.items() if not reason.startswith(expected)} == {}

    def test_onednn_setting_is_restored(self):
        before = torch.backends.mkldnn.matmul.fp32_precision
        with torch_baselines.OneDnn(case()).scope():
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.backends.mkldnn.matmul.fp32_precision == before

    def test_threads_are_restored(self, results):
        assert torch.get_num_threads() == 2
        assert {row.threads for row in results.rows} == {1}


class TestTiming:
    def test_turns_measure_the_call(self):
        fast, slow = Turns([lambda x: x], None), Turns([lambda x: time.sleep(0.002)], None)
        interleave([fast, slow], 1e-3)
        assert len(fast.samples) == len(slow.samples) >= MIN_TURNS
        assert 0 < min(fast.samples) < 0.001 < 0.002 <= min(slow.samples)

    def test_copies_are_taken_in_turn(self):
        seen = []
        turns = Turns([lambda x, i=i: seen.append(i) for i in range(3)], None)
        turns.turn()
        assert seen[:7] == [0, 1, 2, 0, 1, 2, 0]


class TestFiles:
    def test_round_trip(self, results, tmp_path):
        path, table = results.save(tmp_path)
        assert Results.load(path) == Results.load(tmp_path) == results
        rows = list(csv.DictReader(table.open()))
        assert [float(row["median"]) for row in rows] == [row.median for row in results.rows]
        assert [float(row["fraction"]) for row in rows] == [row.fraction for row in results.rows]
        machine = json.loads(path.read_text())["machine"]
        assert machine["packages"]["torch"] == torch.__version__ and machine["cores"] == os.cpu_count()

    def test_other_files_are_refused(self, tmp_path):
        path = tmp_path / "linear.json"
        for text in ("", "[]", "{}", '{"format": 0}', '{"format": 1, "rows": [{"name": "x"}]}'):
            path.write_text(text)
            with pytest.raises(ValueError, match=r"linear\.json is no file of qkernels bench"):
                Results.load(path)

    def test_compare_finds_a_planted_regression(self, results):
        def scaled(row, factor):
            quartiles = tuple(factor * value for value in row.quartiles)
            return dataclasses.replace(row, median=factor * row.median, quartiles=quartiles)

        steady = [dataclasses.replace(row, quartiles=(row.median * 0.99, row.median * 1.01)) for row in results.rows]
        before = dataclasses.replace(results, rows=steady)
        planted = next(i for i, row in enumerate(steady) if row.ours)
        foreign = next(i for i, row in enumerate(steady) if not row.ours)
        factors = {planted: 1.2, foreign: 1.5, planted + 1: 1.04}
        rows = [scaled(row, factors.get(i, 1.0)) for i, row in enumerate(steady)]
        comparisons = compare(before, dataclasses.replace(results, rows=rows[:-1]))
        assert [item.after for item in comparisons] == rows[:-1]
        assert [item.after for item in regressions(comparisons)] == [rows[planted]]
        assert comparisons[foreign].verdict == "slower" and comparisons[planted + 1].verdict == ""
        backwards = compare(dataclasses.replace(results, rows=rows), before)
        assert backwards[planted].verdict == "faster" and regressions(backwards) == []
        wide = dataclasses.replace(rows[planted], quartiles=(steady[planted].median, 2 * rows[planted].median))
        (item,) = compare(before, dataclasses.replace(results, rows=[wide]))
        assert item.ratio == pytest.approx(1.2) and item.verdict == ""


class TestShapes:
    def test_models_and_shapes(self):
        assert parse_layers("3072x768") == [Layer("3072x768", 3072, 768)]
        found = parse_layers(",".join(MODELS))
        assert {(layer.n, layer.k) for layer in found} >= {(11008, 4096), (14336, 4096), (3072, 768), (2048, 640)}
        assert len({(layer.n, layer.k) for layer in found}) == len(found)

    def test_large_results_move_to_bfloat16_where_it_is_fast(self):
        plan = suite.Plan("4096x8", rows=(2048, 2049), schemes=(), threads=(1,), overhead=False)
        assert [c.dtype for c in plan.cases(fast_bf16=True)] == ["float32", "bfloat16"]
        assert {c.dtype for c in plan.cases(fast_bf16=False)} == {"float32"}

    def test_candidates_are_chosen_by_name(self):
        plan = suite.Plan("32x64", (1,), ("w8a8", "w4a8-g32"), only=("w4*", "torch bfloat16"))
        assert [candidate.name for candidate in plan.candidates(case())] == ["w4a8-g32", "torch bfloat16"]
        assert suite.Plan("32x64", (1,), ("w8a8",), only=("none",)).candidates(case()) == []


class TestConsole:
    def test_roofline(self):
        result = invoke("bench", "roofline", "--threads", "1", "--seconds", 0.05)
        assert result.exit_code == 0, result.output
        assert "dram" in result.stdout and all(probe in result.stdout for probe in _native.peak_probes())

    def test_linear_then_compare(self, tmp_path, monkeypatch):
        monkeypatch.setattr(suite, "ROOFLINE_SECONDS", 0.1)
        options = ("--layers", "16x32", "-m", "1,2", "--schemes", "w8a8", "--threads", 1, "--seconds", 0.001)
        result = invoke("bench", "linear", *options, "--no-overhead", "--output", tmp_path)
        assert result.exit_code == 0, result.output
        assert "forward 2 x 16 x 32, warm, 1 threads" in result.stdout and "torch float32" in result.stdout
        assert (tmp_path / "16x32-forward-warm-1t.png").read_bytes().startswith(b"\x89PNG")
        loaded = Results.load(tmp_path)
        assert {row.m for row in loaded.rows} == {1, 2}
        same = invoke("bench", "compare", tmp_path, tmp_path / "linear.json")
        assert same.exit_code == 0 and "1.00" in same.stdout
        slow = [dataclasses.replace(row, median=3 * row.quartiles[1], quartiles=(2 * row.quartiles[1],) * 2)
                for row in loaded.rows]  # fmt: skip
        dataclasses.replace(loaded, rows=slow).save(tmp_path / "slow")
        worse = invoke("bench", "compare", tmp_path, tmp_path / "slow")
        assert worse.exit_code == 1 and worse.stdout.count("slower: w8a8, forward") == 2

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--layers", "gpt9"), "layers must be models (gpt2"),
            (("--schemes", "int8"), "unknown scheme 'int8'"),
            (("--directions", "back"), "directions must be forward or grad-input, got back"),
            (("--weights", "hot"), "weights must be warm or cold, got hot"),
            (("-m", "1,x"), "rows must be positive numbers"),
            (("--threads", "0"), "threads must be positive numbers"),
            (("--seconds", "0"), "seconds must be positive"),
        ],
    )
    def test_bad_input(self, tmp_path, options, words):
        assert_refused(invoke("bench", "linear", "--output", tmp_path, *options), words)

    def test_compare_of_what_is_no_result(self, tmp_path):
        assert_refused(invoke("bench", "compare", tmp_path, tmp_path), "is no file of qkernels bench linear")


class TestGpu:
    """What needs no GPU of the suite for one; `pytest -m gpu` runs the rest."""

    def test_candidates(self):
        plan = suite.Plan(layers="32x64", rows=(1,), schemes=("w8a8",), peers=True, compiled=True, device="cuda")
        names = [candidate.name for candidate in plan.candidates(case())]
        assert names == [
            "w8a8", "torch float32", "torch bfloat16", "torch bfloat16 compiled", "torch._int_mm, bare", "torchao int8",
            "torchao int4", "bitsandbytes nf4", "bitsandbytes int8", "gemlite int8", "gemlite int4",
        ]  # fmt: skip
        for candidate in gpu.peers(case()):
            reason = candidate.unavailable()
            assert reason is None or isinstance(reason, str)

    def test_bfloat16_is_timed_whatever_the_cpu(self):
        rows, reasons = suite.run_case([gpu.BFloat16(case())], ROUND, 1e-3)
        assert [row.name for row in rows] == ["torch bfloat16"] and not reasons

    def test_the_device_is_waited_for(self):
        waited = []
        Turns([lambda x: None], None, finish=lambda: waited.append(1)).turn()
        assert len(waited) >= 4  # around each timed burst, of which there are at least two

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_is_refused(self, tmp_path):
        result = invoke("bench", "linear", "--device", "cuda", "--output", str(tmp_path / "bench"))
        assert_refused(result, "--device cuda", "no GPU")
        assert not list(tmp_path.iterdir())
