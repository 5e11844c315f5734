"""Stochastic rounding with random bits that are a pure function of a seed and a position, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

# Independent random streams of one seed, by what is rounded.
GRAD_INPUT, GRAD_WEIGHT, WEIGHT = 0, 1, 2

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SPREAD = 0x2545F4914F6CDD1D  # odd: distinct multiples modulo 2^64


_LIBRARY = torch.library.Library("qkernels_random", "DEF")
_LIBRARY.define("draw_seed(Tensor(a!) count) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
# The operator writes to this tensor, so that compiled code draws as many numbers as eager code, in the same order, and
# in the forward.
_COUNT = torch.zeros((), dtype=torch.int64, device="cpu")


def is_traced() -> bool:
    """True while operations are recorded, by torch.compile or make_fx, and not only computed."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _draw(count: Tensor | None = None) -> Tensor:
    if count is not None:
        count.add_(1)
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device="cpu")


_LIBRARY.impl("draw_seed", _draw, "CPU")
torch.library.register_fake(
    "qkernels_random::draw_seed", lambda count: torch.empty((), dtype=torch.int64), lib=_LIBRARY
)


def draw_seed() -> Tensor:
    """A seed from torch's default CPU generator: int64 of shape [].

    Compiled code calls an operator for it: inductor would put numbers of its own in the place of `torch.randint`.
    """
    if torch.compiler.is_exporting() or not is_traced():
        return _draw()
    return torch.ops.qkernels_random.draw_seed(_COUNT)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four int64 tensors of values below 2^32, which broadcast.
        key: two such tensors.

    Returns:
        Four words: int64 tensors of values below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap modulo 2^64; shifted and masked, their halves are right nevertheless.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def uniform(rows: int, columns: int, seed: Tensor, rng_stream: int, device: torch.device) -> Tensor:
    """float32 [rows, columns] in [0, 1), multiples of 2^-24.

    Element (r, c) is the upper 24 bits of word c mod 4 of Philox with key (seed low, seed high) and counter
    (c div 4, r, rng_stream, 0).
    """
    block = torch.arange(-(-columns // 4), device=device)[None, :].expand(rows, -1)
    row = torch.arange(rows, device=device)[:, None].expand_as(block)
    counter = (block, row, torch.full_like(block, rng_stream), torch.zeros_like(block))
    words = torch.stack(philox(counter, (seed & _MASK, seed >> 32 & _MASK)), dim=-1).flatten(1)[:, :columns]
    return (words >> 8).to(torch.float32) * 2.0**-24


def round_stochastic(values: Tensor, uniforms: Tensor) -> Tensor:
    """float32 -> int8: down or up at random, with the value as the mean; clamped to [-127, 127]."""
    floor = values.floor()
    return (floor + (uniforms < values - floor)).clamp(-127, 127).to(torch.int8)


def draw_shared_seed(values: Tensor) -> Tensor:
    """A seed for rounding `values`: int64 of shape [] on the CPU.

    Where several processes train together (`torch.distributed`), they hold copies of one weight, but their generators
    differ. So the seed is a hash of the values there: copies that are equal stay equal. In a single process
    it is `draw_seed()`.

    Args:
        values: float32 [N, K].
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return draw_seed()
    rows = values.contiguous().view(torch.int32).sum(dim=1, dtype=torch.int64)
    order = torch.arange(1, 2 * len(rows), 2, device=rows.device)
    return (rows * (order * _SPREAD)).sum().cpu()  # both wrap modulo 2^64
