"""Tiles measured on a device: `qkernels tune` searches within a time budget and writes one file.

The file lists for each device the products for which other tiles than those of `tiles.choose` were faster. Two files
are read: the one of the package, should it have one, and then that of the user (`user_file`), whose entries go before.
Every candidate gives the same bits for `a8` schemes: an exact sum has no order.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product as combinations
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...system import json_file
from ...system.cache import user_cache
from .target import Target
from .tiles import OPERAND_BYTES, MatmulShape, Tile, bucket, choose

FILE = Path(__file__).with_name("tuned.json")
FORMAT = 1
PROGRAM = "qkernels tune"
LEAST_GAIN = 0.03  # below, the difference is taken for noise, and the choice of `tiles` stays

_Entry = TypeVar("_Entry", MatmulShape, Tile)


@dataclass(frozen=True)
class Finding:
    """The fastest tiles for a product. Times are seconds; `before` is that of `tiles.choose`."""

    product: MatmulShape
    config: Tile
    seconds: float
    before: float
    tried: int

    @property
    def better(self) -> bool:
        """Than without tuning, by more than noise."""
        return self.seconds < (1 - LEAST_GAIN) * self.before


def candidates(product: MatmulShape, target: Target) -> Iterator[Tile]:
    """The tiles that may be launched for `product` on `target`: first the choice of `tiles`, then its variations."""
    first = choose(product, replace(target, tuned={}))
    yield first
    rows = [size for size in (16, 32, 64, 128) if size <= max(16, bucket(product).rows)]
    depths = {first.depth} if product.operand == "int8" and product.group else {first.depth, 2 * first.depth}
    if product.group and product.operand != "int8":
        depths = {depth for depth in depths if product.group % depth == 0}
    warps = (1, 2, 4, 8) if product.rows <= 16 else (4, 8)
    for size, columns, depth, num_warps, stages in combinations(rows, (32, 64, 128, 256), depths, warps, (2, 3, 4, 5)):
        stage = (size + columns) * depth * OPERAND_BYTES[product.operand]
        if stages * stage > target.shared_bytes or size * columns > 128 * 32 * num_warps:
            continue  # which do not fit into shared memory, or would hold over 128 sums in the registers of a thread
        for slice_depth in {0, first.slice_depth, 2 * first.slice_depth}:
            slice_depth = -(-slice_depth // depth) * depth
            found = Tile(size, columns, depth, num_warps, stages, "measured by qkernels tune", slice_depth)
            if found != replace(first, reason=found.reason):
                yield found


def search(
    product: MatmulShape,
    target: Target,
    measure: Callable[[Tile], float],
    budget: float,
    clock: Callable[[], float] = time.monotonic,
) -> Finding:
    """Measure candidates until `budget` seconds have passed or all were tried; the first one is always measured.

    Args:
        measure: seconds of the product with these tiles; infinity if the device cannot launch them.
    """
    end = clock() + budget
    options = candidates(product, target)
    best = next(options)
    before = seconds = measure(best)
    tried = 1
    for config in options:
        if clock() >= end:
            break
        tried += 1
        taken = measure(config)
        if taken < seconds:
            best, seconds = config, taken
    return Finding(bucket(product), best, seconds, before, tried)


def user_file() -> Path:
    """The file that `qkernels tune` writes unless it is told another."""
    return user_cache() / FILE.name


def tuned(device: str) -> Mapping[MatmulShape, Tile]:
    """The tiles that the package's file and the user's hold for the device of this name.

    A file that cannot be read is warned of and left out: the tiles of `tiles.choose` are right, too, if slower.
    """
    found: dict[MatmulShape, Tile] = {}
    for path in (FILE, user_file()):
        try:
            found |= load(path, device)
        except (OSError, ValueError) as error:
            warnings.warn(f"{error}; tiles are chosen without it: run `qkernels tune`, or delete it", stacklevel=2)
    return found


@cache
def target_of(device: torch.device) -> Target:
    """The target a GPU is, with what `qkernels tune` found for it, if that was kept."""
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", 0, found.multi_processor_count, 64 * 1024, tuned(found.name))
    return Target(
        "cuda",
        10 * found.major + found.minor,
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", 99 * 1024),
        tuned(found.name),
    )


def load(path: Path, device: str) -> dict[MatmulShape, Tile]:
    """The tiles that the file at `path`, if there is one, holds for the device of this name.

    Raises:
        ValueError: naming the file, if it is not one that `save` wrote.
        OSError: if it cannot be read.
    """
    return {product: config for product, (config, _) in _entries(path, _read(path)).get(device, {}).items()}


def save(path: Path, device: str, findings: list[Finding]) -> None:
    """Write the better ones of `findings` for the device into the file at `path`; entries of others stay.

    The file is replaced as a whole, or stays as it was.

    Raises:
        ValueError: if there is a file that is not one of these.
        OSError: if it cannot be written.
    """
    content = _read(path)
    kept = {product: entry for product, (_, entry) in _entries(path, content).get(device, {}).items()}
    for finding in findings:
        kept.pop(finding.product, None)
        if finding.better:
            kept[finding.product] = {
                "product": asdict(finding.product),
                "config": asdict(finding.config),
                "seconds": finding.seconds,
                "before": finding.before,
            }
    content["devices"][device] = list(kept.values())
    json_file.write(path, content, sort_keys=True)


def prepare(path: Path) -> None:
    """Find out, before anything is measured, whether `save` can write the file.

    Raises:
        ValueError, OSError: as `save` does.
    """
    content = _read(path)
    _entries(path, content)
    json_file.expect_writable(path)


def _read(path: Path) -> dict[str, Any]:
    """The content of the file, or of an empty one; only its outermost layer is checked."""
    if not path.exists():
        return {"format": FORMAT, "devices": {}}
    content = json_file.read(path, program=PROGRAM, version=FORMAT)
    if not isinstance(content.get("devices"), dict):
        raise ValueError(f"{path} is no file of {PROGRAM}: it lists no devices")
    return content


def _entries(path: Path, content: dict[str, Any]) -> dict[str, dict[MatmulShape, tuple[Tile, dict[str, Any]]]]:
    """By device and product: the tiles, and the entry as it stands in the file."""
    devices: dict[str, dict[MatmulShape, tuple[Tile, dict[str, Any]]]] = {}
    for device, entries in content["devices"].items():
        if not isinstance(entries, list):
            raise ValueError(f"{path} is no file of {PROGRAM}: {device!r} has no list of products")
        devices[device] = {}
        for number, entry in enumerate(entries):
            parts = (entry.get("product"), entry.get("config")) if isinstance(entry, dict) else (None, None)
            product, config = _build(MatmulShape, parts[0]), _build(Tile, parts[1])
            if product is None or config is None or product.operand not in OPERAND_BYTES:
                raise ValueError(f"{path} is no file of {PROGRAM}: entry {number} of {device!r} is broken")
            devices[device][product] = (config, entry)
    return devices


def _build(kind: type[_Entry], values: object) -> _Entry | None:
    """The dataclass with these values, or None if they are not of its fields and their types."""
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(kind)}:
        return None
    for field in fields(kind):
        value = values[field.name]
        if type(value).__name__ != field.type or (isinstance(value, int) and value < 0):
            return None
    return kind(**values)
