"""JSON files: written whole or not at all, and refused with one line when they hold something else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write(path: Path, content: Any, *, indent: int = 1, sort_keys: bool = False) -> None:
    """Replace the file by one that holds `content`; after an error it is what it was.

    Raises:
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(path)
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=indent, sort_keys=sort_keys) + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def expect_writable(path: Path) -> None:
    """Find out, before anything is measured, whether `write` could write the file.

    Raises:
        OSError: if not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _scratch(path).touch()
    _scratch(path).unlink()


def read(path: Path, *, program: str, version: int) -> dict[str, Any]:
    """The object that a file holds, whose entry "format" is `version`.

    Args:
        path: the file.
        program: what writes such files, for the error.
        version: of the file format.

    Raises:
        ValueError: if the file cannot be read or holds something else; the message names file, program and reason.
    """
    with describing(path, program):
        content = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError("it states no format")
        if content["format"] != version:
            raise ValueError(f"its format is {content['format']!r}, not {version}")
    return content


@contextmanager
def describing(path: Path, program: str) -> Iterator[None]:
    """Turn what goes wrong while the contents of a file are taken apart into a `ValueError` that names the file."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no file of {program}: {reason}") from error


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
