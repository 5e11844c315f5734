// Integer products on tensor cores: a block computes a tile of the result, its warps parts of it by 16 x 8 x 32
// products. Both factors come through a ring of tiles in shared memory, which cp.async fills some tiles ahead.
//
// NOTE [interleaved]: a 32-bit word of a 4-bit weight holds k = 8 t .. 8 t + 7 for a lane t = lane % 4. Its even
// nibbles are one register of the product's factor and its odd ones the other; so position 16 r + 4 t + b of 32 values
// of x must be k = 8 t + 2 b + r. The quantization of x writes that order (Order::interleaved), and unpacking needs no
// shuffle.
#include "cuda/int_matmul.h"

#include "cuda/device.cuh"
#include "cuda/rules.cuh"
#include "cuda/tiles.cuh"

namespace qk::cuda {

constexpr int kStep = 32;   // depth of a product
constexpr int kDepth = 64;  // depth of a tile

// Accumulators of grouped products start as the bits of 1.5 * 2^23, whose last place is 1: as a float they are that
// number plus the sum, exactly, as long as |sum| < 2^22; 128 * 127 * 128 is. No conversion is needed.
constexpr int32_t kFloatBias = 0x4b400000;

template <TileSize kSize>
struct Tile;
template <>
struct Tile<TileSize::rows16> {
  static constexpr int kRows = 16, kColumns = 32, kWarpRows = 16, kWarpColumns = 16, kStages = 8;
};
template <>
struct Tile<TileSize::square64> {
  static constexpr int kRows = 64, kColumns = 64, kWarpRows = 32, kWarpColumns = 32, kStages = 4;
};
template <>
struct Tile<TileSize::square128> {
  static constexpr int kRows = 128, kColumns = 128, kWarpRows = 64, kWarpColumns = 32, kStages = 3;
};

// The kernel for a tile size, a storage, with or without groups, and for aligned rows or any.
template <TileSize kSize, Storage kStorage, bool kGrouped, bool kAligned>
struct IntMatmul : WarpTile<Tile<kSize>> {
  using T = Tile<kSize>;
  using Base = WarpTile<T>;
  using Base::column0, Base::g, Base::lane, Base::row0, Base::row_of, Base::t, Base::warp_column, Base::warp_row;
  static constexpr int kThreads = Base::kThreads, kRowTiles = Base::kRowTiles, kColumnTiles = Base::kColumnTiles;
  static constexpr bool kAcross = kStorage == Storage::int8_across;
  static constexpr Reads kReads = kAcross ? Reads::across : Reads::neighbours;
  static constexpr int kWeightRows = kAcross ? kDepth : T::kColumns;
  static constexpr int kWeightRowBytes = kAcross ? T::kColumns : (kStorage == Storage::int4 ? kDepth / 2 : kDepth);
  static constexpr int kXBytes = T::kRows * kDepth, kStageBytes = kXBytes + kWeightRows * kWeightRowBytes;
  static constexpr int kSharedBytes = T::kStages * kStageBytes;
  // Of large tiles two fit on a processor if a thread has at most 128 registers, which only the plainest get by with.
  static constexpr int kBlocks = kSize == TileSize::square128 && kStorage == Storage::int8 && !kGrouped ? 2 : 1;
  static_assert(kSharedBytes <= 48 * 1024, "more would have to be asked for");

  // What a group of the weight brings to the columns of a lane: scales of columns 2 t, + 1 of each tile of 8, and the
  // zero point, four times, of column g.
  struct Group {
    float scale[kColumnTiles][2];
    uint32_t zero[kColumnTiles];
  };

  const IntMatmulArgs& args;
  int32_t acc[kRowTiles][kColumnTiles][4];
  float total[kGrouped ? kRowTiles : 1][kGrouped ? kColumnTiles : 1][4];
  Group group;

  __device__ __forceinline__ explicit IntMatmul(const IntMatmulArgs& args) : Base(args.m, args.n), args(args) {}

