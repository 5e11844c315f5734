"""Integer, logic and floating-point instructions, comparison and selection (PTX ISA 9.7.1 to 9.7.8)."""

from __future__ import annotations

import numpy as np

from .conversion import bfloat16_bits, bfloat16_values
from .machine import DTYPES, PACKED, SIGNED, UNSIGNED, Block, bits_of, opcode
from .program import Instruction, PtxError

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _values(block: Block, operand, kind: str) -> np.ndarray:
    """As numbers to calculate with: bfloat16 as float32."""
    value = block.read(operand, kind)
    return bfloat16_values(value) if kind in ("bf16", "bf16x2") else value


def _put(block: Block, operand, values: np.ndarray, kind: str) -> None:
    block.write(operand, bfloat16_bits(values) if kind in ("bf16", "bf16x2") else values, kind)


def _is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf"))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c rounded once.

    The product is exact in float64. The sum is rounded to odd there: float64 has more than twice the digits of float32
    and two to spare, so that rounding again gives what one rounding would.
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = np.ascontiguousarray(np.broadcast_to(total, np.broadcast_shapes(total.shape, error.shape))).view(np.int64)
    inexact = np.isfinite(total) & np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where(inexact, step, 0)).view(np.float64).astype(np.float32)


def _pick_float(a: np.ndarray, b: np.ndarray, name: str, propagate: bool) -> np.ndarray:
    """min and max: a number is preferred to NaN, and -0 is below +0."""
    smaller = name == "min"
    first = np.where((a == b) & (np.signbit(a) == smaller), True, (a < b) if smaller else (a > b))
    value = np.where(np.isnan(b), a, np.where(np.isnan(a), b, np.where(first, a, b)))
    if propagate:
        value = np.where(np.isnan(a) | np.isnan(b), np.array(np.nan, a.dtype), value)
    return value


def _product_high(a: np.ndarray, b: np.ndarray, bits: int) -> np.ndarray:
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    product = a.astype(object) * b.astype(object)
    return np.array([int(value) >> bits for value in product], dtype=a.dtype)


def _divide(a: np.ndarray, b: np.ndarray, name: str) -> np.ndarray:
    """Towards zero; the remainder has the sign of the dividend."""
    if (b == 0).any():
        raise PtxError("integer division by zero")
    if a.dtype.kind == "u":
        return a // b if name == "div" else a % b
    if ((a == np.iinfo(a.dtype).min) & (b == -1)).any():
        raise PtxError("integer division overflows")
    floor = a // b
    quotient = floor + ((floor * b != a) & ((a < 0) != (b < 0)))
    return (quotient if name == "div" else a - quotient * b).astype(a.dtype)


def _check_rounding(instruction: Instruction) -> None:
    modes = {"rz", "rm", "rp", "ftz", "approx", "full"} & set(instruction.parts)
    if modes:
        raise PtxError(f"rounding {modes} is not known")


@opcode("add", "sub", "mul", "min", "max", "div", "rem")
def binary(block: Block, instruction: Instruction) -> None:
    name, *modifiers, kind = instruction.parts
    destination, first, second, *third = instruction.operands
    if third and (name not in ("min", "max") or kind != "f32"):
        raise PtxError("only min and max of f32 take three operands")
    if name == "mul" and "wide" in modifiers:
        a, b = block.read(first, kind), block.read(second, kind)
        wide = f"{kind[0]}{2 * bits_of(kind)}"
        block.write(destination, a.astype(DTYPES[wide]) * b.astype(DTYPES[wide]), wide)
        return
    if name in ("add", "sub") and kind in ("f16", "bf16") and modifiers[-1:] == ["f32"]:
        # Mixed precision: the first operand is narrow.
        narrow, wide = _values(block, first, kind).astype(np.float32), block.read(second, "f32")
        block.write(destination, narrow + wide if name == "add" else narrow - wide, "f32")
        return
    a, b = _values(block, first, kind), _values(block, second, kind)
    if _is_float(kind):
        _check_rounding(instruction)
        if name in ("min", "max"):
            value = _pick_float(a, b, name, "NaN" in modifiers)
            for operand in third:
                value = _pick_float(value, _values(block, operand, kind), name, "NaN" in modifiers)
        else:
            function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name]
            value = function(a, b)
    elif name in ("div", "rem"):
        value = _divide(*np.broadcast_arrays(a, b), name)
    elif "hi" in modifiers:
        value = _product_high(*np.broadcast_arrays(a, b), bits_of(kind))
    elif "sat" in modifiers:
        exact = {"add": np.add, "sub": np.subtract}[name](a.astype(np.int64), b.astype(np.int64))
        value = np.clip(exact, np.iinfo(a.dtype).min, np.iinfo(a.dtype).max)
    else:
        functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
        value = functions[name](a, b)
    _put(block, destination, value, kind)


