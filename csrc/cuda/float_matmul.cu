// Products of floats with a quantized weight on tensor cores: stored integers become floats in registers, exactly, and
// each group's sum is scaled in float32.
//
// NOTE [halves]: 8 values k = 8 t .. 8 t + 7 of a row belong to a lane t = lane % 4. Pair i of a factor is (k = 8 t +
// i, 8 t + i + 4), for so the nibbles of a 32-bit word come in pairs with one shift and one mask; two products of depth
// 16 take pairs 0, 1 and 2, 3.
#include "cuda/float_matmul.h"

#include "cuda/device.cuh"
#include "cuda/int_matmul.h"
#include "cuda/rules.cuh"
#include "cuda/tiles.cuh"

namespace qk::cuda {

constexpr int kStep = 32;   // depth of two products
constexpr int kDepth = 64;  // depth of a tile

// Few rows: narrow tiles occupy more processors, and a deep pipeline hides the memory. More: the products count.
struct FewRows {
  static constexpr int kRows = 16, kColumns = 32, kWarpRows = 16, kWarpColumns = 16, kStages = 8;
};
struct ManyRows {
  static constexpr int kRows = 64, kColumns = 64, kWarpRows = 32, kWarpColumns = 32, kStages = 4;
};

// The integers of a word as pairs of kType, i and i + 4.
template <DType kType, int kBits>
struct Unpack;

// (bits & 15) | 1024: 1024 + nibble in float16.
template <>
struct Unpack<DType::float16, 4> {
  __device__ __forceinline__ static uint32_t offset(uint32_t zero) { return (0x6400u + zero) * 0x00010001u; }
  __device__ __forceinline__ static uint32_t pair(const Words2& words, int i, uint32_t offset) {
    return subtract_float16(and_or(words.w[0] >> 4 * i, 0x000f000f, 0x64006400), offset);
  }
};

// (bits & 15) | 128: 128 + nibble in bfloat16. The offset is negative.
template <>
struct Unpack<DType::bfloat16, 4> {
  __device__ __forceinline__ static uint32_t offset(uint32_t zero) { return (0xc300u + zero) * 0x00010001u; }
  __device__ __forceinline__ static uint32_t pair(const Words2& words, int i, uint32_t offset) {
    return add_bfloat16(and_or(words.w[0] >> 4 * i, 0x000f000f, 0x43004300), offset);
  }
};

// (byte ^ 128) | 1024: 1024 + 128 + byte in float16.
template <>
struct Unpack<DType::float16, 8> {
  __device__ __forceinline__ static uint32_t offset(uint32_t) { return 0x64806480u; }
  __device__ __forceinline__ static uint32_t pair(const Words2& words, int i, uint32_t offset) {
    const uint32_t bytes = permute_bytes(words.w[0], words.w[1], static_cast<uint32_t>(i * 0x0101 + 0x0400));
    return subtract_float16(and_or(bytes ^ 0x00800080u, 0x00ff00ff, 0x64006400), offset);
  }
};

// bfloat16 has 8 digits: by way of 2^23 + 128 + byte in float32, whose difference is exact in its upper half.
template <>
struct Unpack<DType::bfloat16, 8> {
  __device__ __forceinline__ static uint32_t offset(uint32_t) { return 0; }
  __device__ __forceinline__ static uint32_t value(uint32_t word, int i) {
    const uint32_t bits = permute_bytes(word ^ 0x80808080u, 0x4b000000u, static_cast<uint32_t>(0x7440 + i));
    return __float_as_uint(__fsub_rn(__uint_as_float(bits), 8388736.0f));
  }
  __device__ __forceinline__ static uint32_t pair(const Words2& words, int i, uint32_t) {
    return permute_bytes(value(words.w[0], i), value(words.w[1], i), 0x7632);
  }
};

template <class T_, DType kType, int kBits, bool kGrouped, bool kAligned>
struct FloatMatmul : WarpTile<T_> {
  using T = T_;
  using Base = WarpTile<T>;
  using Base::column0, Base::column_of, Base::g, Base::lane, Base::row0, Base::row_of, Base::t, Base::warp_column,
      Base::warp_row;
  static constexpr int kThreads = Base::kThreads, kRowTiles = Base::kRowTiles, kColumnTiles = Base::kColumnTiles;
  static constexpr int kXRowBytes = 2 * kDepth, kWeightRowBytes = kDepth * kBits / 8;
  static constexpr int kXBytes = T::kRows * kXRowBytes, kStageBytes = kXBytes + T::kColumns * kWeightRowBytes;
  static constexpr int kSharedBytes = T::kStages * kStageBytes;
  static constexpr Reads kWeightReads = kBits == 4 ? Reads::neighbours : Reads::halves;
  static_assert(kSharedBytes <= 48 * 1024, "more would have to be asked for");