  // Across, a register of the factor holds every other column of 16.
  __device__ __forceinline__ int column_of(int j, int e) const {
    return kAcross ? column0 + warp_column + 16 * (j / 2) + 4 * t + 2 * e + j % 2 : Base::column_of(j, e);
  }

  __device__ __forceinline__ void copy_stage(int tile) const {
    uint8_t* const to = shared_memory() + tile % T::kStages * kStageBytes;
    const int begin = tile * kDepth;
    const int x_size = kStorage == Storage::int4 ? (args.k + kStep - 1) / kStep * kStep : args.k;
    copy_window<T::kRows, kDepth, kThreads, kAligned>(
        to, {reinterpret_cast<const uint8_t*>(args.x), args.x_stride, args.m, x_size, row0, begin});
    const Window along = {args.weight, args.weight_stride,
                          args.n,      args.weight_stride,
                          column0,     kStorage == Storage::int4 ? begin / 2 : begin};
    const Window across = {args.weight, args.weight_stride, args.k, args.n, begin, column0};
    copy_window<kWeightRows, kWeightRowBytes, kThreads, kAligned, kReads>(to + kXBytes, kAcross ? across : along);
  }

  __device__ __forceinline__ void load_x(const uint8_t* tile, int step, uint32_t (&a)[kRowTiles][4]) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      load_matrices(a[i], tile + swizzled<kDepth>(warp_row + 16 * i + lane % 16, 2 * step + lane / 16));
    }
  }

  // int8: the factors of one step. int4: words of both steps.
  __device__ __forceinline__ void load_weight(const uint8_t* tile, int step, uint32_t (&b)[kColumnTiles][2]) const {
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t r[4];
      if (kAcross) {
        // Transposed, a register holds two rows of two columns. The rows are chosen so that a lane gets 4 t, + 1 in one
        // and 4 t + 2, + 3 in the next: the four bytes of each column that its factor needs, after a permutation.
        const int matrix = lane / 8, i = lane % 8;
        const int row = kStep * step + 16 * (matrix / 2) + 2 * (matrix % 2) + 4 * (i / 2) + i % 2;
        load_matrices_transposed(
            r, tile + swizzled<kWeightRowBytes, Reads::across>(row, (warp_column + 8 * j) / kCopyBytes));
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          b[j + odd][0] = permute_bytes(r[0], r[1], odd ? 0x7531 : 0x6420);
          b[j + odd][1] = permute_bytes(r[2], r[3], odd ? 0x7531 : 0x6420);
        }
      } else {
        const int row = warp_column + 8 * j + lane / 16 * 8 + lane % 8;
        const int chunk = (kStorage == Storage::int4 ? 0 : 2 * step) + lane / 8 % 2;
        load_matrices(r, tile + swizzled<kWeightRowBytes>(row, chunk));
        b[j][0] = r[0];
        b[j][1] = r[1];
        b[j + 1][0] = r[2];
        b[j + 1][1] = r[3];
      }
    }
  }

  // Four nibbles minus a zero point, as bytes: 128 is added so that no byte borrows, and taken away by its sign bit.
  __device__ __forceinline__ static uint32_t unpack(uint32_t nibbles, uint32_t zero) {
    return (and_or(nibbles, 0x0f0f0f0f, 0x80808080) - zero) ^ 0x80808080;
  }

  __device__ __forceinline__ void load_group(int k) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      if (kStorage == Storage::int4) {
        const uint32_t index = group_index(column0 + warp_column + 8 * j + g, args.n, args.w_shift, k, args.k);
        group.zero[j] = (args.zeros == nullptr ? 8 : args.zeros[index]) * 0x01010101u;
      }
