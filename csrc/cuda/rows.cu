// Quantization of rows to int8 (docs/numerics.md, rules 1, 2 and 8). Each thread owns vectors of eight values, which
// stay in registers between the search for the range and the rounding; only rows longer than all registers are read
// twice.
#include "cuda/rows.h"

#include "common/philox.h"
#include "cuda/device.cuh"
#include "cuda/rules.cuh"

namespace qk::cuda {

constexpr int kVector = 8;
constexpr int kHeld = 4;  // vectors of a thread that stay in registers
constexpr int kMaxThreads = 256;

template <DType kType>
__device__ __forceinline__ void unpack(const Words4& words, float (&v)[kVector]) {
  for (int i = 0; i < 4; ++i) {
    const uint16_t low = static_cast<uint16_t>(words.w[i]), high = static_cast<uint16_t>(words.w[i] >> 16);
    v[2 * i] = kType == DType::bfloat16 ? bfloat16_value(low) : float16_value(low);
    v[2 * i + 1] = kType == DType::bfloat16 ? bfloat16_value(high) : float16_value(high);
  }
}

// Vector `index` of a row, times the factors; zeros past its end.
template <DType kType, bool kAligned>
__device__ __forceinline__ void load_vector(const RowsArgs& args, int64_t row, int64_t index, float (&v)[kVector]) {
  const int64_t first = index * kVector, start = row * args.cols + first;
  if (kAligned) {
    if (first >= args.cols) {
      for (int i = 0; i < kVector; ++i) v[i] = 0.0f;
      return;
    }
    if (kType == DType::float32) {
      const Words4 low = load_16(static_cast<const float*>(args.x) + start);
      const Words4 high = load_16(static_cast<const float*>(args.x) + start + 4);
      for (int i = 0; i < 4; ++i) {
        v[i] = __uint_as_float(low.w[i]);
        v[4 + i] = __uint_as_float(high.w[i]);
      }
    } else {
      unpack<kType>(load_16(static_cast<const uint16_t*>(args.x) + start), v);
    }
  } else {
    for (int i = 0; i < kVector; ++i) v[i] = first + i < args.cols ? load_float(args.x, start + i, kType) : 0.0f;
  }
  if (args.factors != nullptr) {
    for (int i = 0; i < kVector; ++i) {
      if (first + i < args.cols) v[i] = __fmul_rn(v[i], args.factors[first + i]);
    }
  }
}

__device__ __forceinline__ uint32_t largest_magnitude(const float (&v)[kVector]) {
  uint32_t largest = 0;
  for (int i = 0; i < kVector; ++i) largest = max(largest, magnitude_bits(v[i]));
  return largest;
}

// The maximum over `lanes` neighbouring lanes, a power of two.
__device__ __forceinline__ uint32_t lane_max(uint32_t v, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) v = max(v, shuffle_xor(v, mask));
  return v;
}

__device__ __forceinline__ uint32_t block_max(uint32_t v) {
  auto* const warps = reinterpret_cast<uint32_t*>(shared_memory());
  v = lane_max(v, 32);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  sync_block();
  for (unsigned i = 0; i < blockDim.x / 32; ++i) v = max(v, warps[i]);
  return v;
}

