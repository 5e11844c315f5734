"""A folder that is written whole: what is not finished lies beside it, and may be gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .safetensors_writer import LOG

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FINGERPRINT = ".fingerprint"


def fingerprint(parts: object) -> str:
    """A text for what JSON can hold: equal for equal parts, and for nothing else that is likely."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def identity_of(paths: Iterable[Path]) -> str:
    """A text that changes when a file is another, or is written again: from paths, sizes and times, nothing is read."""
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    stats = [(file.resolve(), file.stat()) for file in files]
    return fingerprint([(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats])


@contextmanager
def written_whole(path: Path, identity: str | None = None) -> Iterator[Path]:
    """A folder to write to, which becomes `path` at the end.

    After an error that the same call would meet again, nothing is left. A killed process, Ctrl-C and a full disk leave
    the folder `.NAME.partial` if there is an identity: the next call with the same one is given it again.

    Args:
        path: of the folder.
        identity: of all that is written; None: what is there is not gone on with.

    Raises:
        FileExistsError: if `path` is there and not an empty folder, or if another process is writing it.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(17, "is there already; remove it, or name another", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.mkdir(exist_ok=True)
    with _locked(scratch, path):
        if identity is None or not (scratch / LOG).exists() or _read(scratch / _FINGERPRINT) != identity:
            _empty(scratch)
            if identity is not None:
                (scratch / _FINGERPRINT).write_text(identity)
        try:
            yield scratch
            (scratch / _FINGERPRINT).unlink(missing_ok=True)
            if path.exists():
                path.rmdir()
            scratch.rename(path)
        except BaseException as error:
            again = isinstance(error, Exception) and not isinstance(error, OSError | MemoryError)
            kept = not again and identity is not None and (scratch / LOG).exists()
            if not kept:
                shutil.rmtree(scratch, ignore_errors=True)
            if not again:
                left = (
                    f"{scratch} has what is done, and the same call goes on from there" if kept else "nothing is left"
                )
                warnings.warn(f"{path} is not written; {left}", stacklevel=4)
            raise


@contextmanager
def _locked(scratch: Path, path: Path) -> Iterator[None]:
    """Hold a folder against other processes."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(17, "is being written by another process", str(path)) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> str | None:
    return path.read_text(errors="replace") if path.is_file() else None


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
