"""wgmma of sm_90 with both factors in shared memory (PTX ISA 9.7.15), as far as int8 products need it.

A warp group is 128 threads. Its products are computed when it waits for them, the latest moment the ISA allows: until
then the registers keep their old values and the shared memory is not read. Fences between proxies are not modelled.
"""

from __future__ import annotations

import numpy as np

from .machine import WARP, Block, opcode
from .program import Instruction, PtxError
from .warp import LANE, PAIR, ROW

GROUP = 4 * WARP
# Bytes of a row of the swizzled tile by the descriptor's mode, and the bits of the row that move its 16-byte pieces.
SWIZZLE = {1: (128, 7), 2: (64, 3), 3: (32, 1)}
ROWS, DEPTH = 64, 32  # of A, in elements of a byte


@opcode("fence")
def fence(block: Block, instruction: Instruction) -> None:
    if instruction.parts[1:3] != ("proxy", "async"):
        raise PtxError("only the fence of the asynchronous proxy is known")


@opcode("wgmma")
def warpgroup_multiply(block: Block, instruction: Instruction) -> None:
    name = instruction.parts[1]
    if name == "mma_async":
        _begin(block, instruction)
    elif name == "commit_group":
        block.products.append([])
    elif name == "wait_group":
        while len(block.products) - 1 > instruction.operands[0].bits:
            for product in block.products.pop(0):
                _multiply(block, *product)
    elif name != "fence":
        raise PtxError(f"wgmma.{name} is not known")


def _begin(block: Block, instruction: Instruction) -> None:
    if instruction.parts[-3:] != ("s32", "s8", "s8") or len(instruction.operands) != 4:
        raise PtxError("only wgmma of s8 from two descriptors is known")
    if not isinstance(block.active, slice) or block.size % GROUP:
        raise PtxError("wgmma is executed by part of a warp group")
    registers, *descriptors, accumulate = instruction.operands
    descriptors = [np.broadcast_to(block.read(operand, "u64"), block.size) for operand in descriptors]
    accumulate = np.broadcast_to(block.read(accumulate, "pred"), block.size)
    for values in (*descriptors, accumulate):
        if (values.reshape(-1, GROUP) != values[::GROUP, None]).any():
            raise PtxError("the threads of a warp group disagree about an operand of wgmma")
    columns = int(instruction.parts[4].split("n")[1].split("k")[0])
    block.products[-1].append((registers.elements, *(d.copy() for d in descriptors), accumulate.copy(), columns))


def _matrix(block: Block, descriptor: int, rows: int, warp: int) -> np.ndarray:
    """int64 [rows, DEPTH] of the K-major matrix a descriptor describes."""
    start, stride, mode = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, descriptor >> 62
    if mode not in SWIZZLE or descriptor >> 49 & 7:
        raise PtxError("only swizzled matrices without a base offset are known")
    width, mask = SWIZZLE[mode]
    row, piece = np.divmod(np.arange(2 * rows), 2)
    address = start + row // 8 * stride + row % 8 * width + 16 * piece
    address ^= (address >> 7 & mask) << 4
    data = block.shared.load(address, 16, np.full(len(address), warp))
    return data.view(np.int8).reshape(rows, DEPTH).astype(np.int64)


def _multiply(block: Block, registers, first, second, accumulate, columns: int) -> None:
    results = np.empty((len(registers), block.size), np.int64)
    for start in range(0, block.size, GROUP):
        warp = start // WARP
        a = _matrix(block, int(first[start]), ROWS, warp)
        product = a @ _matrix(block, int(second[start]), columns, warp).T
        for lane_start in range(0, GROUP, WARP):
            slab = product[lane_start // 2 : lane_start // 2 + 16]
            for number in range(len(registers)):
                column = 8 * (number // 4) + 2 * PAIR + number % 2
                results[number, start + lane_start + LANE] = slab[ROW + 8 * (number % 4 // 2), column]
    active, block.active = block.active, slice(None)
    for register, values in zip(registers, results, strict=True):
        total = values + np.where(accumulate, block.read(register, "s32"), 0)
        block.write(register, (total & 0xFFFFFFFF).astype(np.uint32).view(np.int32), "s32")
    block.active = active
