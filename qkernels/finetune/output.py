"""The folder a run writes to: it is replaced as a whole, or left as it was.

All is written to `NAME.unfinished` beside the output folder NAME, which takes its place by renaming at the end. What an
interrupted run leaves can be resumed: its checkpoint is a folder `checkpoint-STEP` in `NAME.unfinished`, or in NAME if
no finished run is there. The file `qkernels.json` of a folder lists the files that a run wrote; a later run removes
these and no others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..system import json_file
from .errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

RECORD = "qkernels.json"
CHECKPOINT = "checkpoint-"
# Below the output, the quantized base model, where it depends on the text.
BASE = "base"
_UNFINISHED, _REPLACED, _SAVING = ".unfinished", ".replaced", "saving"
_PROBE_BYTES = 1 << 20
# What a run may write at the top of its folder. Versions before qkernels.json wrote no list of their files.
_OURS = (
    "adapter_*", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*", "report.json",
    "report.md", "README.md", "loss.png", RECORD, BASE, CHECKPOINT + "*",
)  # fmt: skip
_FORMER_REPORT = "report.json"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `qkernels.json` in a folder says about the run that wrote it; None if there is no such file.

    Raises:
        InputError: if the file cannot be read.
    """
    path = folder / RECORD
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    try:
        record = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("files"), list):
        raise InputError(f"{path} is not a record of qkernels finetune: it lists no files")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `qkernels.json`, whole or not at all."""
    json_file.write(folder / RECORD, record, indent=2)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what libraries raise when a file cannot be written into an `InputError` that names `folder`."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        raise InputError(f"cannot write to {folder}: {reason} ({free / 1e6:.0f} MB are free there)") from error


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps in a folder; one under construction has another name."""
    found = [path for path in folder.glob(CHECKPOINT + "*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
    return max(found, key=checkpoint_step, default=None)


def remove_interrupted(path: Path) -> None:
    """Remove what an interrupted run into the folder `path` has left, if there is such a run."""
    for folder in (path, path.with_name(path.name + _UNFINISHED)):
        if latest_checkpoint(folder) is not None:
            shutil.rmtree(folder)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


class OutputFolder:
    """The output of one run; a context manager that removes what an error leaves half-written.

    Args:
        path: the folder of the results: new, empty, or of a former run.
        resume: go on with the interrupted run there.

    Attributes:
        path: the folder, links resolved.
        scratch: where to write; exists inside the `with` block.
        checkpoint: the checkpoint to resume from, or None.
        published: whether `scratch` has become `path`.

    Raises:
        InputError: if the folder cannot be written, holds files of something else, holds an interrupted run and
            `resume` is false, or holds none and it is true. Nothing is changed then.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path.resolve()
        self.scratch = self.path.with_name(self.path.name + _UNFINISHED)
        self._replaced = self.path.with_name(self.path.name + _REPLACED)
        self._resume = resume
        self._lock: int | None = None
        self.published = False
        self._check_place(path)
        self._check_contents()
        self.checkpoint = self._find_checkpoint()

    def _check_place(self, given: Path) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output {str(given)!r} is a file; give a folder")
        cwd = Path.cwd()
        if self.path == cwd or self.path in cwd.parents or self.path.is_mount():
            what = "is a mount point" if self.path.is_mount() else "is or holds the current folder"
            raise InputError(
                f"output {str(given)!r} {what}, and the output folder is replaced as a whole; give a folder in it, "
                f"such as {str(given / 'run')!r}"
            )
        if self.path.is_dir() and not os.access(self.path, os.W_OK | os.X_OK):
            raise InputError(f"cannot write to output folder {str(given)!r}: permission denied")

    def _check_contents(self) -> None:
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if read_record(self.path) is None and not self._is_older_run():
            raise InputError(
                f"output folder {str(self.path)!r} holds files of something else; give a new or empty folder"
            )
        for path in sorted(self._foreign(self.path)):
            if any(fnmatch(path.parts[0], pattern) for pattern in _OURS):
                raise InputError(
                    f"output folder {str(self.path)!r} holds {str(path)!r}, which no run of finetune wrote and which "
                    "this one might replace; move it away or give another folder"
                )

    def _is_older_run(self) -> bool:
        """Whether a version that wrote no record has written the folder."""
        try:
            report = json.loads((self.path / _FORMER_REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(report, dict) and {"environment", "settings"} <= set(report)

    def _find_checkpoint(self) -> Path | None:
        if self.scratch.exists() and (not self.scratch.is_dir() or read_record(self.scratch) is None):
            if not self.scratch.is_dir() or any(self.scratch.iterdir()):
                raise InputError(f"{self.scratch} is not of finetune and in the way; move it or give another --output")
        found = latest_checkpoint(self.scratch) or latest_checkpoint(self.path)
        if self._resume and found is None:
            record = read_record(self.path) if self.path.is_dir() else None
            finished = record is not None and record.get("finished")
            why = "the run there is finished" if finished else "there is no checkpoint"
            raise InputError(f"nothing to resume in {str(self.path)!r}: {why}; leave out --resume to start anew")
        if found is not None and not self._resume:
            raise InputError(
                f"{found.parent} holds an interrupted run ({checkpoint_step(found)} steps done): go on with --resume, "
                "or remove that folder to start anew"
            )
        return found

    def __enter__(self) -> OutputFolder:
        try:
            self._recover()
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            keep = self.checkpoint if self.checkpoint and self.checkpoint.parent == self.scratch else None
            for path in list(self.scratch.iterdir()):
                if keep is None or (path != keep and path.name not in (RECORD, BASE)):
                    _remove(path)
            if keep is None:  # marks the folder as ours
                write_record(self.scratch, {"finished": False, "files": []})
            probe = self.scratch / "probe"
            with probe.open("wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as error:
            self._discard()
            raise InputError(f"cannot write to {self.scratch.parent}: {error.strerror or error}") from error
        return self

    def __exit__(self, kind: Any, error: Any, _traceback: Any) -> None:
        if not self.published:
            self._discard()
        if self._lock is not None:
            os.close(self._lock)

    def _recover(self) -> None:
        """Finish what a killed process has left of `publish`."""
        if not self._replaced.is_dir():
            return
        if not self.path.exists():
            self._replaced.rename(self.path)
        else:
            self._drop_replaced()

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        self._lock = os.open(self.scratch, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise InputError(f"another run is writing to {self.scratch}") from error
        except OSError:  # a file system without locks
            pass

    def _discard(self) -> None:
        """Remove all but checkpoints, and what resuming from them needs."""
        if not self.scratch.is_dir():
            return
        if latest_checkpoint(self.scratch) is None:
            shutil.rmtree(self.scratch, ignore_errors=True)
        else:
            _remove(self.scratch / _SAVING)

    @property
    def resumed_from(self) -> Path | None:
        """The folder of the interrupted run: its record, and its base model if it has one."""
        return self.checkpoint.parent if self.checkpoint else None

    @property
    def saving(self) -> Path:
        """Where a checkpoint is put together; `keep_checkpoint` moves it to its place."""
        return self.scratch / _SAVING

    def reserve(self, count: int) -> None:
        """Refuse to start if the disk has not this many bytes free.

        Raises:
            InputError: with both numbers.
        """
        free = shutil.disk_usage(self.scratch).free
        if free < count:
            raise InputError(
                f"the results of this run take about {count / 1e6:.0f} MB, and only {free / 1e6:.0f} MB are free in "
                f"{self.scratch.parent}"
            )

    def keep_checkpoint(self, folder: Path) -> None:
        """Move a complete checkpoint into its place and remove the one before."""
        _sync(folder)
        kept = self.scratch / folder.name
        _remove(kept)
        folder.rename(kept)
        for path in self.scratch.glob(CHECKPOINT + "*"):
            if path != kept:
                _remove(path)

    def publish(self, record: dict[str, Any]) -> Path:
        """Let the written files take the place of the output folder; a finished run is replaced by a finished one only.

        Args:
            record: for `qkernels.json`; "finished" says whether the run came to its end, "files" is added.

        Returns:
            The folder that now holds the files.

        Raises:
            InputError: if the files cannot be written; the output folder is then as it was.
        """
        with writing(self.path):
            _remove(self.saving)
            if record["finished"]:
                for path in self.scratch.glob(CHECKPOINT + "*"):
                    _remove(path)
            write_record(self.scratch, record | {"files": sorted({*map(str, _files(self.scratch)), RECORD})})
            _sync(self.scratch)
            former = read_record(self.path) if self.path.is_dir() else None
            if not record["finished"] and (self._is_older_run() if former is None else former.get("finished")):
                self.published = True
                return self.scratch
            if self.path.exists():
                self.path.rename(self._replaced)
            try:
                self.scratch.rename(self.path)
            except OSError:
                if self._replaced.exists():
                    self._replaced.rename(self.path)
                raise
            self.published = True
            if self._replaced.exists():
                self._drop_replaced()
        return self.path

    def _drop_replaced(self) -> None:
        """Move what no run wrote into the new folder, and remove the old one."""
        for path in self._foreign(self._replaced):
            target = self.path / path
            if target.exists():
                target = target.with_name(target.name + ".kept")
            target.parent.mkdir(parents=True, exist_ok=True)
            (self._replaced / path).rename(target)
        shutil.rmtree(self._replaced)

    def _foreign(self, folder: Path) -> list[Path]:
        """The files of a folder that no run has written, relative to it."""
        record = read_record(folder)
        if record is not None:
            ours = set(record["files"])
            return [path for path in _files(folder) if str(path) not in ours]
        return [path for path in _files(folder) if not any(fnmatch(path.parts[0], pattern) for pattern in _OURS)]


def _files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Bring the files of a folder to the disk, so that a name never stands for less than its contents."""
    for path in _files(folder):
        with (folder / path).open("rb") as file:
            os.fsync(file.fileno())
