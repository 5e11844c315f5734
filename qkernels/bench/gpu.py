"""What a GPU is compared with, and its limits as far as torch reaches them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..profiling.roofline import Roofline
from . import peers as cpu_peers
from . import torch_baselines
from .candidate import Candidate, Case

_SIDE = 4096  # of the products that stand for the peak
_BLOCK = 1 << 30  # bytes that are read and written, beyond any cache
_BURST = 10
GROUP = 128


class BFloat16(torch_baselines.BFloat16):
    """Tensor cores multiply bfloat16 on every GPU that has kernels here."""

    unavailable = Candidate.unavailable


class CompiledBFloat16(torch_baselines.CompiledBFloat16):
    unavailable = Candidate.unavailable


class GemLiteInt8(Candidate):
    """Dynamic int8 activations per token."""

    name, kind, weight_bits, tolerance = "gemlite int8", "int8", 8, cpu_peers.INT8_TOLERANCE
    module = "gemlite"
    dtype = torch.bfloat16

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        from gemlite.helper import A8W8_int8_dynamic

        return A8W8_int8_dynamic(device=str(weight.device)).from_weights(weight.to(self.dtype), bias.to(self.dtype))


class GemLiteInt4(Candidate):
    """4-bit weights with zero points in groups of 128, float16 activations; integers as `w4a16-g128-asym` has them."""

    name, kind, weight_bits = "gemlite int4", "bfloat16", 4 + 32 / GROUP
    tolerance = cpu_peers.INT4_TOLERANCE
    module = "gemlite"
    dtype = torch.float16

    def prepare(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        from gemlite.helper import A16Wn

        from ..formats.weight_format import INT4
        from ..kernels.quantizers import quantize_weight

        stored = quantize_weight(weight, f"w4a16-g{GROUP}-asym")
        assert stored.zeros is not None
        nibbles = INT4.unpack(stored.qweight, weight.shape[1])
        scales, zeros = stored.scales.to(self.dtype), stored.zeros.to(self.dtype)
        packer = A16Wn(device=str(weight.device))
        return packer.from_weights(nibbles, scales, zeros, 4, GROUP, bias.to(self.dtype))


class TorchAoInt4(cpu_peers.TorchAoInt4):
    """torchao's weight-only int4 for GPUs."""

    def config(self) -> Any:
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(group_size=GROUP)


def baselines(case: Case, *, compiled: bool) -> list[Candidate]:
    """What torch offers on a GPU."""
    return [
        torch_baselines.Float32(case),
        BFloat16(case),
        *([CompiledBFloat16(case)] if compiled else []),
        torch_baselines.IntMm(case),
    ]


def peers(case: Case) -> list[Candidate]:
    """Adapters of libraries with GPU kernels; whether one is here is asked by `unavailable`."""
    adapters = (
        cpu_peers.TorchAoInt8,
        TorchAoInt4,
        cpu_peers.BitsAndBytesNf4,
        cpu_peers.BitsAndBytesInt8,
        GemLiteInt8,
        GemLiteInt4,
    )
    return [adapter(case) for adapter in adapters]


def measure(threads: int, seconds: float = 1.0) -> Roofline:
    """torch's largest products and copies, in about `seconds` all together: a limit only as far as these reach it.

    The last cache of a GPU goes by the name "l3" here, the level that all its processors share.
    """
    device = torch.device("cuda")
    floats = {dtype: torch.randn(_SIDE, _SIDE, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    integers = torch.ones(_SIDE, _SIDE, device=device, dtype=torch.int8)
    source, destination = (torch.empty(_BLOCK, device=device, dtype=torch.uint8) for _ in range(2))
    probes: dict[str, Callable[[], object]] = {
        "torch float32": lambda: floats[torch.float32] @ floats[torch.float32],
        "torch bfloat16": lambda: floats[torch.bfloat16] @ floats[torch.bfloat16],
        "torch._int_mm": lambda: torch._int_mm(integers, integers.t()),
    }
    share = seconds / (len(probes) + 2)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    small, other = source[: cache // 4], destination[: cache // 4]
    bandwidth = {
        "l3": 2 * len(small) * _rate(lambda: other.copy_(small), share),
        "dram": 2 * _BLOCK * _rate(lambda: destination.copy_(source), share),
    }
    peaks = {name: 2 * _SIDE**3 * _rate(probe, share) for name, probe in probes.items()}
    return Roofline(threads, peaks, bandwidth, {"l2": 0, "l3": cache})


def _rate(call: Callable[[], object], seconds: float) -> float:
    """Calls in a second, in bursts that the device is waited for, after one that is not counted."""
    call()
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while (now := time.perf_counter()) - start < seconds or count == 0:
        for _ in range(_BURST):
            call()
        torch.cuda.synchronize()
        count += _BURST
    return count / (now - start)
