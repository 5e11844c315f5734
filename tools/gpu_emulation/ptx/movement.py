"""Loads, stores, asynchronous copies and atomics (PTX ISA 9.7.9 and 9.7.13)."""

from __future__ import annotations

import numpy as np

from .machine import DTYPES, UNSIGNED, Block, bits_of, opcode
from .program import Instruction, PtxError, Register, Vector


def _elements(operand) -> tuple:
    return operand.elements if isinstance(operand, Vector) else (operand,)


def _space(instruction: Instruction) -> bool:
    """Whether the instruction is about shared memory; global otherwise."""
    found = {"shared", "global"} & set(instruction.parts)
    if len(found) != 1:
        raise PtxError("only global and shared addresses are known")
    return found == {"shared"}


def _check_alignment(address: np.ndarray, size: int) -> None:
    if (address % size).any():
        raise PtxError(f"address {int(address[address % size != 0][0]):#x} is not a multiple of {size}")


def _load_bytes(block: Block, address: np.ndarray, size: int, shared: bool) -> np.ndarray:
    memory = block.shared if shared else block.memory
    if block.statistics is not None:
        memory.count(address, size, block.warps)
    return memory.load(address, size, block.warps if shared else block.number)


def _store_bytes(block: Block, address: np.ndarray, values: np.ndarray, shared: bool) -> None:
    memory = block.shared if shared else block.memory
    if block.statistics is not None:
        memory.count(address, values.shape[1], block.warps)
    memory.store(address, values, block.warps if shared else block.number)


@opcode("ld")
def load(block: Block, instruction: Instruction) -> None:
    kind = instruction.parts[-1]
    destination, source = instruction.operands[:2]
    if "param" in instruction.parts:
        value = block.arguments[source.base.name] >> 8 * source.offset
        for element in _elements(destination):
            low = value & ((1 << bits_of(kind)) - 1)
            block.write(element, np.array([low], UNSIGNED[bits_of(kind)]).view(DTYPES[kind]), kind)
            value >>= bits_of(kind)
        return
    shared, elements, size = _space(instruction), _elements(destination), bits_of(kind) // 8
    address = block.address(source, shared)
    _check_alignment(address, size * len(elements))
    data = _load_bytes(block, address, size * len(elements), shared)
    for place, element in enumerate(elements):
        piece = np.ascontiguousarray(data[:, place * size : (place + 1) * size])
        block.write(element, piece.view(DTYPES[kind])[:, 0], kind)


@opcode("st")
def store(block: Block, instruction: Instruction) -> None:
    kind = f"b{bits_of(instruction.parts[-1])}"
    destination, source = instruction.operands
    shared, elements, size = _space(instruction), _elements(source), bits_of(kind) // 8
    address = block.address(destination, shared)
    _check_alignment(address, size * len(elements))
    data = np.empty((len(address), size * len(elements)), np.uint8)
    for place, element in enumerate(elements):
        value = np.broadcast_to(block.read(element, kind), address.shape)
        data[:, place * size : (place + 1) * size] = np.ascontiguousarray(value).view(np.uint8).reshape(-1, size)
    _store_bytes(block, address, data, shared)


@opcode("cp")
def copy_async(block: Block, instruction: Instruction) -> None:
    """cp.async: the data arrive when the thread waits for their group, the latest moment the ISA allows."""
    parts = instruction.parts
    if parts[1] != "async" or "bulk" in parts:
        raise PtxError("only the non-bulk cp.async is known")
    if "commit_group" in parts:
        block.committed[block.active] += 1
    elif "wait_group" in parts or "wait_all" in parts:
        _wait(block, 0 if "wait_all" in parts else instruction.operands[0].bits, "wait_all" in parts)
    else:
        _begin_copy(block, instruction)


def _begin_copy(block: Block, instruction: Instruction) -> None:
    destination, source, size, *rest = instruction.operands
    size = size.bits
    target, origin = block.address(destination, True), block.address(source, False)
    _check_alignment(target, size)
    _check_alignment(origin, size)
    wanted = np.broadcast_to(block.read(rest[0], "u32"), target.shape) if rest else np.full(target.shape, size)
    data = np.zeros((len(target), size), np.uint8)
    for count in np.unique(wanted[wanted > 0]):
        those = wanted == count
        if count > size:
            raise PtxError("cp.async copies more than its size")
        data[those, :count] = block.memory.load(origin[those], int(count), block.number)
        if block.statistics is not None:
            block.memory.count(origin[those], int(count), block.warps[those])
    block.shared.begin_copy(target, size, block.warps)
    block.copies.append([block.lanes, block.committed[block.active].copy(), target, data])


def _wait(block: Block, allowed: int, uncommitted: bool) -> None:
    """Deliver the copies of the active threads but those of their last `allowed` committed groups."""
    waiting = np.zeros(block.size, bool)
    waiting[block.active] = True
    left = []
    for threads, groups, target, data in block.copies:
        due = waiting[threads] & ((groups < block.committed[threads] - allowed) | uncommitted)
        if due.any():
            block.shared.end_copy(target[due], data[due], threads[due] // 32)
        if not due.all():
            left.append([threads[~due], groups[~due], target[~due], data[~due]])
    block.copies = left


_ATOMICS = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
}


@opcode("atom", "red")
def atomic(block: Block, instruction: Instruction) -> None:
    """Thread after thread. Atomics on global memory may meet those of other blocks."""
    name, kind = instruction.parts[0], instruction.parts[-1]
    (operation,) = set(instruction.parts) & {*_ATOMICS, "cas"}
    destination, target, *operands = ((None,) if name == "red" else ()) + instruction.operands
    if _space(instruction):
        raise PtxError("atomics on shared memory are not known")
    address, dtype = block.address(target, False), DTYPES[kind]
    _check_alignment(address, dtype.itemsize)
    operands = [np.broadcast_to(block.read(operand, kind), address.shape) for operand in operands]
    old = np.empty(len(address), dtype)
    for thread, place in enumerate(address):
        cell = block.memory.cell(int(place), dtype)
        old[thread] = cell[0]
        if operation == "cas":
            compared, new = operands[0][thread], operands[1][thread]
            cell[0] = new if old[thread] == compared else old[thread]
        else:
            cell[0] = _ATOMICS[operation](old[thread], operands[0][thread])
    if isinstance(destination, Register):
        block.write(destination, old, kind)
