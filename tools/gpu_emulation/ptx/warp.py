"""What the threads of a warp do together: shuffles, votes, matrices (PTX ISA 9.7.9, 9.7.13, 9.7.14)."""

from __future__ import annotations

import numpy as np

from .conversion import bfloat16_values
from .machine import WARP, Block, opcode
from .movement import _check_alignment
from .program import Instruction, PtxError, Vector

LANE = np.arange(WARP)
ROW, PAIR = LANE // 4, LANE % 4  # groupID and threadID_in_group of the ISA's fragment layouts


def _by_warp(block: Block, operand, kind: str) -> np.ndarray:
    """[warps, 32] values of an operand."""
    count = block.full_warps()
    return np.broadcast_to(block.read(operand, kind), (count * WARP,)).reshape(count, WARP)


def _check_members(block: Block, operand) -> None:
    if (_by_warp(block, operand, "u32") != 0xFFFFFFFF).any():
        raise PtxError("only the member mask of a full warp is known")


@opcode("shfl")
def shuffle(block: Block, instruction: Instruction) -> None:
    mode = instruction.parts[2]
    destination, source, choice, limits, members = instruction.operands
    _check_members(block, members)
    value, b, c = (_by_warp(block, operand, "u32") for operand in (source, choice, limits))
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    high = (LANE & segment) | (clamp & ~segment & 31)
    low = LANE & segment
    if mode == "up":
        lane = LANE - b.astype(np.int64)
        inside = lane >= high
    else:
        lane = {"down": LANE + b, "bfly": LANE ^ b, "idx": low | (b & ~segment & 31)}[mode].astype(np.int64)
        inside = lane <= high
    lane = np.where(inside, lane, LANE)
    taken = np.take_along_axis(value, lane, 1).reshape(-1)
    targets = destination.elements if isinstance(destination, Vector) else (destination,)
    block.write(targets[0], taken, "u32")
    if len(targets) == 2:
        block.write(targets[1], inside.reshape(-1), "pred")


@opcode("vote")
def vote(block: Block, instruction: Instruction) -> None:
    mode = instruction.parts[2]
    destination, source, members = instruction.operands
    _check_members(block, members)
    holds = _by_warp(block, source, "pred")
    if mode == "ballot":
        ballot = (holds.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)
        block.write(destination, np.repeat(ballot, WARP), "b32")
        return
    result = {"all": holds.all(1), "any": holds.any(1), "uni": holds.all(1) | ~holds.any(1)}[mode]
    block.write(destination, np.repeat(result, WARP), "pred")


@opcode("redux")
def reduce_warp(block: Block, instruction: Instruction) -> None:
    operation, kind = instruction.parts[2], instruction.parts[3]
    destination, source, members = instruction.operands
    _check_members(block, members)
    functions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }  # fmt: skip
    result = functions[operation].reduce(_by_warp(block, source, kind), axis=1)
    block.write(destination, np.repeat(result, WARP), kind)


@opcode("ldmatrix")
def load_matrices(block: Block, instruction: Instruction) -> None:
    """8 x 8 matrices of 16 bits: lanes 8j..8j+7 hold the addresses of the rows of matrix j."""
    destination, source = instruction.operands
    registers = destination.elements
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        raise PtxError("only ldmatrix.m8n8 of b16 is known")
    count, address = block.full_warps(), block.address(source, True).reshape(-1, WARP)
    warps = block.warps.reshape(-1, WARP)
    for number, register in enumerate(registers):
        rows = address[:, 8 * number : 8 * number + 8].reshape(-1)
        _check_alignment(rows, 16)
        owners = np.ascontiguousarray(warps[:, :8]).reshape(-1)
        if block.statistics is not None:
            block.shared.count(rows, 16, owners)
        matrix = block.shared.load(rows, 16, owners).reshape(count, 8, 8, 2)
        if "trans" in instruction.parts:
            matrix = matrix.transpose(0, 2, 1, 3)
        block.write(register, np.ascontiguousarray(matrix).reshape(-1).view(np.uint32), "b32")


@opcode("stmatrix")
def store_matrices(block: Block, instruction: Instruction) -> None:
    """The inverse of ldmatrix."""
    target, source = instruction.operands
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        raise PtxError("only stmatrix.m8n8 of b16 is known")
    count, address = block.full_warps(), block.address(target, True).reshape(-1, WARP)
    owners = np.ascontiguousarray(block.warps.reshape(-1, WARP)[:, :8]).reshape(-1)
    for number, register in enumerate(source.elements):
        rows = address[:, 8 * number : 8 * number + 8].reshape(-1)
        _check_alignment(rows, 16)
        values = np.ascontiguousarray(_by_warp(block, register, "b32"))
        matrix = values.view(np.uint16).reshape(count, 8, 8)
        if "trans" in instruction.parts:
            matrix = matrix.transpose(0, 2, 1)
        if block.statistics is not None:
            block.shared.count(rows, 16, owners)
        block.shared.store(rows, np.ascontiguousarray(matrix).view(np.uint8).reshape(-1, 16), owners)


def _fragment(block: Block, operand, kind: str, rows: int, depth: int) -> np.ndarray:
    """[warps, rows, depth] of the factor A (16 rows) or B (8 columns), as the ISA spreads it over the lanes.

    A register holds `per` neighbours along the depth. Registers follow each other first down the rows, by 8, then
    along the depth, by four registers' worth.
    """
    dtypes = {"s8": np.int8, "u8": np.uint8, "f16": np.float16, "bf16": np.uint16}
    per = 4 // np.dtype(dtypes[kind]).itemsize
    row_steps = rows // 8
    if len(operand.elements) != row_steps * depth // (4 * per):
        raise PtxError(f"mma takes another number of registers than {len(operand.elements)}")
    count = block.full_warps()
    out = np.empty((count, rows, depth), np.float64)
    for number, register in enumerate(operand.elements):
        values = np.ascontiguousarray(_by_warp(block, register, "b32")).view(dtypes[kind]).reshape(count, WARP, per)
        if kind == "bf16":
            values = bfloat16_values(values)
        row = ROW + 8 * (number % row_steps)
        for place in range(per):
            out[:, row, per * PAIR + place + 4 * per * (number // row_steps)] = values[:, :, place]
    return out


@opcode("mma")
def multiply_matrices(block: Block, instruction: Instruction) -> None:
    """D = A B + C on m16n8 tiles. Integers are exact; floats are summed in float64 and rounded once."""
    parts = instruction.parts
    to, a_kind, b_kind, _ = parts[-4:]
    if parts[4:6] != ("row", "col") or not parts[3].startswith("m16n8k"):
        raise PtxError("unknown shape of mma")
    depth = int(parts[3].removeprefix("m16n8k"))
    destination, first, second, accumulator = instruction.operands
    product = _fragment(block, first, a_kind, 16, depth) @ _fragment(block, second, b_kind, 8, depth).transpose(0, 2, 1)
    if to not in ("s32", "f32"):
        raise PtxError(f"mma to {to} is not known")
    results = []
    for number in range(len(destination.elements)):
        at = product[:, ROW + 8 * (number // 2), 2 * PAIR + number % 2]
        total = at + _by_warp(block, accumulator.elements[number], to).astype(np.float64)
        if to == "s32":
            if "satfinite" in parts:
                total = np.clip(total, -(2.0**31), 2.0**31 - 1)
            total = (total.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
        results.append(total.reshape(-1).astype(np.float32 if to == "f32" else np.int32))
    for register, values in zip(destination.elements, results, strict=True):  # which may be those of the accumulator
        block.write(register, values, to)