#pragma unroll
      for (int e = 0; e < 2 && kGrouped; ++e) {
        const uint32_t index = group_index(column_of(j, e), args.n, args.w_shift, k, args.k);
        group.scale[j][e] = args.w_shift != kWholeRow ? args.scales[index] : 1.0f;
      }
    }
  }

  __device__ __forceinline__ void restart() {
#pragma unroll
    for (auto& row : acc) {
#pragma unroll
      for (auto& tile : row) {
#pragma unroll
        for (auto& v : tile) v = kGrouped ? kFloatBias : 0;
      }
    }
  }

  // Adds the sums of the group that holds k to the total.
  __device__ __forceinline__ void finish_group(int k) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t index = group_index(row_of(i, h), args.m, args.x_shift, k, args.k);
        const float x_scale = args.x_shift != kWholeRow ? args.x_scales[index] : 1.0f;
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float sum = __fsub_rn(__int_as_float(acc[i][j][2 * h + e]), __int_as_float(kFloatBias));
            // A factor of 1 leaves the other scale as it is.
            const float scale = __fmul_rn(x_scale, group.scale[j][e]);
            total[i][j][2 * h + e] = __fadd_rn(total[i][j][2 * h + e], __fmul_rn(sum, scale));
          }
        }
      }
    }
    restart();
  }

  __device__ __forceinline__ void multiply_stage(int tile, unsigned finest) {
    const uint8_t* const stage = shared_memory() + tile % T::kStages * kStageBytes;
    uint32_t words[kColumnTiles][2];
    if (kStorage == Storage::int4) load_weight(stage + kXBytes, 0, words);
#pragma unroll
    for (int step = 0; step < kDepth / kStep; ++step) {
      const int k = tile * kDepth + step * kStep;
      if (kGrouped && k >= args.k) break;
      uint32_t a[kRowTiles][4], b[kColumnTiles][2];
      load_x(stage, step, a);
      if (kStorage != Storage::int4) load_weight(stage + kXBytes, step, b);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        if (kStorage == Storage::int4) {
          b[j][0] = unpack(words[j][step], group.zero[j]);
          b[j][1] = unpack(words[j][step] >> 4, group.zero[j]);
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) multiply_int8(acc[i][j], a[i], b[j]);
      }
      const int next = k + kStep;
      if (kGrouped && ((static_cast<unsigned>(next) & (finest - 1)) == 0 || next >= args.k)) {
        finish_group(k);
        if (next < args.k) load_group(next);
      }
    }
  }

  __device__ __forceinline__ void run() {
    const unsigned finest = 1u << (args.x_shift < args.w_shift ? args.x_shift : args.w_shift);
    if (kGrouped) {
#pragma unroll
      for (auto& row : total) {
#pragma unroll
        for (auto& tile : row) {
#pragma unroll
          for (auto& v : tile) v = 0.0f;
        }
      }
    }
    restart();
    load_group(0);
    const auto copy = [&](int tile) { copy_stage(tile); };
    const auto multiply = [&](int tile) { multiply_stage(tile, finest); };
    pipeline<T::kStages>((args.k + kDepth - 1) / kDepth, copy, multiply);
    store();
  }

  __device__ __forceinline__ float result(int i, int j, int h, int e, float x_scale, float scale, float bias) const {
    float y;
    if (kGrouped) {
      y = total[i][j][2 * h + e];
      if (args.w_shift == kWholeRow) {
        y = __fmul_rn(y, scale);
      } else if (args.x_shift == kWholeRow) {
        y = __fmul_rn(y, x_scale);
      }
    } else {
      const float sum = __int2float_rn(acc[i][j][2 * h + e]);
      y = __fmul_rn(sum, args.scales != nullptr ? __fmul_rn(x_scale, scale) : x_scale);
    }
    return args.bias.data != nullptr ? __fadd_rn(y, bias) : y;
  }

  __device__ __forceinline__ void store() const {
    float x_scale[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        x_scale[i][h] = args.x_shift == kWholeRow && row_of(i, h) < args.m ? args.x_scales[row_of(i, h)] : 1.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = column_of(j, e) < args.n ? column_of(j, e) : args.n - 1;
        const float scale = args.w_shift == kWholeRow && args.scales != nullptr ? args.scales[n] : 1.0f;
        const float bias = args.bias.data != nullptr ? load_float(args.bias.data, n, args.bias.dtype) : 0.0f;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int m = row_of(i, h);
            const float y = result(i, j, h, e, x_scale[i][h], scale, bias);
            if (m < args.m && column_of(j, e) < args.n)
              store_float(args.out, int64_t{m} * args.n + n, args.out_dtype, y);
          }
        }
      }
    }
  }
};

