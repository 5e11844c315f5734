"""Tiles, warps, stages and split of each product: one pure function of its shape and the target, with its reasons.

Nothing here is tuned on a device; `docs/gpu.md` says what the choices rest on. What `qkernels tune` measured on one
(`tuning.py`) goes before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .target import Target

OPERAND_BYTES = {"int8": 1, "float16": 2, "float32": 4}
LEAST_INT8_DEPTH = 32  # of a product on tensor cores
FEW_ROWS = 16  # rows of the smallest tensor-core tile: up to here the weight's bytes, not the products, take the time
MAX_SLICES = 16
MIN_SLICE = 256  # columns of a slice of the depth, so that its loop is worth its start


@dataclass(frozen=True)
class MatmulShape:
    """A matrix product [rows, depth] x [depth, columns].

    Attributes:
        operand: "int8", "float16" (also bfloat16) or "float32": what the factors are when they are multiplied.
        group: columns of the depth that share a scale, 0 for none.
        splittable: True if the kernel can divide the depth among programs.
        converted: True if the loop makes a factor from other numbers or turns it over, in registers.
    """

    rows: int
    columns: int
    depth: int
    operand: str
    group: int = 0
    splittable: bool = False
    converted: bool = False


def bucket(product: MatmulShape) -> MatmulShape:
    """The product that stands for those with about as many rows: up to the next power of two."""
    return replace(product, rows=1 << max(0, product.rows - 1).bit_length())


@dataclass(frozen=True)
class Tile:
    """Sizes of a tile, and how the programs work on it. `slice_depth` 0: a program walks the whole depth."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    reason: str
    slice_depth: int = 0

    @property
    def swath(self) -> int:
        """Rows of tiles walked together: 8 of them and 8 columns keep the operands of 64 programs in L2."""
        return 8


def tiles(product: MatmulShape, config: Tile) -> int:
    """Programs along the first axis of the grid."""
    return -(-product.rows // config.rows) * -(-product.columns // config.columns)


def slices(product: MatmulShape, config: Tile) -> int:
    """Programs along the second axis of the grid."""
    return -(-product.depth // config.slice_depth) if config.slice_depth else 1


def choose(product: MatmulShape, target: Target) -> Tile:
    """The tiles for `product` on `target`."""
    measured = target.tuned.get(bucket(product))
    if measured is not None:
        return measured
    return _fit_shared(_split(_tile(product, target), product, target), product, target)


def _tile(product: MatmulShape, target: Target) -> Tile:
    # 128 bytes of each row, a cache line, are read at a time, or 64 where their conversion takes registers. A tile of
    # the loop lies in one group, whose sum of integers must be whole; or it holds two groups, which are summed apart.
    depth = (64 if product.converted else 128) // OPERAND_BYTES[product.operand]
    if product.group:
        depth = max(product.group, LEAST_INT8_DEPTH) if product.operand == "int8" else min(product.group, depth)
    if product.operand == "float32":
        size = 16 if product.rows <= FEW_ROWS else 32
        return Tile(size, 32, min(depth, 32), 4, 2, "float32 has no tensor-core product that rounds like float32")
    if product.rows <= FEW_ROWS:
        columns = 128 if product.group == 32 else 64  # 16 bytes of 4-bit weights for each thread
        if product.group > depth:
            depth = product.group
        reason = f"at most {FEW_ROWS} rows: bound by the bytes of the weight, deep pipeline"
        return Tile(16, columns, depth, 4, 4, reason)
    if product.rows <= 64:
        rows = 32 if product.rows <= 32 else 64
        return Tile(rows, 64, depth, 4, 4, "at most 64 rows: one row of tiles, narrow so that more programs run")
    large = Tile(128, 128, depth, 8, 3, "many rows: 128 x 128 reads each operand byte for 128 products")
    if product.group or product.converted:
        large = replace(large, rows=64, reason="many rows, but registers also hold a group's sum or what is converted")
    if tiles(product, large) >= target.processors:
        return large
    return Tile(64, 64, depth, 4, 3, "fewer large tiles than processors: smaller ones use more of them")


def _split(config: Tile, product: MatmulShape, target: Target) -> Tile:
    """Divide the depth among programs where the tiles alone leave processors idle."""
    wanted = 2 * target.processors // tiles(product, config) if product.rows and product.columns else 0
    possible = min(wanted, MAX_SLICES, product.depth // MIN_SLICE)
    if not product.splittable or product.rows > FEW_ROWS or possible < 2:
        return config
    if product.operand == "int8" and product.group and 8 * product.rows > product.group // 2:
        return config  # a float for each group and row is written and read: more bytes than a 4-bit weight has
    step = -(-product.depth // possible)
    step = -(-step // config.depth) * config.depth
    reason = f"{config.reason}; depth in slices of {step}, for {tiles(product, config)} tiles leave processors idle"
    return replace(config, slice_depth=step, reason=reason)


def _fit_shared(config: Tile, product: MatmulShape, target: Target) -> Tile:
    """As many stages as fit, with the other half of one tile for the conversion of 4-bit weights."""
    stage = (config.rows + config.columns) * config.depth * OPERAND_BYTES[product.operand]
    fitting = max(1, (target.shared_bytes - stage) // stage)
    if fitting >= config.num_stages:
        return config
    return replace(config, num_stages=fitting, reason=f"{config.reason}; {fitting} stages fit into shared memory")
