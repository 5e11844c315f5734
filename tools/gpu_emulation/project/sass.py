"""Machine code of the CUDA kernels for each GPU: registers, spills, and a turn of the product's loop."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gpu_emulation.project import compiled, emulated

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Of one multiprocessor: threads and bytes of shared memory; 65536 registers each.
MULTIPROCESSOR = {
    "sm_80": (2048, 164 * 1024),
    "sm_86": (1536, 100 * 1024),
    "sm_89": (1536, 100 * 1024),
    "sm_90": (2048, 228 * 1024),
    "sm_100": (2048, 228 * 1024),
    "sm_120": (1536, 100 * 1024),
}
STEPS = 2  # of 32 values in a tile of the depth
_PRODUCT = re.compile(r"\b(?:IMMA|HMMA)\.16\d+")
_OPCODE = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def _disassembler() -> str | None:
    """nvdisasm of CUDA, or the one that comes with Triton."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return shutil.which("nvdisasm")
    return str(Path(found.origin).parent / "backends/nvidia/bin/nvdisasm")


DISASSEMBLER = _disassembler()
MISSING = compiled.MISSING or (None if DISASSEMBLER else "no disassembler: pip install triton")


@dataclass(frozen=True)
class Tile:
    """A product's tile, as the sources have it: rows, columns, those of a warp, stages of the pipeline."""

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * (self.rows // self.warp_rows) * (self.columns // self.warp_columns)


TILES = {
    "TileSizeE0": Tile(16, 32, 16, 16, 8),
    "TileSizeE1": Tile(64, 64, 32, 32, 4),
    "TileSizeE2": Tile(128, 128, 64, 32, 3),
    "FewRows": Tile(16, 32, 16, 16, 8),
    "ManyRows": Tile(64, 64, 32, 32, 4),
}


@dataclass(frozen=True)
class Product:
    """What the mangled name of a product's kernel says of it."""

    name: str
    tile: Tile
    integers: bool
    x_bytes: float  # of a value
    weight_bytes: float
    aligned: bool

    @property
    def mma(self) -> int:
        """Tensor-core products of a warp in a turn of the loop: those that the tile needs, and no more."""
        tiles = (self.tile.warp_rows // 16) * (self.tile.warp_columns // 8)
        return tiles * STEPS * (1 if self.integers else 2)

    @property
    def stage_bytes(self) -> int:
        return int(32 * STEPS * (self.tile.rows * self.x_bytes + self.tile.columns * self.weight_bytes))

    @property
    def copies(self) -> int:
        """Copies of 16 bytes of a thread in a turn of the loop."""
        depth = 32 * STEPS
        sizes = (self.tile.rows * self.x_bytes * depth, self.tile.columns * self.weight_bytes * depth)
        return sum(-(-int(size) // 16 // self.tile.threads) for size in sizes)

    @property
    def shared_bytes(self) -> int:
        return self.tile.stages * self.stage_bytes


def product(kernel: str) -> Product | None:
    """None: a kernel of another kind."""
    found = re.search(r"int_matmul_kernelILNS0_8(TileSizeE\d)ELNS0_7StorageE(\d)ELb(\d)ELb(\d)", kernel)
    if found:
        storage = int(found[2])
        words = ("w8", "w4", "gradient")[storage] + "a8" * (storage < 2) + "-g" * int(found[3])
        tile = TILES[found[1]]
        name = f"{words} {tile.rows}x{tile.columns}" + ("" if found[4] == "1" else " unaligned")
        return Product(name, tile, True, 1, 0.5 if storage == 1 else 1, found[4] == "1")
    found = re.search(r"float_matmul_kernelINS0_\d(\w+)ELNS_5DTypeE(\d)ELi(\d)ELb(\d)ELb(\d)", kernel)
    if found:
        tile = TILES[found[1]]
        words = f"w{found[3]}a16{'-g' * int(found[4])} {('', 'bfloat16', 'float16')[int(found[2])]}"
        name = f"{words} {tile.rows}x{tile.columns}" + ("" if found[5] == "1" else " unaligned")
        return Product(name, tile, False, 2, int(found[3]) / 8, found[5] == "1")
    return None


@dataclass(frozen=True)
class Code:
    """Of one kernel for one target: registers of a thread, bytes that were spilled, opcodes of a turn of its loop."""

    registers: int
    spilled: int
    loop: Counter

    @property
    def products(self) -> int:
        return sum(count for opcode, count in self.loop.items() if _PRODUCT.match(opcode))

    @property
    def copies(self) -> int:
        return sum(count for opcode, count in self.loop.items() if opcode.startswith("LDGSTS") and ".128" in opcode)


def occupancy(kernel: Product, registers: int, target: str) -> float:
    """Share of a multiprocessor's threads that fit at once."""
    threads, shared = MULTIPROCESSOR[target]
    of_block = -(-registers // 8) * 8 * kernel.tile.threads
    blocks = min(threads // kernel.tile.threads, 65536 // of_block, shared // (kernel.shared_bytes + 1024))
    return blocks * kernel.tile.threads / threads


@cache
def assembled(target: str) -> dict[str, Code]:
    """Every kernel for a target, by mangled name."""
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda path: _assemble(target, path), compiled.ptx_files().values()))
    return {name: code for of_file in codes for name, code in of_file.items()}


def _assemble(target: str, ptx: Path) -> dict[str, Code]:
    cubin = str(emulated.FOLDER / f"{ptx.stem}.{target}.cubin")
    command = ["ptxas", f"-arch={target}", "-v", str(ptx), "-o", cubin]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    text = subprocess.run([DISASSEMBLER, "-c", cubin], capture_output=True, text=True, check=True).stdout
    loops = {}
    for section in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        loops[section[: section.index(",")]] = _product_loop(section)
    pattern = r"Function properties for (\w+)\n\s*(\d+) bytes stack.*?(\d+) bytes spill.*?Used (\d+) registers"
    codes = {}
    for name, stack, spilled, registers in re.findall(pattern, log, re.S):
        codes[name] = Code(int(registers), max(int(stack), int(spilled)), loops[name])
    return codes


def _product_loop(section: str) -> Counter:
    """Opcodes of the smallest loop that holds every tensor-core product; none where there is none."""
    lines = section.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L_x_\d+):", line))}
    best: list[str] = []
    for end, line in enumerate(lines):
        found = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if not found or labels.get(found[1], end) >= end:
            continue
        body = lines[labels[found[1]] : end + 1]
        if any(_PRODUCT.search(one) for one in body) and (not best or len(body) > len(best)):
            best = body
    return Counter(match[1] for line in best if (match := _OPCODE.search(line)))