  const FloatMatmulArgs& args;
  const int begin, end;  // of k
  float acc[kRowTiles][kColumnTiles][4], total[kGrouped ? kRowTiles : 1][kGrouped ? kColumnTiles : 1][4];
  float scale[kColumnTiles][2];   // of the group, for the columns of the lane's results
  uint32_t offset[kColumnTiles];  // of the group, for column g

  __device__ __forceinline__ explicit FloatMatmul(const FloatMatmulArgs& args)
      : Base(args.m, args.n),
        args(args),
        begin(static_cast<int>(blockIdx.y) * args.slice),
        end(min(begin + args.slice, args.k)) {}

  __device__ __forceinline__ void copy_stage(int tile) const {
    uint8_t* const to = shared_memory() + tile % T::kStages * kStageBytes;
    const int first = begin + tile * kDepth;
    copy_window<T::kRows, kXRowBytes, kThreads, kAligned, Reads::halves>(
        to, {static_cast<const uint8_t*>(args.x), int64_t{2} * args.k, args.m, int64_t{2} * end, row0, 2 * first});
    const int64_t row_bytes = kBits == 8 ? args.k : (args.k + 1) / 2;
    copy_window<T::kColumns, kWeightRowBytes, kThreads, kAligned, kWeightReads>(
        to + kXBytes, {args.weight, row_bytes, args.n, row_bytes, column0, first * kBits / 8});
  }

