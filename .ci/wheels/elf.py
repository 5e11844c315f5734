"""What a check of a wheel asks of a shared library: its links, symbols and GPU code (needs readelf)."""

from __future__ import annotations

import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

FATBIN_MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class GpuCode:
    """One piece of device code: PTX or machine code for an architecture such as 90, and whether it is compressed."""

    ptx: bool
    arch: int
    compressed: bool


def _readelf(path: Path, *options: str) -> str:
    command = ["readelf", "-W", *options, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={"LC_ALL": "C"}).stdout


def needed(path: Path) -> set[str]:
    """Names of the libraries it links to."""
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf(path, "-d")))


def run_paths(path: Path) -> set[str]:
    """Folders in which the loader looks for them first."""
    found = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", _readelf(path, "-d"))
    return {folder for line in found for folder in line.split(":")}


def undefined_symbols(path: Path) -> list[str]:
    """Mangled names that other libraries have to define, without versions."""
    rows = (line.split() for line in _readelf(path, "--dyn-syms").splitlines())
    return sorted({row[7].split("@")[0] for row in rows if len(row) > 7 and row[6] == "UND"})


def has_debug_info(path: Path) -> bool:
    """Whether it carries sections for a debugger."""
    return ".debug_info" in _readelf(path, "-S")


def gpu_code(path: Path) -> list[GpuCode]:
    """The device code in its fat binaries; empty for a library without any.

    Raises:
        ValueError: if the section of fat binaries is not laid out as expected.
    """
    section = re.search(r"\.nv_fatbin\s+\S+\s+[0-9a-f]+\s+([0-9a-f]+)\s+([0-9a-f]+)", _readelf(path, "-S"))
    if section is None:
        return []
    start, size = (int(number, 16) for number in section.groups())
    with path.open("rb") as file:
        file.seek(start)
        return _fat_binaries(file.read(size))


def _fat_binaries(data: bytes) -> list[GpuCode]:
    """The entries of fat binaries that follow one another at multiples of 8, each with a header of 16 bytes."""
    found, place = [], 0
    while place + 16 <= len(data):
        magic, _, header, size = struct.unpack_from("<IHHQ", data, place)
        if magic == 0:  # padding
            place += 8
            continue
        if magic != FATBIN_MAGIC:
            raise ValueError(f"no fat binary at byte {place}: {magic:#x}")
        entry, place = place + header, place + header + size
        while entry < place:
            kind, _, entry_header, payload, packed = struct.unpack_from("<HHIQI", data, entry)
            if kind not in (PTX, MACHINE_CODE):
                raise ValueError(f"unknown kind {kind} of device code at byte {entry}")
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            found.append(GpuCode(kind == PTX, arch, packed != 0))
            entry += entry_header + payload
    return found
