"""The limits of this CPU, measured, and the least time that a product can take on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..formats.scheme import QuantScheme
from ..kernels.isa import native

FLOAT32 = ("fma-avx512", "fma-avx2")
# The instructions that multiply numbers of a kind, with float32 sums or exact int32 ones; of a GPU torch's products.
INSTRUCTIONS = {
    "int8": ("tdpbssd-amx", "vpdpbusd-avx512", "vpdpbusd-avxvnni", "vpmaddwd-avx512", "vpmaddwd-avx2", "torch._int_mm"),
    "bfloat16": ("tdpbf16ps-amx", "vdpbf16ps-avx512", *FLOAT32, "torch bfloat16"),
    "float32": (*FLOAT32, "torch float32"),
}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MIN_DRAM_BLOCK = 256 << 20
FALLBACK_CACHES = {"l2": 1 << 20, "l3": 32 << 20}  # where the system does not tell


@dataclass(frozen=True)
class MatmulCost:
    """A product of x [M, K] and a weight [N, K], as the memory sees it; also the gradient with respect to x.

    Attributes:
        kind: "int8", "bfloat16" or "float32": what is multiplied.
        weight_bytes: of the weight as stored, scales included.
        activation_bytes: of x and of the result together.
    """

    m: int
    n: int
    k: int
    kind: str
    weight_bytes: int
    activation_bytes: int

    @classmethod
    def of(cls, m: int, n: int, k: int, scheme: str, dtype: str, *, gradient: bool = False) -> MatmulCost:
        """The product of a scheme, or of plain "float32" or "bfloat16" weights, with activations of `dtype`."""
        if scheme in DTYPE_BYTES:
            kind, weight = scheme, n * k * DTYPE_BYTES[scheme]
        else:
            parsed = QuantScheme.parse(scheme)
            kind = "int8" if parsed.int_activations and not gradient else dtype
            groups = n * parsed.weight_groups(k)
            weight = n * parsed.packed_features(k) + groups * (4 + {None: 0, "zero_point": 1, "min": 4}[parsed.zeros])
        return cls(m, n, k, kind, weight, m * (n + k) * DTYPE_BYTES[dtype])


@dataclass(frozen=True)
class Limit:
    """The least time of a product, and what sets it: an instruction or a level of the memory."""

    seconds: float
    by: str


@dataclass(frozen=True)
class Roofline:
    """Limits of `threads` threads together.

    Attributes:
        peaks: operations per second (a multiply-add is 2) by instruction.
        bandwidth: bytes read per second from "l2", "l3" and "dram".
        caches: bytes of "l2" (a core) and "l3" (all cores).
    """

    threads: int
    peaks: dict[str, float]
    bandwidth: dict[str, float]
    caches: dict[str, int]

    def fastest(self, kind: str) -> str | None:
        """The instruction with the highest peak for numbers of `kind`; None if none was measured on this CPU."""
        measured = [name for name in INSTRUCTIONS[kind] if name in self.peaks]
        return max(measured, key=self.peaks.__getitem__, default=None)

    def level(self, size: int) -> str:
        """The nearest memory that holds `size` bytes, spread over the threads."""
        if size <= self.caches["l2"] * self.threads:
            return "l2"
        return "l3" if size <= self.caches["l3"] else "dram"

    def limit(self, product: MatmulCost, *, cold: bool = False) -> Limit:
        """No implementation is faster than this: it has to multiply everything once and to read and write it once.

        cold: the weight comes from DRAM, however small it is.
        """
        total = product.weight_bytes + product.activation_bytes
        weight_level = "dram" if cold else self.level(total)
        activation_level = self.level(product.activation_bytes) if cold else weight_level
        memory = (
            product.weight_bytes / self.bandwidth[weight_level]
            + product.activation_bytes / self.bandwidth[activation_level]
        )
        instruction = self.fastest(product.kind)
        compute = 2 * product.m * product.n * product.k / self.peaks[instruction] if instruction else 0.0
        return Limit(compute, instruction) if instruction and compute >= memory else Limit(memory, weight_level)


def cache_bytes() -> dict[str, int]:
    """Sizes of "l2" (of a core) and "l3" (that the first core reaches) in bytes, as Linux reports them."""
    sizes = dict(FALLBACK_CACHES)
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, size = (f"l{(folder / 'level').read_text().strip()}", (folder / "size").read_text().strip())
        if level in sizes and size.endswith("K"):
            sizes[level] = int(size[:-1]) << 10
    return sizes


def measure(threads: int, seconds: float = 1.0) -> Roofline:
    """Measure every instruction and level of this CPU, in about `seconds` all together."""
    caches = cache_bytes()
    # Half of a cache, so that all of it stays there; outside of L2 (L3) by being larger than it.
    blocks = {
        "l2": caches["l2"] // 2,
        "l3": max(caches["l3"] // 2 // threads, 2 * caches["l2"]),
        "dram": max(8 * caches["l3"], MIN_DRAM_BLOCK) // threads,
    }
    probes = native.peak_probes()
    share = seconds / (len(probes) + len(blocks))
    return Roofline(
        threads,
        {probe: native.peak(probe, threads, share) for probe in probes},
        {level: native.read_bandwidth(size, threads, share) for level, size in blocks.items()},
        caches,
    )