// Block `block` of the random words of a row (PhiloxRow in common/philox.h). Arrays of constants have no address on a
// device.
__device__ __forceinline__ void random_words(const Random& random, int64_t row, int64_t block,
                                             uint32_t (&words)[kPhiloxWords]) {
  constexpr uint32_t kMultiplier0 = kPhiloxMultiplier[0], kMultiplier1 = kPhiloxMultiplier[1];
  constexpr uint32_t kWeyl0 = kPhiloxWeyl[0], kWeyl1 = kPhiloxWeyl[1];
  uint32_t key0 = static_cast<uint32_t>(random.seed), key1 = static_cast<uint32_t>(random.seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(row), c2 = random.rng_stream, c3 = 0;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{kMultiplier0} * c0, product1 = uint64_t{kMultiplier1} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

template <bool kStochastic>
__device__ __forceinline__ void round_vector(const RowsArgs& args, int64_t row, int64_t index, float inverse,
                                             const float (&v)[kVector], int8_t (&q)[kVector]) {
  if (kStochastic) {
    for (int half = 0; half < 2; ++half) {
      uint32_t words[kPhiloxWords];
      random_words(args.random, row, 2 * index + half, words);
      for (int i = 0; i < 4; ++i) {
        q[4 * half + i] = static_cast<int8_t>(round_stochastic(v[4 * half + i], inverse, words[i]));
      }
    }
  } else {
    for (int i = 0; i < kVector; ++i) q[i] = static_cast<int8_t>(inverse == 0 ? 0 : round_nearest(v[i], inverse));
  }
}

__device__ __forceinline__ uint32_t pack(int8_t a, int8_t b, int8_t c, int8_t d) {
  return static_cast<uint8_t>(a) | static_cast<uint8_t>(b) << 8 | static_cast<uint8_t>(c) << 16 |
         static_cast<uint32_t>(static_cast<uint8_t>(d)) << 24;
}

template <bool kAligned>
__device__ __forceinline__ void store_vector(const RowsArgs& args, int64_t row, int64_t index,
                                             const int8_t (&q)[kVector]) {
  int8_t* const out = args.q + row * args.q_stride;
  if (args.order == Order::interleaved) {
    int8_t* const block = out + index / 4 * 32 + index % 4 * 4;
    *reinterpret_cast<uint32_t*>(block) = pack(q[0], q[2], q[4], q[6]);
    *reinterpret_cast<uint32_t*>(block + 16) = pack(q[1], q[3], q[5], q[7]);
  } else if (kAligned) {
    store_8(out + index * kVector, {{pack(q[0], q[1], q[2], q[3]), pack(q[4], q[5], q[6], q[7])}});
  } else {
    for (int i = 0; i < kVector; ++i) {
      if (index * kVector + i < args.cols) out[index * kVector + i] = q[i];
    }
  }
}

template <bool kStochastic, bool kAligned>
__device__ __forceinline__ void quantize_vector(const RowsArgs& args, int64_t row, int64_t index, float inverse,
                                                const float (&v)[kVector]) {
  int8_t q[kVector];
  round_vector<kStochastic>(args, row, index, inverse, v, q);
  store_vector<kAligned>(args, row, index, q);
}

// Vectors of a row of q.
__device__ __forceinline__ int64_t vectors_of(const RowsArgs& args) {
  return args.order == Order::interleaved ? args.q_stride / kVector : div_up(args.cols, kVector);
}

// A block a row, with one scale.
template <DType kType, bool kStochastic, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) quantize_rows_kernel(const RowsArgs args) {
  const int64_t row = blockIdx.x, vectors = vectors_of(args), threads = blockDim.x, kept = kHeld * threads;
  float held[kHeld][kVector], v[kVector];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    load_vector<kType, kAligned>(args, row, threadIdx.x + i * threads, held[i]);
    largest = max(largest, largest_magnitude(held[i]));
  }
  for (int64_t index = kept + threadIdx.x; index < vectors; index += threads) {
    load_vector<kType, kAligned>(args, row, index, v);
    largest = max(largest, largest_magnitude(v));
  }
  const Range range(block_max(largest));
  if (threadIdx.x == 0) args.scales[row] = range.scale;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t index = threadIdx.x + i * threads;
    if (index < vectors) quantize_vector<kStochastic, kAligned>(args, row, index, range.inverse, held[i]);
  }
  for (int64_t index = kept + threadIdx.x; index < vectors; index += threads) {
    load_vector<kType, kAligned>(args, row, index, v);
    quantize_vector<kStochastic, kAligned>(args, row, index, range.inverse, v);
  }
}

// A block a row, with a scale for each group, which lies in 4, 8 or 16 neighbouring lanes.
template <DType kType, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) quantize_groups_kernel(const RowsArgs args) {
  const int64_t row = blockIdx.x, vectors = vectors_of(args), groups = div_up(args.cols, args.group);
  const int lanes = args.group / kVector;
  for (int64_t first = 0; first < vectors; first += blockDim.x) {
    const int64_t index = first + threadIdx.x;
    float v[kVector];
    load_vector<kType, kAligned>(args, row, index, v);
    const Range range(lane_max(largest_magnitude(v), lanes));
    const int64_t group = index / lanes;
    if (index % lanes == 0 && group < groups) args.scales[row * groups + group] = range.scale;
    if (index < vectors) quantize_vector<false, kAligned>(args, row, index, range.inverse, v);
  }
}

template <DType kType, bool kStochastic, bool kAligned>
cudaError_t start(const RowsArgs& args, cudaStream_t stream) {
  const int64_t vectors = div_up(args.cols, kVector), threads = round_up(vectors, 32);
  const int block = static_cast<int>(threads < kMaxThreads ? threads : kMaxThreads);
  const dim3 grid(static_cast<unsigned>(args.rows));
  if (args.group != 0) return launch(quantize_groups_kernel<kType, kAligned>, grid, block, 0, stream, args);
  return launch(quantize_rows_kernel<kType, kStochastic, kAligned>, grid, block, 32 * sizeof(uint32_t), stream, args);
}

template <bool kStochastic>
cudaError_t dispatch(const RowsArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  const bool aligned =
      reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.cols % kVector == 0 && args.q_stride % kVector == 0;
  switch (args.dtype) {
    case DType::float32:
      return aligned ? start<DType::float32, kStochastic, true>(args, stream)
                     : start<DType::float32, kStochastic, false>(args, stream);
    case DType::bfloat16:
      return aligned ? start<DType::bfloat16, kStochastic, true>(args, stream)
                     : start<DType::bfloat16, kStochastic, false>(args, stream);
    default:
      return aligned ? start<DType::float16, kStochastic, true>(args, stream)
                     : start<DType::float16, kStochastic, false>(args, stream);
  }
}

cudaError_t quantize_rows(const RowsArgs& args, cudaStream_t stream) { return dispatch<false>(args, stream); }

cudaError_t quantize_rows_stochastic(const RowsArgs& args, cudaStream_t stream) { return dispatch<true>(args, stream); }

}  // namespace qk::cuda