@opcode("mad", "fma")
def multiply_add(block: Block, instruction: Instruction) -> None:
    name, *modifiers, kind = instruction.parts
    destination, *operands = instruction.operands
    if "wide" in modifiers:
        wide = f"{kind[0]}{2 * bits_of(kind)}"
        a, b = (block.read(operand, kind).astype(DTYPES[wide]) for operand in operands[:2])
        block.write(destination, a * b + block.read(operands[2], wide), wide)
        return
    a, b, c = (_values(block, operand, kind) for operand in operands)
    if not _is_float(kind):
        product = _product_high(*np.broadcast_arrays(a, b), bits_of(kind)) if "hi" in modifiers else a * b
        block.write(destination, product + c, kind)
        return
    _check_rounding(instruction)
    if kind in ("bf16", "bf16x2"):
        product = a.astype(np.float64) * b.astype(np.float64)
        exact = product + c
        if ((exact.astype(np.float32) != exact) | (exact - product != c)).any():
            raise PtxError(f"{name} of {kind} is known only for sums that float32 holds")
        _put(block, destination, exact.astype(np.float32), kind)
        return
    if kind not in ("f32", "f32x2"):
        raise PtxError(f"{name} of {kind} is not known")
    block.write(destination, fused(a, b, c), kind)


@opcode("abs", "neg")
def sign(block: Block, instruction: Instruction) -> None:
    name, *_, kind = instruction.parts
    destination, source = instruction.operands
    if not _is_float(kind):
        value = block.read(source, kind)
        block.write(destination, np.abs(value) if name == "abs" else -value, kind)
        return
    bits = bits_of(kind) // (2 if kind in PACKED else 1)
    top = UNSIGNED[bits](1 << (bits - 1))
    raw = block.read(source, kind).view(UNSIGNED[bits])
    block.write(destination, (raw & ~top if name == "abs" else raw ^ top).view(DTYPES[PACKED.get(kind, kind)]), kind)


@opcode("and", "or", "xor")
def logic(block: Block, instruction: Instruction) -> None:
    name, kind = instruction.parts
    destination, first, second = instruction.operands
    block.write(destination, LOGIC[name](block.read(first, kind), block.read(second, kind)), kind)


@opcode("not")
def complement(block: Block, instruction: Instruction) -> None:
    kind = instruction.parts[1]
    block.write(instruction.operands[0], ~block.read(instruction.operands[1], kind), kind)


@opcode("lop3")
def three_input_logic(block: Block, instruction: Instruction) -> None:
    destination, *operands, table = instruction.operands
    a, b, c = (block.read(operand, "b32") for operand in operands)
    value = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for row in range(8):
        if table.bits >> row & 1:
            value |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    block.write(destination, value, "b32")


@opcode("shl", "shr")
def shift(block: Block, instruction: Instruction) -> None:
    name, kind = instruction.parts
    destination, source, count = instruction.operands
    value, amount = np.broadcast_arrays(block.read(source, kind), block.read(count, "u32"))
    bits = bits_of(kind)
    small = np.minimum(amount, bits - 1).astype(value.dtype)
    shifted = value << small if name == "shl" else value >> small
    if name == "shl" or kind[0] != "s":
        shifted = np.where(amount >= bits, np.zeros_like(value), shifted)
    block.write(destination, shifted, kind)


@opcode("shf")
def funnel_shift(block: Block, instruction: Instruction) -> None:
    _, direction, mode, _ = instruction.parts
    destination, *operands = instruction.operands
    low, high, amount = (block.read(operand, "u32").astype(np.uint64) for operand in operands)
    amount = amount & np.uint64(31) if mode == "wrap" else np.minimum(amount, np.uint64(32))
    both = (high << np.uint64(32)) | low
    value = (both << amount) >> np.uint64(32) if direction == "l" else both >> amount
    block.write(destination, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32), "b32")


