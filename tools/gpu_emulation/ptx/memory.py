"""Global buffers and the shared memory of a block, with the checks a GPU does not make.

Addresses come as int64 vectors, data as uint8 [threads, bytes].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .program import PtxError

NOBODY = -1
SEVERAL = -2
SECTOR = 32
BANKS = 32


@dataclass
class Buffer:
    """One allocation of global memory.

    Attributes:
        base: its address.
        data: its bytes, shared with the caller's array.
        defined: which bytes hold a value; None: all.
        writer: the block that wrote each byte.
    """

    base: int
    data: np.ndarray
    defined: np.ndarray | None = None
    writer: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.writer = np.full(len(self.data), NOBODY, np.int32)


@dataclass
class Traffic:
    """What the accesses of a launch cost beside what they must.

    Attributes:
        sectors, least_sectors: 32-byte pieces of global memory touched by the warps, and the fewest for their bytes.
        wavefronts, least_wavefronts: passes through the banks of shared memory, and the fewest.
        global_bytes: asked for by the threads.
    """

    sectors: int = 0
    least_sectors: int = 0
    wavefronts: int = 0
    least_wavefronts: int = 0
    global_bytes: int = 0


class GlobalMemory:
    """Buffers, a page apart, so that what runs over the end of one lies in none."""

    GAP = 4096

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.next = 1 << 40
        self.traffic = Traffic()

    def add_in_place(self, array: np.ndarray, defined: bool = True) -> None:
        """A contiguous array at the address it has in this process."""
        data = array.reshape(-1).view(np.uint8)
        self.buffers.append(Buffer(array.ctypes.data, data, None if defined else np.zeros(len(data), bool)))

    def add(self, array: np.ndarray, defined: bool = True) -> int:
        """The address of a contiguous array, as far from a multiple of 16 as in this process; used in place."""
        if not array.flags.c_contiguous:
            raise ValueError("array must be contiguous")
        data = array.reshape(-1).view(np.uint8)
        buffer = Buffer(self.next + array.ctypes.data % 16, data, None if defined else np.zeros(len(data), bool))
        self.buffers.append(buffer)
        self.next += -(-(len(data) + 16) // self.GAP) * self.GAP + self.GAP
        return buffer.base

    def _pieces(self, address: np.ndarray, size: int):
        """(buffer, threads, byte indices) for each buffer that is touched."""
        left = np.ones(len(address), bool)
        for buffer in self.buffers:
            inside = (address >= buffer.base) & (address + size <= buffer.base + len(buffer.data))
            if inside.any():
                left &= ~inside
                yield buffer, inside, (address[inside] - buffer.base)[:, None] + np.arange(size)
        if left.any():
            raise PtxError(f"global access of {size} bytes out of bounds at {int(address[left][0]):#x}")

    def load(self, address: np.ndarray, size: int, block: int) -> np.ndarray:
        out = np.empty((len(address), size), np.uint8)
        for buffer, threads, at in self._pieces(address, size):
            if buffer.defined is not None and not buffer.defined[at].all():
                raise PtxError("global load of bytes that were never written")
            writer = buffer.writer[at]
            if ((writer != NOBODY) & (writer != block)).any():
                raise PtxError("global load of bytes that another block writes")
            out[threads] = buffer.data[at]
        return out

    def store(self, address: np.ndarray, values: np.ndarray, block: int) -> None:
        for buffer, threads, at in self._pieces(address, values.shape[1]):
            writer = buffer.writer[at]
            if ((writer != NOBODY) & (writer != block)).any():
                raise PtxError("global store to bytes that another block writes")
            buffer.data[at] = values[threads]
            if (buffer.data[at] != values[threads]).any():
                raise PtxError("global store of different values to one byte by one instruction")
            buffer.writer[at] = block
            if buffer.defined is not None:
                buffer.defined[at] = True

    def cell(self, address: int, dtype: np.dtype) -> np.ndarray:
        """One value in place, for an atomic."""
        for buffer in self.buffers:
            start = address - buffer.base
            if 0 <= start <= len(buffer.data) - dtype.itemsize:
                return buffer.data[start : start + dtype.itemsize].view(dtype)
        raise PtxError(f"atomic out of bounds at {address:#x}")

    def count(self, address: np.ndarray, size: int, warp: np.ndarray) -> None:
        """Add the sectors of one instruction to the traffic."""
        first, last = address // SECTOR, (address + size - 1) // SECTOR
        for number in np.unique(warp):
            mine = warp == number
            sectors = np.union1d(first[mine], last[mine])
            distinct = len(np.unique(address[mine])) * size
            self.traffic.sectors += len(sectors)
            self.traffic.least_sectors += -(-distinct // SECTOR)
        self.traffic.global_bytes += len(address) * size


class SharedMemory:
    """The shared memory of a block.

    Between two barriers no byte may be written by one warp and touched by another. A byte that cp.async is still to
    fill may not be touched at all until the thread that asked for it has waited.
    """

    def __init__(self, size: int, traffic: Traffic) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        self.defined = np.zeros(size, bool)
        self.in_flight = np.zeros(size, np.int16)
        self.epoch = 1
        self.write_epoch = np.zeros(size, np.int32)
        self.read_epoch = np.zeros(size, np.int32)
        self.write_warp = np.full(size, NOBODY, np.int32)
        self.read_warp = np.full(size, NOBODY, np.int32)
        self.traffic = traffic

    def barrier(self) -> None:
        """What came before is ordered with what comes after, for all threads."""
        self.epoch += 1

    def _indices(self, address: np.ndarray, size: int) -> np.ndarray:
        if len(address) and (address.min() < 0 or address.max() + size > len(self.data)):
            raise PtxError(f"shared access out of bounds at {int(address.min())}..{int(address.max()) + size}")
        return address[:, None] + np.arange(size)

    def _written(self, at: np.ndarray, warp: np.ndarray) -> None:
        other = (self.write_epoch[at] == self.epoch) & (self.write_warp[at] != warp[:, None])
        other |= (self.read_epoch[at] == self.epoch) & (self.read_warp[at] != warp[:, None])
        if other.any():
            raise PtxError(f"shared memory race: write to byte {int(at[other][0])} that another warp touches")
        self.write_epoch[at] = self.epoch
        self.write_warp[at] = warp[:, None]

    def load(self, address: np.ndarray, size: int, warp: np.ndarray) -> np.ndarray:
        at = self._indices(address, size)
        if self.in_flight[at].any():
            raise PtxError("shared load of bytes that cp.async has not delivered")
        if not self.defined[at].all():
            raise PtxError(f"shared load of byte {int(at[~self.defined[at]][0])}, which was never written")
        other = (self.write_epoch[at] == self.epoch) & (self.write_warp[at] != warp[:, None])
        if other.any():
            raise PtxError(f"shared memory race: read of byte {int(at[other][0])} that another warp writes")
        again = (self.read_epoch[at] == self.epoch) & (self.read_warp[at] != warp[:, None])
        self.read_epoch[at] = self.epoch
        self.read_warp[at] = np.where(again, SEVERAL, np.broadcast_to(warp[:, None], at.shape))
        return self.data[at]

    def store(self, address: np.ndarray, values: np.ndarray, warp: np.ndarray) -> None:
        at = self._indices(address, values.shape[1])
        if self.in_flight[at].any():
            raise PtxError("shared store to bytes that cp.async has not delivered")
        self._written(at, warp)
        self.data[at] = values
        if (self.data[at] != values).any():
            raise PtxError("shared store of different values to one byte by one instruction")
        self.defined[at] = True

    def begin_copy(self, address: np.ndarray, size: int, warp: np.ndarray) -> None:
        """cp.async: from now on the bytes are not to be touched."""
        at = self._indices(address, size)
        if self.in_flight[at].any():
            raise PtxError("cp.async to bytes that another cp.async has not delivered")
        self._written(at, warp)
        self.in_flight[at] += 1

    def end_copy(self, address: np.ndarray, values: np.ndarray, warp: np.ndarray) -> None:
        """The data arrives, as late as the program allows."""
        at = self._indices(address, values.shape[1])
        self.in_flight[at] -= 1
        self._written(at, warp)
        self.data[at] = values
        self.defined[at] = True

    def count(self, address: np.ndarray, size: int, warp: np.ndarray) -> None:
        """Add the passes through the banks that one instruction needs: 128 bytes of distinct banks each."""
        words = address[:, None] // 4 + np.arange(max(1, size // 4))
        for number in np.unique(warp):
            distinct = np.unique(words[warp == number])
            self.traffic.wavefronts += int(np.bincount(distinct % BANKS, minlength=BANKS).max())
            self.traffic.least_wavefronts += -(-len(distinct) // BANKS)