template <TileSize kSize, Storage kStorage, bool kGrouped, bool kAligned>
__global__ void __launch_bounds__(IntMatmul<kSize, kStorage, kGrouped, kAligned>::kThreads,
                                  IntMatmul<kSize, kStorage, kGrouped, kAligned>::kBlocks)
    int_matmul_kernel(const IntMatmulArgs args) {
  IntMatmul<kSize, kStorage, kGrouped, kAligned>(args).run();
}

template <TileSize kSize, Storage kStorage, bool kGrouped, bool kAligned>
cudaError_t start(const IntMatmulArgs& args, cudaStream_t stream) {
  using Kernel = IntMatmul<kSize, kStorage, kGrouped, kAligned>;
  const int64_t tiles = div_up(args.m, Kernel::T::kRows) * div_up(args.n, Kernel::T::kColumns);
  return launch(int_matmul_kernel<kSize, kStorage, kGrouped, kAligned>, dim3(static_cast<unsigned>(tiles)),
                Kernel::kThreads, Kernel::kSharedBytes, stream, args);
}

template <Storage kStorage, bool kGrouped>
cudaError_t start(const IntMatmulArgs& args, const TileChoice& choice, cudaStream_t stream) {
  if (!choice.aligned) return start<TileSize::square64, kStorage, kGrouped, false>(args, stream);
  if (choice.size == TileSize::square128) return start<TileSize::square128, kStorage, kGrouped, true>(args, stream);
  if constexpr (kStorage != Storage::int8_across) {
    if (choice.size == TileSize::rows16) return start<TileSize::rows16, kStorage, kGrouped, true>(args, stream);
  }
  return start<TileSize::square64, kStorage, kGrouped, true>(args, stream);
}

TileChoice choose_tile(const IntMatmulArgs& args, Storage storage, int processors) {
  const auto at_16 = [](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % kCopyBytes == 0 && stride % kCopyBytes == 0;
  };
  if (!at_16(args.x, args.x_stride) || !at_16(args.weight, args.weight_stride)) {
    return {TileSize::square64, false, "rows do not start at multiples of 16 bytes: read by bytes, without cp.async"};
  }
  if (args.m <= 16 && storage != Storage::int8_across) {
    return {TileSize::rows16, true, "at most 16 rows: bound by the bytes of the weight; narrow tiles, deep pipeline"};
  }
  if (args.m > 64 && div_up(args.m, 128) * div_up(args.n, 128) >= processors) {
    return {TileSize::square128, true, "tiles of 128 x 128 occupy every processor: most products for each byte read"};
  }
  return {TileSize::square64, true, "tiles of 64 x 64, for larger ones would leave processors idle"};
}

cudaError_t int_matmul(const IntMatmulArgs& args, Storage storage, int processors, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  const TileChoice choice = choose_tile(args, storage, processors);
  switch (storage) {
    case Storage::int8:
      return args.grouped() ? start<Storage::int8, true>(args, choice, stream)
                            : start<Storage::int8, false>(args, choice, stream);
    case Storage::int4:
      return args.grouped() ? start<Storage::int4, true>(args, choice, stream)
                            : start<Storage::int4, false>(args, choice, stream);
    default:
      return start<Storage::int8_across, false>(args, choice, stream);
  }
}

}  // namespace qk::cuda
