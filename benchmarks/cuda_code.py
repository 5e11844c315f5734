"""Writes the table of the CUDA kernels' code in docs/gpu.md: `python benchmarks/cuda_code.py`. Needs nvcc, no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from gpu_emulation.project import sass  # noqa: E402

PAGE = ROOT / "docs" / "gpu.md"
START, END = "<!-- cuda code -->\n", "<!-- end of cuda code -->"


def table() -> str:
    """Registers, instructions a product, and threads that fit, of each product's kernel for each target."""
    codes = {target: sass.assembled(target) for target in sass.TARGETS}
    kernels = {kernel.name: name for name in codes["sm_80"] if (kernel := sass.product(name))}
    lines = ["| kernel | " + " | ".join(sass.TARGETS) + " |", "| --- |" + " --- |" * len(sass.TARGETS)]
    for words, name in sorted(kernels.items()):
        cells = []
        for target in sass.TARGETS:
            code, kernel = codes[target][name], sass.product(name)
            share = sass.occupancy(kernel, code.registers, target)
            cells.append(f"{code.registers} / {sum(code.loop.values()) / code.products:.1f} / {share:.0%}")
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(START)
    PAGE.write_text(before + START + "\n" + table() + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