  __device__ __forceinline__ void load_group(int k) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      if (kBits == 4) {
        const uint32_t index = group_index(column0 + warp_column + 8 * j + g, args.n, args.w_shift, k, args.k);
        offset[j] = Unpack<kType, kBits>::offset(args.zeros == nullptr ? 8 : args.zeros[index]);
      } else {
        offset[j] = Unpack<kType, kBits>::offset(0);
      }
#pragma unroll
      for (int e = 0; e < 2 && kGrouped; ++e) {
        scale[j][e] = args.scales[group_index(column_of(j, e), args.n, args.w_shift, k, args.k)];
      }
    }
  }

  // Pairs of x: registers 2 i + h of rows g + 8 h.
  __device__ __forceinline__ void load_x(const uint8_t* tile, int step, uint32_t (&a)[kRowTiles][8]) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Words4 x =
            load_16(tile + swizzled<kXRowBytes, Reads::halves>(warp_row + 16 * i + g + 8 * h, 4 * step + t));
        a[i][h] = permute_bytes(x.w[0], x.w[2], 0x5410);
        a[i][2 + h] = permute_bytes(x.w[0], x.w[2], 0x7632);
        a[i][4 + h] = permute_bytes(x.w[1], x.w[3], 0x5410);
        a[i][6 + h] = permute_bytes(x.w[1], x.w[3], 0x7632);
      }
    }
  }

  // The words of column g of each column tile, of both steps.
  __device__ __forceinline__ void load_weight(const uint8_t* tile, Words2 (&words)[kColumnTiles][2]) const {
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      if (kBits == 4) {
        uint32_t r[4];
        const int row = warp_column + 8 * j + lane / 16 * 8 + lane % 8;
        load_matrices(r, tile + swizzled<kWeightRowBytes>(row, lane / 8 % 2));
        words[j][0].w[0] = r[0];
        words[j][1].w[0] = r[1];
        words[j + 1][0].w[0] = r[2];
        words[j + 1][1].w[0] = r[3];
      } else {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const int row = warp_column + 8 * (j + s / 2) + g, chunk = 2 * (s % 2) + t / 2;
          words[j + s / 2][s % 2] = load_8(tile + swizzled<kWeightRowBytes, Reads::halves>(row, chunk) + t % 2 * 8);
        }
      }
    }
  }

  __device__ __forceinline__ void clear(float (&sums)[kRowTiles][kColumnTiles][4]) const {
#pragma unroll
    for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i) sums[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] = 0;
  }

  __device__ __forceinline__ void finish_group() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          total[i][j][r] = __fadd_rn(total[i][j][r], __fmul_rn(acc[i][j][r], scale[j][r % 2]));
        }
      }
    }
    clear(acc);
  }

  __device__ __forceinline__ void multiply_stage(int tile) {
    const uint8_t* const stage = shared_memory() + tile % T::kStages * kStageBytes;
    Words2 words[kColumnTiles][2];
    load_weight(stage + kXBytes, words);
#pragma unroll
    for (int step = 0; step < kDepth / kStep; ++step) {
      const int k = begin + tile * kDepth + step * kStep, next = k + kStep;
      if (kGrouped && k >= end) break;
      uint32_t a[kRowTiles][8];
      load_x(stage, step, a);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int product = 0; product < 2; ++product) {
          const uint32_t b[2] = {Unpack<kType, kBits>::pair(words[j][step], 2 * product, offset[j]),
                                 Unpack<kType, kBits>::pair(words[j][step], 2 * product + 1, offset[j])};
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            const uint32_t (&pairs)[8] = a[i];
            const uint32_t half[4] = {pairs[4 * product], pairs[4 * product + 1], pairs[4 * product + 2],
                                      pairs[4 * product + 3]};
            if (kType == DType::float16) {
              multiply_float16(acc[i][j], half, b);
            } else {
              multiply_bfloat16(acc[i][j], half, b);
            }
          }
        }
      }
      if (kGrouped && ((static_cast<unsigned>(next) & ((1u << args.w_shift) - 1)) == 0 || next >= end)) {
        finish_group();
        if (next < end) load_group(next);
      }
    }
  }

  __device__ __forceinline__ void run() {
    clear(acc);
    if constexpr (kGrouped) clear(total);
    load_group(begin);
    const auto copy = [&](int tile) { copy_stage(tile); };
    const auto multiply = [&](int tile) { multiply_stage(tile); };
    pipeline<T::kStages>((end - begin + kDepth - 1) / kDepth, copy, multiply);
    store();
  }

  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = min(column_of(j, e), args.n - 1);
        const float factor = kGrouped || args.parts != nullptr ? 1.0f : args.scales[n];
        const float bias = args.bias.data != nullptr ? load_float(args.bias.data, n, args.bias.dtype) : 0.0f;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int m = row_of(i, h);
            if (m >= args.m || column_of(j, e) >= args.n) continue;
            const float sum = kGrouped ? total[kGrouped ? i : 0][kGrouped ? j : 0][2 * h + e] : acc[i][j][2 * h + e];
            const int64_t place = int64_t{m} * args.n + n;
            if (args.parts != nullptr) {
              args.parts[blockIdx.y * int64_t{args.m} * args.n + place] = sum;
            } else {
              store_float(args.out, place, args.out_dtype, __fadd_rn(__fmul_rn(sum, factor), bias));
            }
          }
        }
      }
    }
  }
};

