"""A conversion that is stopped: it leaves nothing, or what the next one goes on with, and the result is the same."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qkernels.checkpoints import safetensors_writer
from qkernels.checkpoints.losses import Losses
from qkernels.checkpoints.partial_folder import written_whole
from qkernels.checkpoints.registry import open_checkpoint, parse_target
from qkernels.checkpoints.requantize import requantized
from qkernels.checkpoints.safetensors_writer import LOG, SafetensorsWriter

NAMES = [f"blocks.{i}.up" for i in range(6)]
bf16, TARGET = parse_target("compressed-tensors:bf16")


@pytest.fixture
def source(tmp_path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "in").mkdir()
    save_file({f"{name}.weight": torch.randn(8, 64) for name in NAMES}, tmp_path / "in" / "model.safetensors")
    return tmp_path / "in"


def convert(source: Path, out: Path, stop_at: int | None = None, stop=None, scheme="w4a16-g32"):
    """Write `out`, and raise `stop` after some tensors; the names of those that were read, and what was lost."""
    losses, read = Losses("requantize"), []
    found = open_checkpoint(source, losses)
    changed = requantized(found, dict.fromkeys(NAMES, scheme), losses)
    watched = {}
    for name, layer in changed.layers.items():

        def reader(name=name, inner=layer.reader):
            read.append(name)
            return inner()

        watched[name] = replace(layer, reader=reader)

    def progress(done: int, total: int, name: str) -> None:
        if done == stop_at:
            raise stop

    bf16.write(replace(changed, layers=watched), out, losses, TARGET, progress)
    return read, losses.entries


def assert_same_folder(one: Path, other: Path) -> None:
    assert sorted(f.name for f in one.iterdir()) == sorted(f.name for f in other.iterdir())
    assert all((one / f.name).read_bytes() == f.read_bytes() for f in other.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left"), MemoryError()])
def test_what_was_stopped_goes_on(source, tmp_path, stop):
    _, lost = convert(source, tmp_path / "whole")
    with pytest.warns(UserWarning, match=r"out is not written; .*\.out\.partial has what is done"):
        with pytest.raises(type(stop)):
            convert(source, tmp_path / "out", 4, stop)
    assert not (tmp_path / "out").exists()
    read, entries = convert(source, tmp_path / "out")
    assert read == NAMES[4:] and entries == lost and len(lost) == len(NAMES)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def stopped(source: Path, out: Path, at: int = 4) -> Path:
    with pytest.warns(UserWarning, match="goes on from there"), pytest.raises(KeyboardInterrupt):
        convert(source, out, at, KeyboardInterrupt())
    return out.with_name(f".{out.name}.partial")


def test_what_came_after_the_last_whole_tensor_is_cut_off(source, tmp_path):
    convert(source, tmp_path / "whole")
    partial = stopped(source, tmp_path / "out")
    with (partial / ".0.data").open("ab") as data:
        data.write(b"half a tensor")
    with (partial / LOG).open("ab") as log:
        log.write(b'{"item": "blocks.4.up", "tens')
    read, _ = convert(source, tmp_path / "out")
    assert read == NAMES[4:]
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


def test_data_that_is_missing_is_written_again(source, tmp_path):
    convert(source, tmp_path / "whole")
    partial = stopped(source, tmp_path / "out")
    os.truncate(partial / ".0.data", 700)
    read, _ = convert(source, tmp_path / "out")
    assert read == NAMES[2:]  # of the 308 bytes of a layer, those of two are there
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


def test_another_source_or_scheme_starts_anew(source, tmp_path):
    stopped(source, tmp_path / "out")
    read, _ = convert(source, tmp_path / "out", scheme="w8a16")
    assert read == NAMES and open_checkpoint(tmp_path / "out").layers[NAMES[0]].scheme.name == "w8a16"
    stopped(source, tmp_path / "other")
    time.sleep(0.01)
    save_file({f"{name}.weight": torch.ones(8, 64) for name in NAMES}, source / "model.safetensors")
    read, _ = convert(source, tmp_path / "other")
    assert read == NAMES


def test_values_that_nobody_knows_are_not_gone_on_with(source, tmp_path):
    partial = stopped(source, tmp_path / "out")
    found = replace(open_checkpoint(source), identity=None)

    def progress(*state: object) -> None:
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="out is not written; nothing is left"), pytest.raises(KeyboardInterrupt):
        parse_target("float")[0].write(found, tmp_path / "out", Losses(), progress=progress)
    assert not partial.exists() and not (tmp_path / "out").exists()


def test_an_error_that_would_come_again_leaves_nothing(source, tmp_path):
    with pytest.raises(ValueError, match="damaged"):
        convert(source, tmp_path / "out", 3, ValueError("damaged"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in"]


def test_closing_may_be_stopped_between_files(source, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer.SafetensorsWriter.__init__, "__defaults__", (600, None))
    convert(source, tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    real, calls = SafetensorsWriter._finish, []

    def finish(self, path, *rest):
        calls.append(path.name)
        if len(calls) == 2:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        real(self, path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(SafetensorsWriter, "_finish", finish)
        with pytest.warns(UserWarning, match="goes on from there"), pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out")
    read, _ = convert(source, tmp_path / "out")
    assert read == []
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    with written_whole(tmp_path / "out") as folder:
        (folder / "mine").write_text("x")
        with pytest.raises(FileExistsError, match="is being written by another process"):
            with written_whole(tmp_path / "out"):
                pass
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_name_of_two_tensors(tmp_path):
    writer = SafetensorsWriter(tmp_path)
    writer.add("a", {"a.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"a.weight is the name of two tensors"):
        writer.add("b", {"a.weight": torch.ones(1)})


def convert_and_wait(source: str, out: str) -> None:
    """Print a line after a tensor, and write no other."""

    class Wait(BaseException):
        def __init__(self) -> None:
            print("one", flush=True)
            time.sleep(60)

    convert(Path(source), Path(out), 1, Wait)


@pytest.mark.thorough
def test_a_killed_process_goes_on(source, tmp_path):
    convert(source, tmp_path / "whole")
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_partial_folder as test; "
    command = [sys.executable, "-c", here + "test.convert_and_wait(*sys.argv[1:])", str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout.readline() == "one\n"
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial" / LOG).read_text().count("\n") == 1
    read, _ = convert(source, tmp_path / "out")
    assert read == NAMES[1:]
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


MEASURED = """
    import resource, sys
    from pathlib import Path
    from qkernels.checkpoints.losses import Losses
    from qkernels.checkpoints.registry import open_checkpoint, parse_target
    import numpy  # what the first tensor would import

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    target, suffix = parse_target(sys.argv[3])
    found = open_checkpoint(sys.argv[1])
    before = peak()
    target.write(found, Path(sys.argv[2]), Losses("report"), suffix)
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["compressed-tensors", "qkernels", "float:bf16"])
def test_memory_is_that_of_one_tensor(tmp_path, target):
    torch.manual_seed(0)
    (tmp_path / "in").mkdir()
    weight = torch.randn(1024, 1024)
    floats = {f"{name}.{part}.weight": weight for name in NAMES for part in range(8)}
    save_file({name: t.clone() for name, t in floats.items()}, tmp_path / "in" / "model.safetensors")
    found = open_checkpoint(tmp_path / "in")
    layers = {name.removesuffix(".weight"): "w8a16-g32" for name in floats}
    parse_target("qkernels")[0].write(requantized(found, layers, Losses()), tmp_path / "quantized", Losses())
    script = tmp_path / "measure.py"
    script.write_text(textwrap.dedent(MEASURED))
    command = [sys.executable, str(script), str(tmp_path / "quantized"), str(tmp_path / "out"), target]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = sum(f.stat().st_size for f in (tmp_path / "quantized").iterdir())
    assert size > 48 << 20 and grown < 40 << 20, (size, grown)
