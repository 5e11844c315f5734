"""What `finetune` leaves on the disk: whole results or the former ones, after errors, signals and a full disk too."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TEXT, assert_refused, invoke

from qkernels.finetune import InputError
from qkernels.finetune.output import RECORD, OutputFolder, read_record, remove_interrupted

pytest.importorskip("transformers")

from qkernels.finetune.loop import Recorder

SIZE = ("--seq-len", 16, "--lora-rank", 2, "--dtype", "float32", "--lr", "1e-2", "--eval-blocks", 3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(model: Path, text: Path, output: Path, *more: object):
    return invoke("finetune", model, "--text", text, "--output", output, *SIZE, *more)


def command(model: Path, text: Path, output: Path, *more: object) -> list[str]:
    arguments = ("finetune", model, "--text", text, "--output", output, *SIZE, *more)
    return [sys.executable, "-m", "qkernels", *map(str, arguments)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "report.json").read_text())["losses"]


def signal_at(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Let this process get a real signal in the middle of a training step."""
    begin = Recorder.on_step_begin

    def on_step_begin(self, args, state, control, **more):
        begin(self, args, state, control, **more)
        if state.global_step == step - 1:
            signal.raise_signal(number)

    monkeypatch.setattr(Recorder, "on_step_begin", on_step_begin)


class TestReplacing:
    def test_files_of_another_method_go_and_those_of_the_user_stay(self, llama, text, tmp_path):
        output = tmp_path / "run"
        assert run(llama, text, output, "--steps", 2).exit_code == 0
        assert (output / "adapter_config.json").is_file()
        (output / "notes").mkdir()
        (output / "notes" / "mine.txt").write_text("precious")
        result = run(llama, text, output, "--steps", 2, "--method", "full", "--scheme", "none")
        assert result.exit_code == 0, result.output
        assert not list(output.glob("adapter*"))
        assert (output / "notes" / "mine.txt").read_text() == "precious"
        assert set(read_record(output)["files"]) == set(contents(output)) - {"notes/mine.txt"}
        assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "text.txt"]
        again = run(llama, text, output, "--steps", 2)
        assert again.exit_code == 0, again.output
        assert not (output / "model.safetensors").exists() and not (output / "config.json").exists()
        assert (output / "notes" / "mine.txt").read_text() == "precious"

    def test_folder_of_a_version_without_a_record(self, llama, text, tmp_path):
        output = tmp_path / "run"
        assert run(llama, text, output, "--steps", 1).exit_code == 0
        (output / RECORD).unlink()
        (output / "mine.txt").write_text("precious")
        assert run(llama, text, output, "--steps", 1, "--method", "full", "--scheme", "none").exit_code == 0
        assert not list(output.glob("adapter*")) and (output / "mine.txt").read_text() == "precious"

    def test_weights_that_no_run_wrote_are_not_replaced(self, llama, text, tmp_path):
        output = tmp_path / "run"
        assert run(llama, text, output, "--steps", 1).exit_code == 0
        (output / "model.safetensors").write_bytes(b"merged by hand")
        before = contents(output)
        assert_refused(run(llama, text, output, "--steps", 1), "model.safetensors", "no run of finetune wrote")
        assert contents(output) == before

    def test_model_beside_an_adapter_is_not_loaded(self, llama, text, tmp_path):
        output = tmp_path / "run"
        assert run(llama, text, output, "--steps", 1).exit_code == 0
        both = shutil.copytree(llama, tmp_path / "both")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(output / name, both)
        assert_refused(invoke("eval", both, text, "--seq-len", 16), "both a model and an adapter")

    def test_link_to_a_folder_stays_a_link(self, llama, text, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        assert run(llama, text, tmp_path / "link", "--steps", 1).exit_code == 0
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / RECORD).is_file()

    def test_killed_while_it_replaced(self, tmp_path):
        former = tmp_path / "run.replaced"
        former.mkdir()
        (former / RECORD).write_text(json.dumps({"finished": True, "files": [RECORD]}))
        (former / "mine.txt").write_text("precious")
        with pytest.raises(RuntimeError, match="stop"), OutputFolder(tmp_path / "run"):
            raise RuntimeError("stop")
        assert sorted(contents(tmp_path)) == ["run/mine.txt", f"run/{RECORD}"]