template <class T, DType kType, int kBits, bool kGrouped, bool kAligned>
__global__ void __launch_bounds__(FloatMatmul<T, kType, kBits, kGrouped, kAligned>::kThreads, 1)
    float_matmul_kernel(const FloatMatmulArgs args) {
  FloatMatmul<T, kType, kBits, kGrouped, kAligned>(args).run();
}

constexpr int kReduceThreads = 128;

// Adds the slices, always in ascending order: the sum does not depend on which block ends first.
__global__ void __launch_bounds__(kReduceThreads) add_slices_kernel(const FloatMatmulArgs args) {
  const int64_t place = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x, size = int64_t{args.m} * args.n;
  if (place >= size) return;
  const int n = static_cast<int>(place % args.n);
  float sum = 0.0f;
  for (int slice = 0; slice * args.slice < args.k; ++slice) sum = __fadd_rn(sum, args.parts[slice * size + place]);
  if (args.w_shift == kWholeRow) sum = __fmul_rn(sum, args.scales[n]);
  if (args.bias.data != nullptr) sum = __fadd_rn(sum, load_float(args.bias.data, n, args.bias.dtype));
  store_float(args.out, place, args.out_dtype, sum);
}

Slices choose_slices(const FloatMatmulArgs& args, int processors) {
  constexpr int kLeast = 512;  // k of a slice, so that its loop is worth its start
  const int tiles = (args.n + FewRows::kColumns - 1) / FewRows::kColumns;
  if (args.m > kFewRows) return {args.k, "more than 16 rows: bound by products"};
  const int wanted = 4 * processors / tiles, possible = min(wanted, args.k / kLeast);
  if (possible < 2) return {args.k, "the tiles occupy the processors, or k is short"};
  const int size = ((args.k + possible - 1) / possible + 127) / 128 * 128;  // whole tiles and groups
  return {size, "the tiles alone would leave processors idle"};
}

template <DType kType, int kBits, bool kGrouped>
cudaError_t start(const FloatMatmulArgs& args, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % kCopyBytes == 0 &&
                       reinterpret_cast<uintptr_t>(args.weight) % kCopyBytes == 0 &&
                       args.k % (8 * kCopyBytes / kBits) == 0;
  const auto tiled = [&]<class T, bool kAligned>() {
    using Kernel = FloatMatmul<T, kType, kBits, kGrouped, kAligned>;
    const int64_t tiles = div_up(args.m, T::kRows) * div_up(args.n, T::kColumns);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(div_up(args.k, args.slice)));
    return launch(float_matmul_kernel<T, kType, kBits, kGrouped, kAligned>, grid, Kernel::kThreads,
                  Kernel::kSharedBytes, stream, args);
  };
  if (!aligned) return tiled.template operator()<ManyRows, false>();
  return args.m <= kFewRows ? tiled.template operator()<FewRows, true>() : tiled.template operator()<ManyRows, true>();
}

template <DType kType>
cudaError_t start(const FloatMatmulArgs& args, cudaStream_t stream) {
  const bool grouped = args.w_shift != kWholeRow;
  if (args.bits == 8) return grouped ? start<kType, 8, true>(args, stream) : start<kType, 8, false>(args, stream);
  return grouped ? start<kType, 4, true>(args, stream) : start<kType, 4, false>(args, stream);
}

cudaError_t float_matmul(const FloatMatmulArgs& args, cudaStream_t stream) {
  const cudaError_t error =
      args.dtype == DType::float16 ? start<DType::float16>(args, stream) : start<DType::bfloat16>(args, stream);
  if (error != cudaSuccess || args.parts == nullptr) return error;
  const int64_t size = int64_t{args.m} * args.n;
  return launch(add_slices_kernel, dim3(static_cast<unsigned>(div_up(size, kReduceThreads))), kReduceThreads, 0, stream,
                args);
}

}  // namespace qk::cuda