@opcode("bfe")
def extract_field(block: Block, instruction: Instruction) -> None:
    kind = instruction.parts[1]
    destination, source, position, length = instruction.operands
    bits = bits_of(kind)
    value = block.read(source, kind)
    start, count = (block.read(operand, "u32").astype(np.int64) & 255 for operand in (position, length))
    place = np.arange(bits)
    raw = value.view(UNSIGNED[bits]).astype(np.uint64)[..., None] >> place.astype(np.uint64) & np.uint64(1)
    top = np.minimum(start + count - 1, bits - 1)
    raw, start, count, top = np.broadcast_arrays(raw, start[..., None], count[..., None], top[..., None])
    fill = np.take_along_axis(raw, np.maximum(top, 0), -1) if kind[0] == "s" else np.zeros_like(raw)
    fill = np.where(count == 0, 0, fill)
    source_at = start + place
    taken = np.take_along_axis(raw, np.minimum(source_at, bits - 1), -1)
    result = np.where((place < count) & (source_at < bits), taken, fill).astype(np.uint64)
    total = (result << place.astype(np.uint64)).sum(-1, dtype=np.uint64)
    block.write(destination, total.astype(UNSIGNED[bits]), f"b{bits}")


@opcode("bfi")
def insert_field(block: Block, instruction: Instruction) -> None:
    destination, field, base, position, length = instruction.operands
    kind = instruction.parts[1]
    bits = bits_of(kind)
    field, base = (block.read(operand, kind).astype(object) for operand in (field, base))
    start, count = (block.read(operand, "u32").astype(object) & 255 for operand in (position, length))
    mask = ((1 << np.minimum(count, bits)) - 1) << np.minimum(start, bits)
    value = (base & ~mask) | ((field << np.minimum(start, bits)) & mask)
    block.write(destination, (value & ((1 << bits) - 1)).astype(UNSIGNED[bits]), kind)


@opcode("prmt")
def permute(block: Block, instruction: Instruction) -> None:
    if len(instruction.parts) != 2:
        raise PtxError("only the generic mode of prmt is known")
    destination, *operands = instruction.operands
    a, b, selector = (block.read(operand, "u32").astype(np.uint64) for operand in operands)
    both = a | (b << np.uint64(32))
    value = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint64)
    for place in range(4):
        choice = (selector >> np.uint64(4 * place)) & np.uint64(15)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        replicated = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        value |= np.where(choice & np.uint64(8), replicated, byte) << np.uint64(8 * place)
    block.write(destination, value.astype(np.uint32), "b32")


@opcode("popc", "clz", "brev")
def bit_count(block: Block, instruction: Instruction) -> None:
    name, kind = instruction.parts
    bits = bits_of(kind)
    value = block.read(instruction.operands[1], kind).astype(np.uint64)
    digits = (value[:, None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    if name == "popc":
        block.write(instruction.operands[0], digits.sum(1), "u32")
    elif name == "clz":
        block.write(instruction.operands[0], np.where(digits.any(1), digits[:, ::-1].argmax(1), bits), "u32")
    else:
        mirrored = (digits[:, ::-1] << np.arange(bits, dtype=np.uint64)).sum(1, dtype=np.uint64)
        block.write(instruction.operands[0], mirrored.astype(UNSIGNED[bits]), kind)


@opcode("dp4a")
def dot_product(block: Block, instruction: Instruction) -> None:
    _, a_kind, b_kind = instruction.parts
    destination, first, second, accumulator = instruction.operands
    types = {"s32": SIGNED[8], "u32": UNSIGNED[8]}
    a = block.read(first, "b32").view(types[a_kind]).reshape(-1, 4).astype(np.int64)
    b = block.read(second, "b32").view(types[b_kind]).reshape(-1, 4).astype(np.int64)
    value = (a * b).sum(1) + block.read(accumulator, "s32")
    block.write(destination, (value & 0xFFFFFFFF).astype(np.uint32), "b32")


def compare(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The comparisons of setp; those of floats that end in u hold for NaN."""
    ordered = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    }  # fmt: skip
    if a.dtype.kind != "f":
        return ordered[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    if len(name) == 3:
        return unordered | ordered[name[:2]](a, b)
    return ~unordered & ordered[name](a, b)


@opcode("setp")
def set_predicate(block: Block, instruction: Instruction) -> None:
    name, kind = instruction.parts[1], instruction.parts[-1]
    destination, first, second, *rest = instruction.operands
    holds = compare(name, _values(block, first, kind), _values(block, second, kind))
    targets = getattr(destination, "elements", (destination,))
    for target, value in zip(targets, (holds, ~holds), strict=False):
        if rest:
            value = LOGIC[instruction.parts[2]](value, block.read(rest[0], "pred"))
        block.write(target, value, "pred")


@opcode("selp")
def select(block: Block, instruction: Instruction) -> None:
    kind = instruction.parts[1]
    destination, first, second, predicate = instruction.operands
    kind = f"b{bits_of(kind)}"
    holds = block.read(predicate, "pred")
    block.write(destination, np.where(holds, block.read(first, kind), block.read(second, kind)), kind)
