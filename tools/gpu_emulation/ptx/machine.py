"""A block of threads: registers as NumPy vectors over the threads, control flow, and the launch of a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .memory import GlobalMemory, SharedMemory, Traffic
from .program import (
    Address,
    Discard,
    Immediate,
    Instruction,
    Kernel,
    PtxError,
    Register,
    Special,
    Symbol,
    Vector,
    parse,
)

WARP = 32
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
# The NumPy type that holds each PTX type; bf16 is held as its bits.
DTYPES = {
    **{f"{letter}{bits}": dtype for letter in "ub" for bits, dtype in UNSIGNED.items()},
    **{f"s{bits}": dtype for bits, dtype in SIGNED.items()},
    "f16": np.float16,
    "bf16": np.uint16,
    "f32": np.float32,
    "f64": np.float64,
}
DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32", "s16x2": "s16", "u16x2": "u16"}

HANDLERS: dict[str, Callable[[Block, Instruction], None]] = {}


def opcode(*names: str):
    """Register what the instructions of these names do."""

    def register(function):
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


def bits_of(kind: str) -> int:
    """Bits of a PTX type."""
    return 8 * DTYPES[kind].itemsize if kind in DTYPES else 16 * DTYPES[PACKED[kind]].itemsize


@dataclass
class Statistics:
    """Warp instructions by opcode, and what memory they moved."""

    instructions: Counter = field(default_factory=Counter)
    traffic: Traffic = field(default_factory=Traffic)


class Block:
    """The threads of one block, run to their end by `run`."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        arguments: dict[str, int],
        shape: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
        shared_bytes: int,
        statistics: Statistics | None,
    ) -> None:
        grid, block, position = shape
        self.kernel, self.memory, self.arguments, self.statistics = kernel, memory, arguments, statistics
        self.size = int(np.prod(block))
        self.number = (position[2] * grid[1] + position[1]) * grid[0] + position[0]
        traffic = statistics.traffic if statistics else Traffic()
        self.shared = SharedMemory(-(-kernel.shared_bytes // 16) * 16 + shared_bytes, traffic)
        self.registers: dict[str, np.ndarray] = {}
        self.at = 0  # the instruction that is executed
        self.together: int | None = 0  # the next one, while all threads are at the same; else see pc
        self.pc = np.zeros(self.size, np.int64)
        self.waiting = np.zeros(self.size, bool)
        self.threads = np.arange(self.size)
        self.active: slice | np.ndarray = slice(None)
        self.copies: list[list] = []  # pending cp.async: threads, their groups, addresses, data
        self.products: list[list] = [[]]  # pending wgmma by group, the last one open
        self.committed = np.zeros(self.size, np.int64)
        self.special = self._special_registers(grid, block, position)

    def _special_registers(self, grid, block, position) -> dict[str, np.ndarray]:
        thread = self.threads.astype(np.uint32)
        special = {
            "tid.x": thread % block[0],
            "tid.y": thread // block[0] % block[1],
            "tid.z": thread // (block[0] * block[1]),
            "laneid": thread % WARP,
            "warpid": thread // WARP,
        }
        for axis, letter in enumerate("xyz"):
            for name, values in (("ntid", block), ("nctaid", grid), ("ctaid", position)):
                special[f"{name}.{letter}"] = np.full(self.size, values[axis], np.uint32)
        return special

    @property
    def lanes(self) -> np.ndarray:
        """Numbers of the active threads."""
        return self.threads[self.active]

    @property
    def warps(self) -> np.ndarray:
        """Warps of the active threads."""
        return self.lanes // WARP

    def _held(self, register: Register) -> np.ndarray:
        """The register of all threads: noise until it is written, for compilers read what they then do not use."""
        if register.name not in self.registers:
            noise = np.random.default_rng(len(self.registers)).bytes(8 * self.size)
            values = np.frombuffer(noise, UNSIGNED[max(8, register.width)])[: self.size].copy()
            self.registers[register.name] = values & 1 == 1 if register.width == 1 else values
        return self.registers[register.name]

    def _raw(self, operand) -> np.ndarray:
        """Bits of an operand for the active threads; shape (1,) for constants."""
        if isinstance(operand, Register):
            value = self._held(operand)[self.active]
            return ~value if operand.negated else value
        if isinstance(operand, Immediate):
            return np.array([operand.bits & 0xFFFFFFFFFFFFFFFF], np.uint64)
        if isinstance(operand, Special):
            return self.special[operand.name][self.active]
        if isinstance(operand, Symbol) and operand.name in self.kernel.shared:
            return np.array([self.kernel.shared[operand.name]], np.uint64)
        raise PtxError(f"cannot take the value of {operand}")

    def read(self, operand, kind: str) -> np.ndarray:
        """Values of an operand as the type `kind`; packed types have two elements in a last axis."""
        if kind == "pred":
            return self._raw(operand).astype(bool)
        if kind in PACKED:
            element = DTYPES[PACKED[kind]]
            return self.read(operand, f"b{bits_of(kind)}").view(element).reshape(-1, 2)
        dtype = DTYPES[kind]
        if isinstance(operand, Vector):  # packed into one value, the first element lowest
            width = bits_of(kind) // len(operand.elements)
            total = np.zeros(len(self.lanes), np.uint64)
            for place, element in enumerate(operand.elements):
                total |= self.read(element, f"b{width}").astype(np.uint64) << np.uint64(place * width)
            return total.astype(UNSIGNED[bits_of(kind)]).view(dtype)
        raw = self._raw(operand)
        if raw.dtype.itemsize != dtype.itemsize:
            raw = raw.astype(UNSIGNED[8 * dtype.itemsize])
        return raw.view(dtype)

    def write(self, operand, values: np.ndarray, kind: str) -> None:
        """Set an operand for the active threads; what is narrower than its register is extended by its sign."""
        if isinstance(operand, Discard):
            return
        if kind == "pred":
            self._store(operand, values)
            return
        if kind in PACKED:
            values = np.ascontiguousarray(values.astype(DTYPES[PACKED[kind]])).view(UNSIGNED[bits_of(kind)])[:, 0]
            self._store(operand, values)
            return
        values = np.ascontiguousarray(values.astype(DTYPES[kind], copy=False))
        if isinstance(operand, Vector):
            width = bits_of(kind) // len(operand.elements)
            raw = values.view(UNSIGNED[bits_of(kind)])
            for place, element in enumerate(operand.elements):
                self.write(element, (raw >> (place * width)).astype(UNSIGNED[width]), f"b{width}")
            return
        if values.dtype.kind == "i":
            values = values.astype(SIGNED[operand.width]).view(UNSIGNED[operand.width])
        self._store(operand, values.view(UNSIGNED[8 * values.dtype.itemsize]))

    def _store(self, register: Register, values: np.ndarray) -> None:
        dtype = bool if register.width == 1 else UNSIGNED[register.width]
        if isinstance(self.active, slice):
            held = np.empty(self.size, dtype)
            held[:] = values
            self.registers[register.name] = held
            return
        self._held(register)[self.active] = values

    def address(self, operand: Address, shared: bool) -> np.ndarray:
        """Byte addresses of the active threads."""
        base = self.read(operand.base, "u32" if shared else "u64").astype(np.int64)
        return np.broadcast_to(base, self.lanes.shape) + operand.offset

    def full_warps(self) -> int:
        """How many warps are active; all their threads must be."""
        lanes = self.lanes
        if len(lanes) % WARP or (lanes.reshape(-1, WARP) % WARP != np.arange(WARP)).any():
            raise PtxError("an instruction of whole warps is executed by part of one")
        return len(lanes) // WARP

    def run(self) -> None:
        """Execute until all threads have returned. Of threads at different places the one furthest back goes first."""
        while self._choose_threads():
            instruction = self.kernel.code[self.at]
            if not self._apply_guard(instruction):
                continue
            try:
                self._execute(instruction)
            except PtxError as error:
                raise PtxError(f"{error}\nin `{instruction.text}` of {self.kernel.name}, block {self.number}") from None
        if self.copies:
            raise PtxError(f"{self.kernel.name} ends before its cp.async were waited for")
        if any(self.products):
            raise PtxError(f"{self.kernel.name} ends before its wgmma were waited for")

    def _choose_threads(self) -> bool:
        """Make active those that execute instruction `at` next, and move them on; False if none is left."""
        end = len(self.kernel.code)
        if self.together is None:
            running = self.pc < end
            ready = running & ~self.waiting
            if not ready.any():
                self.waiting[:] = False
                self.shared.barrier()
                ready = running
            if ready.any():
                self.at = int(self.pc[ready].min())
                chosen = ready & (self.pc == self.at)
                if not chosen.all():
                    self.active = np.flatnonzero(chosen)
                    self.pc[self.active] += 1
                    return True
            self.together = self.at if running.any() else end
        if self.together >= end:
            return False
        self.at, self.together = self.together, self.together + 1
        self.active = slice(None)
        return True

    def _jump(self, target: int) -> None:
        """Send the active threads to an instruction."""
        if isinstance(self.active, slice):
            self.together = target
            return
        if self.together is not None:
            self.pc[:] = self.together
            self.together = None
        self.pc[self.active] = target

    def _apply_guard(self, instruction: Instruction) -> bool:
        """Narrow the active threads to those whose predicate holds; whether any is left."""
        if instruction.guard is None:
            return True
        holds = self.read(instruction.guard, "pred")
        if not holds.all():
            self.active = self.lanes[holds]
        return bool(holds.any())

    def _barrier(self, instruction: Instruction) -> None:
        if instruction.parts[:2] == ("bar", "warp"):
            return  # races are told apart by warp only
        name, *count = (operand.bits for operand in instruction.operands)
        if name != 0 or any(number != self.size for number in count):
            raise PtxError("only barrier 0 for the whole block is known")
        if isinstance(self.active, slice):
            self.shared.barrier()
            return
        self._jump(self.at + 1)
        self.waiting[self.active] = True

    def _execute(self, instruction: Instruction) -> None:
        name = instruction.parts[0]
        if self.statistics is not None:
            self.statistics.instructions[".".join(instruction.parts)] += len(np.unique(self.warps))
        if name == "bra":
            self._jump(self.kernel.labels[instruction.operands[0].name])
        elif name in ("ret", "exit"):
            self._jump(len(self.kernel.code))
        elif name in ("bar", "barrier"):
            self._barrier(instruction)
        elif name in HANDLERS:
            HANDLERS[name](self, instruction)
        else:
            raise PtxError(f"unknown instruction {name}")


def launch(
    ptx: str | Kernel,
    grid: Sequence[int],
    threads: int,
    arguments: Sequence[np.ndarray | int],
    shared_bytes: int = 0,
    *,
    undefined: Sequence[np.ndarray] = (),
    memory: GlobalMemory | None = None,
    statistics: Statistics | None = None,
) -> GlobalMemory:
    """Run a kernel over a grid; arrays are used in place.

    Args:
        ptx: text with one entry, or a parsed kernel.
        grid: blocks along x, y, z.
        threads: of a block.
        arguments: contiguous arrays and integers, or a structure as the integer of its bytes. Parameters beyond them
            are 0.
        shared_bytes: dynamic shared memory of a block.
        undefined: those of the arrays that may not be read before they are written.
        memory: what addresses in the arguments lie in, besides the arrays.
        statistics: what to count into.

    Returns:
        The global memory, which knows what was written.

    Raises:
        PtxError: for what the ISA leaves undefined: see `memory`.
    """
    from . import arithmetic, conversion, movement, warp, warpgroup  # noqa: F401  (they register their instructions)

    if isinstance(ptx, str):
        (kernel,) = parse(ptx).values()
    else:
        kernel = ptx
    memory = memory or GlobalMemory()
    if statistics is not None:
        memory.traffic = statistics.traffic
    values = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            values.append(memory.add(argument, all(argument is not array for array in undefined)))
        else:
            values.append(argument)
    values += [0] * (len(kernel.parameters) - len(values))
    named = {name: value for (name, _), value in zip(kernel.parameters, values, strict=True)}
    sizes = (*grid, 1, 1, 1)[:3]
    with np.errstate(all="ignore"):
        for z in range(sizes[2]):
            for y in range(sizes[1]):
                for x in range(sizes[0]):
                    shape = (sizes, (threads, 1, 1), (x, y, z))
                    Block(kernel, memory, named, shape, shared_bytes, statistics).run()
    return memory
