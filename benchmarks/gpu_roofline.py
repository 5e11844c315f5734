"""Writes the tables of docs/gpu.md: `python benchmarks/gpu_roofline.py`. No GPU is used, and no speed is measured.

Measured times come from the rows in benchmarks/results, predicted ones from data-sheet rates, the use of registers and
shared memory from the compiler, the counts of instructions and memory transactions from executing the compiled code
(`tools/gpu_emulation`). `--measured` writes the table of measured times alone, which takes no time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
from gpu_emulation.project.aot import TARGETS, compile_launch  # noqa: E402
from gpu_emulation.project.executor import execute  # noqa: E402
from gpu_emulation.project.launches import real_launches  # noqa: E402
from gpu_emulation.ptx.machine import Statistics  # noqa: E402
from gpu_emulation.triton_code import Compiled  # noqa: E402
from gpu_emulation.usage import usage  # noqa: E402

from qkernels import QuantScheme, quantize_weight  # noqa: E402
from qkernels.bench.results import Results  # noqa: E402
from qkernels.kernels.triton import ops  # noqa: E402

PAGE = ROOT / "docs" / "gpu.md"
LAYER = (14336, 4096)  # N, K: Llama-8B, up_proj
ROWS = (1, 16, 512, 2048)
SCHEMES = ("w8a8", "w4a8-g128", "w4a16-g128")
MEASURED = (*SCHEMES, "w4a8-g32-asym")


@dataclass(frozen=True)
class Device:
    """Dense rates of a data sheet, without sparsity: 10^12 operations and 10^9 bytes a second."""

    name: str
    target: str
    int8: float
    bf16: float
    bandwidth: float


# NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM); L4 Tensor Core GPU data sheet and RTX 4090 in "NVIDIA Ada GPU
# Architecture" (appendix A; bfloat16 with float32 sums); H100 and H200 Tensor Core GPU data sheets (SXM); HGX B200 data
# sheet, an eighth; RTX 5090 in "NVIDIA RTX Blackwell GPU Architecture" (appendix A); AMD Instinct MI300X data sheet.
# Where a sheet states rates with sparsity only, half of them.
DEVICES = (
    Device("A100 80 GB", "sm_80", 624, 312, 2039),
    Device("L4", "sm_89", 242, 121, 300),
    Device("RTX 4090", "sm_89", 661, 165, 1008),
    Device("H100 SXM", "sm_90", 1979, 989, 3352),
    Device("H200", "sm_90", 1979, 989, 4800),
    Device("B200", "sm_100", 4500, 2250, 8000),
    Device("RTX 5090", "sm_120", 838, 210, 1792),
    Device("MI300X", "gfx942", 2615, 1307, 5300),
)
# Of one multiprocessor: registers, shared memory in bytes, threads.
MULTIPROCESSOR = {
    "sm_80": (65536, 164 * 1024, 2048),
    "sm_89": (65536, 100 * 1024, 1536),
    "sm_90": (65536, 228 * 1024, 2048),
    "sm_100": (65536, 228 * 1024, 2048),
    "sm_120": (65536, 100 * 1024, 1536),
}


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def predict(device: Device, scheme: str | None, m: int) -> tuple[float, str]:
    """Seconds and what bounds them, for bfloat16 in and out; scheme None is a bfloat16 layer."""
    n, k = LAYER
    activations = 2 * m * (n + k)
    rate = device.bf16
    if scheme is None:
        moved = activations + 2 * n * k
    else:
        parsed = QuantScheme.parse(scheme)
        weight = n * parsed.packed_features(k) + 4 * n * parsed.weight_groups(k)
        moved = activations + weight
        if parsed.int_activations:
            moved += 2 * m * k + 8 * m  # int8 rows and their scales, written and read
            rate = device.int8
    seconds = {"memory": moved / device.bandwidth / 1e9, "products": 2 * m * n * k / rate / 1e12}
    bound = max(seconds, key=seconds.get)
    return seconds[bound], bound


def predictions() -> str:
    rows = []
    for device in DEVICES:
        for m in ROWS:
            base, _ = predict(device, None, m)
            cells = []
            for scheme in SCHEMES:
                seconds, bound = predict(device, scheme, m)
                cells.append(f"{seconds * 1e6:.1f} ({base / seconds:.1f}x, {bound})")
            rows.append((device.name, m, f"{base * 1e6:.1f}", *cells))
    return table(("device", "M", "bfloat16 us", *(f"{scheme} us" for scheme in SCHEMES)), rows)


def occupancy(compiled: Compiled, registers: int, target: str) -> str:
    """Share of a multiprocessor's threads that can be resident."""
    if target not in MULTIPROCESSOR:
        return ""
    total, shared, threads = MULTIPROCESSOR[target]
    blocks = min(total // (-(-registers // 8) * 8 * compiled.threads), threads // compiled.threads)
    if compiled.shared:
        blocks = min(blocks, shared // (compiled.shared + 1024))
    return f"{blocks * compiled.threads / threads:.0%}"


def code_tables() -> str:
    columns = {}
    for target in TARGETS:
        for name, launch in real_launches(TARGETS[target]).items():
            compiled = compile_launch(launch, target)
            used = usage(compiled)
            products = used.int_products + used.float_products
            cell = f"{used.registers} / {compiled.shared / 1024:.0f}K / {products}"
            share = occupancy(compiled, used.registers, target)
            columns.setdefault(name, {})[target] = f"{cell} / {share}" if share else cell
    rows = [(name, *(found.get(target, "") for target in TARGETS)) for name, found in columns.items()]
    return table(("kernel", *TARGETS), rows)


def counts() -> str:
    """One launch of each product on sm_80, at a shape small enough to execute."""
    rows = []
    for scheme, m in (("w8a8", 128), ("w4a8-g128", 128), ("w4a16-g128", 128), ("w8a8", 16), ("w4a8-g128", 16)):
        torch.manual_seed(0)
        x, weight = torch.randn(m, 512).to(torch.bfloat16), quantize_weight(torch.randn(128, 512), scheme)
        _, launches = ops.plan("linear", (x, *weight, None, scheme), TARGETS["sm_80"])
        least = -(-m // 16) * 128 // 8 * 512 // (32 if QuantScheme.parse(scheme).int_activations else 16)
        for launch in launches:
            statistics = Statistics()
            execute(launch, "sm_80", statistics)
            total, traffic = statistics.instructions.total(), statistics.traffic
            products = sum(count for name, count in statistics.instructions.items() if name.startswith("mma"))
            rows.append((
                f"{scheme}, M = {m}: {launch.kernel.__name__.removesuffix('_kernel')}", total,
                f"{products} ({products / least:.2f}x)" if products else "0",
                f"{traffic.sectors} ({traffic.sectors / max(1, traffic.least_sectors):.2f}x)",
                f"{traffic.wavefronts} ({traffic.wavefronts / max(1, traffic.least_wavefronts):.2f}x)",
            ))  # fmt: skip
    header = ("kernel, N = 128, K = 512", "warp instructions", "of them mma", "32-byte sectors", "shared wavefronts")
    return table(header, rows)


def measured() -> str:
    """Milliseconds of one layer on an H100, and in brackets the speed-up over torch bfloat16 in the same run."""
    runs = {"as chosen": "linear-nvidia-h100.json", "Triton alone": "linear-nvidia-h100-triton.json"}
    found = {name: Results.load(ROOT / "benchmarks" / "results" / file) for name, file in runs.items()}
    rows = []
    for shape in dict.fromkeys((row.m, row.n, row.k) for row in found["as chosen"].rows if row.direction == "forward"):
        for name, results in found.items():
            times = {row.name: row.median for row in results.rows if (row.m, row.n, row.k) == shape}
            base = times["torch bfloat16"]
            cells = [f"{times[scheme] * 1e3:.3f} ({base / times[scheme]:.2f}x)" for scheme in MEASURED]
            rows.append((" x ".join(map(str, shape)), name, f"{base * 1e3:.3f}", *cells))
    return table(("M x N x K", "kernels", "torch bfloat16", *MEASURED), rows)


def main() -> None:
    text = PAGE.read_text()
    parts = {"measured": measured, "predictions": predictions, "code": code_tables, "counts": counts}
    for name, part in parts.items():
        if "--measured" in sys.argv and name != "measured":
            continue
        content = part()
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, rest = text.split(start)
        text = f"{head}{start}\n{content}\n\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
