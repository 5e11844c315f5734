"""Tiles measured on a device: `qkernels tune` searches within a time budget and writes one file, to be committed.

The file lists for each device the products for which other tiles than those of `configs` were faster. Every candidate
gives the same bits for `a8` schemes: an exact sum has no order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product as combinations
from pathlib import Path

from .configs import OPERAND_BYTES, Config, Product, bucket, choose
from .launch import Target

FILE = Path(__file__).with_name("tuned.json")
FORMAT = 1
LEAST_GAIN = 0.03  # below, the difference is taken for noise, and the choice of `configs` stays


@dataclass(frozen=True)
class Finding:
    """The fastest tiles for a product. Times are seconds; `before` is that of `configs.choose`."""

    product: Product
    config: Config
    seconds: float
    before: float
    tried: int

    @property
    def better(self) -> bool:
        """Than without tuning, by more than noise."""
        return self.seconds < (1 - LEAST_GAIN) * self.before


def candidates(product: Product, target: Target) -> Iterator[Config]:
    """What may be launched for `product` on `target`: first the choice of `configs`, then its variations."""
    first = choose(product, replace(target, tuned={}))
    yield first
    rows = [size for size in (16, 32, 64, 128) if size <= max(16, bucket(product).rows)]
    depths = {first.depth} if product.operand == "int8" and product.group else {first.depth, 2 * first.depth}
    if product.group:
        depths = {depth for depth in depths if product.group % depth == 0}
    warps = (1, 2, 4, 8) if product.rows <= 16 else (4, 8)
    for size, columns, depth, num_warps, stages in combinations(rows, (32, 64, 128, 256), depths, warps, (2, 3, 4, 5)):
        stage = (size + columns) * depth * OPERAND_BYTES[product.operand]
        if stages * stage > target.shared_bytes or size * columns > 128 * 32 * num_warps:
            continue  # which do not fit into shared memory, or would hold over 128 sums in the registers of a thread
        for slice_depth in {0, first.slice_depth, 2 * first.slice_depth}:
            slice_depth = -(-slice_depth // depth) * depth
            found = Config(size, columns, depth, num_warps, stages, "measured by qkernels tune", slice_depth)
            if found != replace(first, reason=found.reason):
                yield found


def search(
    product: Product,
    target: Target,
    measure: Callable[[Config], float],
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


def load(path: Path, device: str) -> Mapping[Product, Config]:
    """The tiles that the file at `path`, if there is one, holds for the device of this name.

    Raises:
        ValueError: if the file is not one that `save` wrote.
    """
    if not path.exists():
        return {}
    return {Product(**entry["product"]): Config(**entry["config"]) for entry in _read(path)["devices"].get(device, ())}


def save(path: Path, device: str, findings: list[Finding]) -> None:
    """Write the better ones of `findings` for the device into the file at `path`; entries of others stay.

    Raises:
        ValueError: if there is a file that is not one of these.
    """
    content = _read(path) if path.exists() else {"format": FORMAT, "devices": {}}
    kept = {Product(**entry["product"]): entry for entry in content["devices"].get(device, ())}
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
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no file of qkernels tune: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of qkernels tune, or of another version")
    return content
