// The product of one row of floats with a quantized weight, as decoding has it: bound by the bytes of the weight. A
// warp, or the four of a block, computes one number; each lane reads 16 bytes of the weight at a time.
#include "cuda/device.cuh"
#include "cuda/float_matmul.h"
#include "cuda/int_matmul.h"
#include "cuda/rules.cuh"
#include "cuda/tiles.cuh"

namespace qk::cuda {

constexpr int kWarps = 4;
constexpr int kPiece = 8;  // values of x in 16 bytes

struct FloatRowArgs {
  FloatMatmulArgs matmul;
  int split;  // warps that share a result: 1 or kWarps
};

template <DType kType>
__device__ __forceinline__ void load_piece(const void* x, int64_t k, float (&v)[kPiece]) {
  const Words4 words = load_16(static_cast<const uint16_t*>(x) + k);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    const auto bits = static_cast<uint16_t>(words.w[i / 2] >> 16 * (i % 2));
    v[i] = kType == DType::bfloat16 ? bfloat16_value(bits) : float16_value(bits);
  }
}

// The integers of a piece: of 4 bits from one word, of 8 bits from two. 2^23 + q as a float, minus 2^23 and the zero
// point.
template <int kBits>
__device__ __forceinline__ float piece_value(const Words2& words, int i, float offset) {
  const uint32_t q = kBits == 4 ? words.w[0] >> 4 * i & 15 : (words.w[i / 4] >> 8 * (i % 4) & 255) ^ 128;
  return __fsub_rn(__uint_as_float(0x4b000000u | q), offset);
}

template <DType kType, int kBits>
__global__ void __launch_bounds__(32 * kWarps) float_row_kernel(const FloatRowArgs all) {
  constexpr int kValues = 128 / kBits, kPieces = kValues / kPiece;  // of 16 bytes of the weight
  const FloatMatmulArgs& args = all.matmul;
  auto* const sums = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int n = static_cast<int>(blockIdx.x) * (kWarps / all.split) + warp / all.split;
  const int row = min(n, args.n - 1);
  const uint8_t* const weight = args.weight + int64_t{row} * (int64_t{args.k} * kBits / 8);
  const bool grouped = args.w_shift != kWholeRow;
  float sum = 0.0f;
  for (int chunk = warp % all.split * 32 + lane; chunk < args.k / kValues; chunk += 32 * all.split) {
    const Words4 words = load_16(weight + int64_t{chunk} * kCopyBytes);
    const uint32_t group = group_index(row, args.n, args.w_shift, chunk * kValues, args.k);
    const int zero = kBits == 8 ? 128 : (args.zeros != nullptr ? args.zeros[group] : 8);
    const float offset = __int2float_rn((1 << 23) + zero);
    float part = 0.0f;
#pragma unroll
    for (int turn = 0; turn < kPieces; ++turn) {
      // Neighbouring lanes begin with different pieces, so that what they read of x lies in different banks.
      const int piece = (turn + lane / 2) % kPieces;
      Words2 own;
      if (kBits == 4) {
        own.w[0] = piece < 2 ? (piece == 0 ? words.w[0] : words.w[1]) : (piece == 2 ? words.w[2] : words.w[3]);
      } else {
        own.w[0] = piece == 0 ? words.w[0] : words.w[2];
        own.w[1] = piece == 0 ? words.w[1] : words.w[3];
      }
      float x[kPiece];
      load_piece<kType>(args.x, int64_t{chunk} * kValues + piece * kPiece, x);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) part = __fmaf_rn(x[i], piece_value<kBits>(own, i, offset), part);
    }
    sum = __fadd_rn(sum, grouped ? __fmul_rn(part, args.scales[group]) : part);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum = __fadd_rn(sum, shuffle_xor(sum, mask));
  if (lane == 0) sums[warp] = sum;
  sync_block();
  if (lane != 0 || warp % all.split != 0 || n >= args.n) return;
  float total = 0.0f;
  for (int i = 0; i < all.split; ++i) total = __fadd_rn(total, sums[warp + i]);
  if (!grouped) total = __fmul_rn(total, args.scales[n]);
  if (args.bias.data != nullptr) total = __fadd_rn(total, load_float(args.bias.data, n, args.bias.dtype));
  store_float(args.out, n, args.out_dtype, total);
}

bool is_float_row(const FloatMatmulArgs& args) {
  return args.m == 1 && reinterpret_cast<uintptr_t>(args.x) % kCopyBytes == 0 &&
         reinterpret_cast<uintptr_t>(args.weight) % kCopyBytes == 0 && args.k % (8 * kCopyBytes / args.bits) == 0;
}

cudaError_t float_row(const FloatMatmulArgs& args, int processors, cudaStream_t stream) {
  // Sixteen warps keep the memory of a processor busy; if there are fewer results, four warps share one.
  const FloatRowArgs all = {args, args.n < 16 * processors ? kWarps : 1};
  const dim3 grid(static_cast<unsigned>(div_up(args.n, kWarps / all.split)));
  const auto start = [&](auto kernel) {
    return launch(kernel, grid, 32 * kWarps, kWarps * sizeof(float), stream, all);
  };
  if (args.dtype == DType::float16) {
    return args.bits == 8 ? start(float_row_kernel<DType::float16, 8>) : start(float_row_kernel<DType::float16, 4>);
  }
  return args.bits == 8 ? start(float_row_kernel<DType::bfloat16, 8>) : start(float_row_kernel<DType::bfloat16, 4>);
}

}  // namespace qk::cuda
