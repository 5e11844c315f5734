// What the matrix products share: how tiles lie in shared memory, how they are copied there, and which tile is whose.
#pragma once

#include "cuda/device.cuh"

namespace qk::cuda {

constexpr int kChunk = 16;  // bytes of a copy, and of a row that ldmatrix reads
constexpr int kLine = 128;  // bytes of all banks of shared memory

// Offset of a chunk in a tile with rows of kRowBytes. The chunks of a line are permuted by the number of the line, so
// that the eight rows from which ldmatrix reads the same chunk lie in eight different groups of banks. kAcross: those
// rows are 0, 1, 4, 5, 8, 9, 12, 13 and the same + 2, instead of neighbours.
template <int kRowBytes, bool kAcross = false>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int kRowsOfLine = kLine / kRowBytes, kChunks = kRowBytes / kChunk;
  const int line = kAcross ? (kRowsOfLine == 1 ? (row & 1) | (row >> 2 << 1) : row >> 2) : row / kRowsOfLine;
  return row * kRowBytes + ((chunk ^ (line & (kChunks - 1))) * kChunk);
}

// Rows `first` to `first` + kRows of a matrix of bytes, from byte `begin` of each, with zeros outside of it.
struct Window {
  const uint8_t* data;
  int64_t stride;      // of a row
  int64_t rows, size;  // rows of the matrix, bytes of a row
  int64_t first, begin;
};

// Begins the copy of a window to shared memory. Rows that are not aligned are read by bytes, and at once.
template <int kRows, int kRowBytes, int kThreads, bool kAligned, bool kAcross = false>
__device__ __forceinline__ void copy_window(uint8_t* tile, const Window& from) {
  constexpr int kChunks = kRowBytes / kChunk, kTotal = kRows * kChunks;
#pragma unroll
  for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads;
    if (kTotal % kThreads != 0 && index >= kTotal) break;
    const int row = index / kChunks, chunk = index % kChunks;
    const int64_t left = from.first + row < from.rows ? from.size - from.begin - chunk * kChunk : 0;
    const int bytes = left <= 0 ? 0 : (left < kChunk ? static_cast<int>(left) : kChunk);
    // An address is formed even of what is not read: it must lie within the matrix.
    const int64_t offset = bytes == 0 ? 0 : (from.first + row) * from.stride + from.begin + chunk * kChunk;
    uint8_t* const to = tile + swizzled<kRowBytes, kAcross>(row, chunk);
    if (kAligned) {
      copy_async_16(to, from.data + offset, bytes);
    } else {
      Words4 words = {};
#pragma unroll
      for (int b = 0; b < kChunk; ++b) {
        if (b < bytes) words.w[b / 4] |= uint32_t{from.data[offset + b]} << 8 * (b % 4);
      }
      store_16(to, words);
    }
  }
}

struct Place {
  int64_t row, column;
};

// Tiles in swaths of eight rows of tiles, columns first: what runs at the same time shares its factors in L2.
__device__ __forceinline__ Place tile_place(int64_t index, int64_t row_tiles, int64_t column_tiles) {
  constexpr int64_t kSwath = 8;
  const int64_t swath = index / (kSwath * column_tiles), within = index % (kSwath * column_tiles);
  const int64_t left = row_tiles - kSwath * swath, rows = left < kSwath ? left : kSwath;
  return {kSwath * swath + within % rows, within / rows};
}

}  // namespace qk::cuda
