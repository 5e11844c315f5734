"""mov, cvt and cvta (PTX ISA 9.7.9)."""

from __future__ import annotations

import numpy as np

from .machine import DTYPES, Block, bits_of, opcode
from .program import Instruction, PtxError


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, half to even; NaN becomes the canonical 0x7fff."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@opcode("mov")
def move(block: Block, instruction: Instruction) -> None:
    kind = instruction.parts[-1]
    kind = kind if kind == "pred" else f"b{bits_of(kind)}"
    destination, source = instruction.operands
    block.write(destination, block.read(source, kind), kind)


@opcode("cvta")
def convert_address(block: Block, instruction: Instruction) -> None:
    if "shared" in instruction.parts:
        raise PtxError("generic addresses of shared memory are not known")
    block.write(instruction.operands[0], block.read(instruction.operands[1], "u64"), "u64")


def _to_integer(values: np.ndarray, kind: str, parts: tuple[str, ...]) -> np.ndarray:
    """Float to integer: rounded as told, clamped to the range, NaN to 0."""
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    (mode,) = set(parts) & set(rounding)
    values = rounding[mode](values.astype(np.float64))
    limits = np.iinfo(DTYPES[kind])
    result = np.zeros(values.shape, DTYPES[kind])
    high, low = values >= float(limits.max), values <= float(limits.min)
    inside = ~(high | low | np.isnan(values))
    result[inside] = values[inside].astype(DTYPES[kind])
    result[high], result[low] = limits.max, limits.min
    return result


def _narrow(values: np.ndarray, kind: str, parts: tuple[str, ...]) -> np.ndarray:
    """Float or integer to float."""
    if set(parts) & {"rz", "rm", "rp", "ftz", "relu", "satfinite", "rs"}:
        raise PtxError(f"conversion {'.'.join(parts)} is not known")
    if kind == "bf16":
        return bfloat16_bits(values)
    return values.astype(DTYPES[kind])


@opcode("cvt")
def convert(block: Block, instruction: Instruction) -> None:
    parts = instruction.parts
    to, source = parts[-2], parts[-1]
    destination, *operands = instruction.operands
    if to in ("f16x2", "bf16x2"):  # the first operand becomes the upper half
        element = to[:-2]
        upper, lower = (_narrow(block.read(operand, source), element, parts) for operand in operands)
        block.write(destination, np.stack(np.broadcast_arrays(lower, upper), axis=-1), to)
        return
    values = block.read(operands[0], source)
    if source == "bf16":
        values = bfloat16_values(values)
    if to[0] in "us" and values.dtype.kind == "f":
        values = _to_integer(values, to, parts)
    elif to[0] in "us":
        if "sat" in parts:
            limits, held = np.iinfo(DTYPES[to]), np.iinfo(values.dtype)
            values = np.clip(values, max(limits.min, held.min), min(limits.max, held.max))
    elif set(parts) & {"rni", "rzi", "rmi", "rpi"}:
        rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        values = rounding[(set(parts) & set(rounding)).pop()](values)
    else:
        values = _narrow(values, to, parts)
    block.write(destination, values, to)