class TestUnusableOutput:
    """Noticed before the model, which does not exist, is looked at or text is read."""

    @pytest.mark.parametrize("name", ["text.txt", "text.txt/run"])
    def test_not_a_folder(self, llama, text, tmp_path, name, monkeypatch):
        monkeypatch.setattr("qkernels.finetune.train.load_model", None)  # calling it would fail
        assert_refused(run(llama, text, tmp_path / name), "text.txt")

    def test_not_writable(self, llama, text, monkeypatch):
        monkeypatch.setattr("qkernels.finetune.train.load_model", None)
        assert_refused(run(llama, text, Path("/proc/run")), "cannot write to /proc")

    def test_current_folder(self, llama, text, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert_refused(run(llama, text, Path(".")), "current folder", "run")

    def test_in_use(self, llama, text, tmp_path):
        with OutputFolder(tmp_path / "run"):
            assert_refused(run(llama, text, tmp_path / "run"), "another run is writing")
        assert not (tmp_path / "run.unfinished").exists()

    def test_scratch_folder_of_something_else(self, llama, text, tmp_path):
        (tmp_path / "run.unfinished").mkdir()
        (tmp_path / "run.unfinished" / "mine.txt").write_text("precious")
        assert_refused(run(llama, text, tmp_path / "run"), "run.unfinished", "in the way")
        assert (tmp_path / "run.unfinished" / "mine.txt").read_text() == "precious"

    def test_damaged_record(self, llama, text, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / RECORD).write_text("{")
        assert_refused(run(llama, text, tmp_path / "run"), RECORD, "not JSON")

    def test_disk_smaller_than_the_results(self, llama, text, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
        assert_refused(run(llama, text, tmp_path / "run"), "only 0 MB are free")
        assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


class TestFullDisk:
    """Files of a process are limited to less than the adapter takes: the write fails as it does on a full disk."""

    LIMIT = 3 << 20
    LARGE = ("--lora-rank", 2000, "--steps", 2)

    def limited(self, arguments: list[str]) -> subprocess.CompletedProcess:
        limit = (resource.RLIMIT_FSIZE, (self.LIMIT, self.LIMIT))
        return subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(*limit),
        )

    def test_one_line_nothing_left_and_the_same_command_works_again(self, llama, text, tmp_path):
        output = tmp_path / "run"
        arguments = command(llama, text, output, *self.LARGE)
        for former in (False, True):
            if former:
                assert run(llama, text, output, "--steps", 1).exit_code == 0
            before = contents(output)
            done = self.limited(arguments)
            assert done.returncode == 2, done.stderr
            assert "Traceback" not in done.stderr
            assert done.stderr.splitlines()[-1].startswith(f"error: cannot write to {output}")
            assert contents(output) == before
            assert not (tmp_path / "run.unfinished").exists()
        assert run(llama, text, output, *self.LARGE).exit_code == 0
        assert (output / "adapter_model.safetensors").stat().st_size > self.LIMIT

    def test_checkpoint_that_does_not_fit(self, llama, text, tmp_path):
        """Weights fit, and the optimizer's state does not."""
        output = tmp_path / "run"
        done = self.limited(command(llama, text, output, "--lora-rank", 500, "--steps", 2, "--save-steps", 1))
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"error: cannot write to {output}")
        assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


class TestLossNotFinite:
    def test_stops_and_keeps_the_former_adapter(self, llama, text, tmp_path):
        output = tmp_path / "run"
        assert run(llama, text, output, "--steps", 1).exit_code == 0
        before = contents(output)
        for more, words in {(): ["a lower --lr"], ("--save-steps", 1): ["a lower --lr", "1 steps are kept"]}.items():
            result = run(llama, text, output, "--steps", 9, *more, "--lr", 1e30, "--warmup-steps", 0)
            assert_refused(result, "training loss is nan at step 2", *words)
            assert contents(output) == before

    def test_one_step_whose_weights_are_not_finite(self, llama, text, tmp_path):
        result = run(llama, text, tmp_path / "run", "--steps", 1, "--lr", 1e39, "--warmup-steps", 0)
        assert_refused(result, "not finite after step 1")
        assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]

    def test_model_that_is_not_finite(self, llama, text, tmp_path):
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(llama)
        model.model.norm.weight.data[0] = torch.nan
        broken = shutil.copytree(llama, tmp_path / "broken")
        model.save_pretrained(broken)
        assert_refused(run(broken, text, tmp_path / "run", "--steps", 1), "perplexity of the float model is nan")


