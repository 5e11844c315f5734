// What the matrix products share: how tiles lie in shared memory, how they are copied there, and which tile is whose.
#pragma once

#include "cuda/device.cuh"

namespace qk::cuda {

constexpr int kCopyBytes = 16;  // bytes of a copy, and of a row that ldmatrix reads
constexpr int kLine = 128;      // bytes of all banks of shared memory

// What is read at once from a tile, and must lie in different banks: the same chunk of eight neighbouring rows
// (ldmatrix), of rows 0, 1, 4, 5, 8, 9, 12, 13 or the same + 2 (ldmatrix across), or half of each of several
// neighbouring rows.
enum class Reads { neighbours, across, halves };

// Offset of a chunk in a tile with rows of kRowBytes: the chunks of a line are permuted by a number of the line.
template <int kRowBytes, Reads kReads = Reads::neighbours>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int kRowsOfLine = kLine / kRowBytes, kChunks = kRowBytes / kCopyBytes;
  int number = row / kRowsOfLine & (kChunks - 1);
  if (kReads == Reads::across) number = (kRowsOfLine == 1 ? (row & 1) | (row >> 2 << 1) : row >> 2) & (kChunks - 1);
  if (kReads == Reads::halves) number = (row / kRowsOfLine & 1) * (kChunks / 2);
  return row * kRowBytes + ((chunk ^ number) * kCopyBytes);
}

// Rows `first` to `first` + kRows of a matrix of bytes, from byte `begin` of each, with zeros outside of it.
struct Window {
  const uint8_t* data;
  int64_t stride;      // of a row
  int64_t rows, size;  // rows of the matrix, bytes of a row
  int64_t first, begin;
};

// Begins the copy of a window to shared memory. Rows that are not aligned are read by bytes, and at once.
template <int kRows, int kRowBytes, int kThreads, bool kAligned, Reads kReads = Reads::neighbours>
__device__ __forceinline__ void copy_window(uint8_t* tile, const Window& from) {
  constexpr int kChunks = kRowBytes / kCopyBytes, kTotal = kRows * kChunks;
#pragma unroll
  for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads;
    if (kTotal % kThreads != 0 && index >= kTotal) break;
    const int row = index / kChunks, chunk = index % kChunks;
    const int64_t left = from.first + row < from.rows ? from.size - from.begin - chunk * kCopyBytes : 0;
    const int bytes = left <= 0 ? 0 : (left < kCopyBytes ? static_cast<int>(left) : kCopyBytes);
    // An address is formed even of what is not read: it must lie within the matrix.
    const int64_t offset = bytes == 0 ? 0 : (from.first + row) * from.stride + from.begin + chunk * kCopyBytes;
    uint8_t* const to = tile + swizzled<kRowBytes, kReads>(row, chunk);
    if (kAligned) {
      copy_async_16(to, from.data + offset, bytes);
    } else {
      Words4 words = {};
#pragma unroll
      for (int b = 0; b < kCopyBytes; ++b) {
        if (b < bytes) words.w[b / 4] |= uint32_t{from.data[offset + b]} << 8 * (b % 4);
      }
      store_16(to, words);
    }
  }
}

// Runs multiply(tile) for each tile once copy(tile) has filled its place in a ring of kStages, which is kept as full as
// it can be.
template <int kStages, class Copy, class Multiply>
__device__ __forceinline__ void pipeline(int tiles, Copy copy, Multiply multiply) {
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < tiles) copy(tile);
    commit_copies();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    // After these the tile is there for all, and all are done with the one before, which is overwritten next.
    wait_copies<kStages - 2>();
    sync_block();
    if (tile + kStages - 1 < tiles) copy(tile + kStages - 1);
    commit_copies();
    multiply(tile);
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

// The part of a block's tile that a warp computes in tiles of 16 x 8, and what of it a lane holds. T has kRows,
// kColumns, kWarpRows and kWarpColumns.
template <class T>
struct WarpTile {
  static constexpr int kWarpsAcross = T::kColumns / T::kWarpColumns;
  static constexpr int kThreads = 32 * (T::kRows / T::kWarpRows) * kWarpsAcross;
  static constexpr int kRowTiles = T::kWarpRows / 16, kColumnTiles = T::kWarpColumns / 8;

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_row = warp / kWarpsAcross * T::kWarpRows, warp_column = warp % kWarpsAcross * T::kWarpColumns;
  int row0, column0;  // of the block's tile

  __device__ __forceinline__ WarpTile(int m, int n) {
    const Place place = tile_place(blockIdx.x, (m + T::kRows - 1) / T::kRows, (n + T::kColumns - 1) / T::kColumns);
    row0 = static_cast<int>(place.row) * T::kRows;
    column0 = static_cast<int>(place.column) * T::kColumns;
  }

  // Row of registers 2 h, + 1 of row tile i.
  __device__ __forceinline__ int row_of(int i, int h) const { return row0 + warp_row + 16 * i + g + 8 * h; }

  // Column of registers e, + 2 of column tile j.
  __device__ __forceinline__ int column_of(int j, int e) const { return column0 + warp_column + 8 * j + 2 * t + e; }
};

// Place of the scale of k in row `row` of a matrix with one for each group of 2^shift; rows past the last count as it.
__device__ __forceinline__ uint32_t group_index(int row, int rows, int shift, int k, int depth) {
  const uint32_t groups = (static_cast<uint32_t>(depth - 1) >> shift) + 1;
  return static_cast<uint32_t>(row < rows ? row : rows - 1) * groups + static_cast<uint32_t>(k >> shift);
}

}  // namespace qk::cuda
