"""The demo: what it chooses to do, what it measures on a tiny model, and what it shows."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, invoke

pytest.importorskip("transformers")

from rich.console import Console

from qkernels.finetune import demo, demo_report
from qkernels.finetune.demo import (
    FULL,
    INT4,
    INT8,
    MOST_EVAL_BLOCKS,
    MOST_STEPS,
    SMALLEST,
    Machine,
    choose,
    write_texts,
)
from qkernels.finetune.demo_job import Job, run

SCHEMES = ["none", INT8, INT4]


def row(name: str, quantized: float | None, finetuned: float) -> dict:
    return {
        "configuration": name,
        "perplexity_float": 20.0,
        "perplexity_quantized": quantized,
        "perplexity_finetuned": finetuned,
    }


ROWS = [row("float32", None, 16.0), row(INT8, 20.6, 16.2), row(INT4, 22.0, 17.5), row("w8a8-ag128", 20.1, 16.0)]


class TestTexts:
    def test_are_deterministic_and_do_not_overlap(self, tmp_path):
        (tmp_path / "again").mkdir()
        first, second = write_texts(tmp_path), write_texts(tmp_path / "again")
        assert [p.read_text("utf-8") for p in first] == [p.read_text("utf-8") for p in second]
        train, held_out = ({p for p in path.read_text("utf-8").split("\n\n") if p.strip()} for path in first)
        assert not train & held_out
        assert min(sum(map(len, part)) for part in (train, held_out)) > 20_000


class TestPlan:
    @pytest.mark.parametrize("token", [1e-4, 1e-3, 5e-3, 1e-2, 2e-2])
    @pytest.mark.parametrize("seconds", [60, 120, 180, 600])
    def test_fits_the_time_or_is_the_least(self, token, seconds):
        machine = Machine(8, token, token / 2, 20 * token)
        budget, schemes = choose(machine, seconds, SCHEMES)
        total = sum(machine.configuration_seconds(budget, scheme) for scheme in schemes)
        assert total <= seconds or (schemes, budget) == (["none", INT8], SMALLEST)
        assert SMALLEST.steps <= budget.steps <= MOST_STEPS
        assert SMALLEST.eval_blocks <= budget.eval_blocks <= MOST_EVAL_BLOCKS

    def test_more_time_is_used(self):
        machine = Machine(8, 0.005, 0.002, 0.1)
        plans = [choose(machine, seconds, SCHEMES) for seconds in (60, 120, 240, 480)]
        steps = [budget.steps for budget, _ in plans]
        assert [len(schemes) for _, schemes in plans] == [2, 3, 3, 3]
        assert steps == sorted(steps) and steps[-1] > steps[1]

    def test_remaining_time_follows_what_was_taken(self, tmp_path):
        job = object.__new__(demo.Demo)
        job.seconds, job.budget, job.expected = 180, FULL, {"none": 50.0, INT8: 40.0}
        assert job.progress([("", "none", ""), ("", INT8, "")]) == "40 steps, about 1:30 left"
        job.adjust("none", 100)
        assert job.progress([("", INT8, "")]) == "40 steps, about 1:20 left"


class TestJob:
    """Jobs on a tiny model in this process: the float model, itself again, and a quantized one."""

    @pytest.fixture
    def reports(self, llama, tmp_path):
        torch.set_num_threads(1)
        text = tmp_path / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60)

        def report(scheme: str, references: Path) -> dict:
            settings = {
                "model": str(llama),
                "text": [str(text)],
                "eval_text": [],
                "output": str(tmp_path / scheme),
                "cache": str(tmp_path),
                "scheme": scheme,
                "dtype": "float32",
                "steps": 2,
                "eval_blocks": 3,
                "seq_len": 16,
                "baseline": scheme == "none",
            }
            return run(Job(settings, str(references), prompt=[5, 6, 7], new_tokens=4))

        return {scheme: report(scheme, tmp_path) for scheme in ("none", INT8, "w4a8")}

    def test_divergence_generation_and_the_results_of_finetune(self, reports):
        assert reports["none"]["kl_divergence"] == {}
        small, large = (reports[scheme]["kl_divergence"] for scheme in (INT8, "w4a8"))
        for stage in ("quantized", "finetuned"):
            assert 0 < small[stage] < large[stage] < 1
        for report in reports.values():
            assert len(report["before"]) == 3 + 4 and report["generated_tokens_per_second"] > 0
            assert len(report["losses"]) == 2 and report["perplexity"]["finetuned"] > 1
        assert "after" in reports[INT8] and "after" not in reports["none"]

    def test_rows_and_table(self, reports):
        rows = [demo_report.table_row(name, run, reports["none"], "", 16) for name, run in reports.items()]
        assert rows[0]["kl_quantized"] is None and rows[0]["speedup"] == 1
        assert rows[1]["perplexity_float"] == reports["none"]["perplexity"]["float"]
        assert rows[1]["train_tokens_per_second"] == 16 / reports[INT8]["seconds_per_step"]
        assert all(len(demo_report.cells(row)) == len(demo_report.COLUMNS) for row in rows)


class TestReport:
    def test_checks_compare_with_the_limits(self):
        result = {item["check"]: item for item in demo_report.checks(ROWS, "float32", learned=True)}
        assert [name for name, item in result.items() if not item["ok"]] == [
            "w4a8-g32-asym, fine-tuned, over fine-tuned float32"
        ]
        assert result["w8a8, quantized, over float"]["value"] == pytest.approx(0.03)
        assert result["w8a8, change by fine-tuning"]["value"] == pytest.approx(16.2 / 20.6 - 1)
        short = demo_report.checks(ROWS[:2], "float32", learned=False)
        assert [item["check"] for item in short] == ["w8a8, quantized, over float"]

    def test_table_fits_a_terminal_of_80_columns_and_nothing_is_cut(self):
        report = self.report()
        file = io.StringIO()
        demo_report.show(report, Console(file=file, width=80, markup=False, highlight=False))
        lines = file.getvalue().splitlines()
        (line,) = [line for line in lines if line.strip().startswith(INT4)]
        assert line.split() == demo_report.cells(report["rows"][1])
        assert not any("…" in line for line in lines)

    def test_markdown_and_picture(self, tmp_path):
        pytest.importorskip("matplotlib")
        text = demo_report.markdown(self.report())
        assert f"| {INT4} | GPTQ | 0.1351 |" in text and "qkernels explain" in text
        assert demo_report.draw_bars(tmp_path / "demo.png", self.report())
        assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"

    def report(self) -> dict:
        common = {"perplexity_float": 31.01, "perplexity_finetuned": 130.40, "train_tokens_per_second": 1194.0}
        common |= {"generated_tokens_per_second": 125.1, "peak_memory_bytes": 3.3e9, "model_bytes": 1.07e9}
        quantized = {
            "prepared": "GPTQ",
            "kl_quantized": 0.13506,
            "kl_finetuned": 0.1657,
            "perplexity_quantized": 132.57,
        }
        rows = [{"configuration": "float32"} | common, {"configuration": INT4} | common | quantized]
        return {
            "budget": vars(FULL),
            "environment": {"cpu": "a CPU", "threads": 2, "isa": "avx2"},
            "note": "a note",
            "rows": rows,
            "checks": [],
            "samples": {"prompt": "p"},
            "next": ["qkernels explain demo"],
        }


def test_foreign_output_folder_is_refused(tmp_path):
    (tmp_path / "mine.doc").write_text("precious")
    assert_refused(invoke("demo", "--output", tmp_path), "something else")


def test_next_commands_are_commands_of_ours(tmp_path):
    job = object.__new__(demo.Demo)
    job.output = job.cache = tmp_path
    for line in job.next_commands():
        command, *options = shlex.split(line.split(" -m qkernels ")[-1].removeprefix("qkernels "))
        usage = invoke(command, "--help").stdout
        assert all(option in usage for option in options if option.startswith("--")), line