KINDS = {
    "lora": ("--grad-dtype", "int8", "--lora-dropout", 0.1, "--eval-steps", 2),
    "calibrated": ("--scheme", "w4a8-g32-asym", "--calibration-blocks", 2, "--smooth"),
    "float": ("--method", "full", "--scheme", "none"),
    "qat": ("--method", "full", "--mode", "qat", "--grad-dtype", "int8", "--grad-accumulation", 2),
    "learned": ("--method", "full", "--mode", "qat", "--weight-scale", "learned"),
    "int8": ("--method", "full", "--mode", "int8", "--grad-dtype", "int8"),
}


class TestResume:
    @pytest.mark.parametrize("kind", KINDS)
    def test_interrupted_and_resumed_is_bit_identical(self, llama, text, tmp_path, monkeypatch, kind):
        options = (*KINDS[kind], "--steps", 5, "--batch-size", 2)
        whole, output = tmp_path / "whole", tmp_path / "run"
        assert run(llama, text, whole, *options).exit_code == 0
        with monkeypatch.context() as patch:
            signal_at(patch, 3)
            stopped = run(llama, text, output, *options)
        assert stopped.exit_code == 130, stopped.output
        assert "interrupted after step 3 of 5" in stopped.stderr and "--resume" in stopped.stderr
        assert losses(output) == losses(whole)[:3] and (output / "checkpoint-3").is_dir()
        model = (llama, "--adapter", output) if kind in ("lora",) else (output / "base", "--adapter", output)
        model = (output,) if "full" in options else model
        assert invoke("generate", *model, "--prompt", "the", "--max-new-tokens", 2).exit_code == 0
        assert_refused(run(llama, text, output, *options), "interrupted run (3 steps done)", "--resume")

        resumed = run(llama, text, output, *options, "--resume")
        assert resumed.exit_code == 0, resumed.output
        assert losses(output) == losses(whole)
        assert weights(output) == weights(whole) != {}
        curve, expected = (json.loads((path / "report.json").read_text())["held_out_curve"] for path in (output, whole))
        assert curve == expected and [step for step, _ in curve] == ([0, 2, 4, 5] if kind == "lora" else [0, 5])
        assert set(contents(output)) == set(contents(whole))

    def test_killed_and_resumed(self, llama, text, tmp_path):
        whole, output = tmp_path / "whole", tmp_path / "run"
        options = ("--steps", 12, "--save-steps", 2)
        assert run(llama, text, whole, *options).exit_code == 0
        assert not list(whole.glob("checkpoint*"))
        with subprocess.Popen(command(llama, text, output, *options), stderr=subprocess.PIPE) as process:
            wait_for(process, lambda: list((tmp_path / "run.unfinished").glob("checkpoint-*")))
            process.kill()
        assert not output.exists()
        assert_refused(run(llama, text, output, *options), "run.unfinished", "--resume")
        resumed = run(llama, text, output, *options, "--resume")
        assert resumed.exit_code == 0, resumed.output
        assert weights(output) == weights(whole) and losses(output) == losses(whole)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "text.txt", "whole"]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_to_a_process(self, llama, text, tmp_path, number):
        output = tmp_path / "run"
        arguments = command(llama, text, output, "--steps", 500)
        with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            for line in iter(lambda: process.stderr.read(1), ""):  # the bar ends its lines by \r
                if line == "=":  # loss=
                    break
            process.send_signal(number)
            _, errors = process.communicate(timeout=120)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors and "stopping after this step" in errors
        record = read_record(output)
        assert not record["finished"] and 0 < record["steps_done"] < 500
        assert len(losses(output)) == record["steps_done"]
        assert (output / "adapter_model.safetensors").is_file()

    def test_a_finished_run_is_not_replaced_by_an_interrupted_one(self, llama, text, tmp_path, monkeypatch):
        output, whole = tmp_path / "run", tmp_path / "whole"
        assert run(llama, text, output, "--steps", 2).exit_code == 0
        before, options = contents(output), ("--steps", 4, "--seed", 7)
        with monkeypatch.context() as patch:
            signal_at(patch, 2, signal.SIGTERM)
            stopped = run(llama, text, output, *options)
        assert stopped.exit_code == 130 and "run.unfinished" in stopped.stderr
        assert contents(output) == before
        assert run(llama, text, output, *options, "--resume").exit_code == 0
        assert run(llama, text, whole, *options).exit_code == 0
        assert weights(output) == weights(whole)

    def test_interrupted_again_and_in_the_last_step(self, llama, text, tmp_path, monkeypatch):
        output, options = tmp_path / "run", ("--steps", 4)
        assert run(llama, text, tmp_path / "whole", *options).exit_code == 0
        for step in (1, 3):
            with monkeypatch.context() as patch:
                signal_at(patch, step)
                assert run(llama, text, output, *options, *(["--resume"] if step > 1 else [])).exit_code == 130
            assert [p.name for p in output.glob("checkpoint-*")] == [f"checkpoint-{step}"]
        with monkeypatch.context() as patch:
            signal_at(patch, 4)
            last = run(llama, text, output, *options, "--resume")
        assert last.exit_code == 130 and "before the evaluation" in last.stderr
        assert read_record(output)["finished"] and weights(output) == weights(tmp_path / "whole")
        assert_refused(run(llama, text, output, *options, "--resume"), "nothing to resume", "finished")

    def test_two_signals_stop_at_once(self, llama, text, tmp_path, monkeypatch):
        begin = Recorder.on_step_begin

        def twice(self, *args, **more):
            begin(self, *args, **more)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Recorder, "on_step_begin", twice)
        result = run(llama, text, tmp_path / "run", "--steps", 4)
        assert result.exit_code == 130 and "nothing was saved" in result.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]

    def test_all_steps_done_but_not_saved(self, llama, text, tmp_path, monkeypatch):
        """As after a full disk at the end: the last checkpoint is there, the results are not."""
        output, options = tmp_path / "run", ("--steps", 4, "--save-steps", 2)
        assert run(llama, text, tmp_path / "whole", *options).exit_code == 0
        with monkeypatch.context() as patch:
            patch.setattr("qkernels.finetune.train.write_report", lambda *_: os.close(-1))  # an OSError
            failed = run(llama, text, output, *options)
        assert_refused(failed, "cannot write", "4 steps are kept", "--resume")
        resumed = run(llama, text, output, *options, "--resume")
        assert resumed.exit_code == 0, resumed.output
        assert weights(output) == weights(tmp_path / "whole") and losses(output) == losses(tmp_path / "whole")

    def test_other_settings_are_refused(self, llama, text, tmp_path, monkeypatch):
        output, options = tmp_path / "run", ("--steps", 4)
        assert_refused(run(llama, text, output, *options, "--resume"), "nothing to resume", "no checkpoint")
        signal_at(monkeypatch, 2)
        assert run(llama, text, output, *options).exit_code == 130
        before = contents(output)
        for more, words in {
            ("--lr", "0.5"): ["--lr is 0.01, not 0.5"],
            ("--steps", "8"): ["--steps is 4, not 8"],
            ("--grad-dtype", "int8"): ["--grad-dtype is float, not int8"],
        }.items():
            assert_refused(run(llama, text, output, *options, *more, "--resume"), *words)
        text.write_text(TEXT + "more of it. " * 40)
        assert_refused(run(llama, text, output, *options, "--resume"), "the text has changed")
        text.write_text(TEXT)
        (output / "checkpoint-2" / "progress.json").write_text("{}")
        assert_refused(run(llama, text, output, *options, "--resume"), "progress.json is damaged")
        (output / "checkpoint-2" / "progress.json").write_bytes(before["checkpoint-2/progress.json"])
        assert contents(output) == before


def wait_for(process: subprocess.Popen, ready, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


class TestOutputFolder:
    def test_only_an_interrupted_run_is_removed(self, tmp_path):
        for name in ("run", "run.unfinished", "other"):
            (tmp_path / name).mkdir()
        (tmp_path / "run.unfinished" / "checkpoint-3").mkdir()
        for name in ("run", "other", "absent"):
            remove_interrupted(tmp_path / name)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]

    def test_error_after_creating_leaves_nothing(self, tmp_path):
        with pytest.raises(InputError, match="stop"), OutputFolder(tmp_path / "run") as output:
            (output.scratch / "half").write_text("")
            raise InputError("stop")
        assert not list(tmp_path.iterdir())
