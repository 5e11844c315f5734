// AVX-VNNI kernels (Alder Lake, Zen 5 and later): vpdpbusd on 256 bits, without AVX-512. Where operands are shifted by
// 128 is as in avx512vnni.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/target.h"

QK_BEGIN_TARGET("avx2,fma,f16c,avxvnni")

namespace qk {
namespace {

inline __m256i add_products(__m256i acc, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(acc, a, b); }

inline __m256i add_dot(__m256i acc, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(acc, _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80))), x);
}

inline __m256i add_dot_int4(__m256i acc, __m256i even, __m256i x_even, __m256i odd, __m256i x_odd) {
  return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(acc, even, x_even), odd, x_odd);
}

#include "cpu/kernels/x86/avx2.inc"

void column_sums(int64_t units, const uint32_t* panel, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i acc0 = _mm256_setzero_si256(), acc1 = _mm256_setzero_si256();
  for (int64_t u = 0; u < units; ++u, panel += kNr) {
    acc0 = add_products(acc0, ones, load(panel));
    acc1 = add_products(acc1, ones, load(panel + 8));
  }
  store(sums, acc0);
  store(sums + 8, acc1);
}

}  // namespace

QK_END_TARGET

const Kernels& avxvnni_kernels() {
  static const Kernels table = {
      .name = "avxvnni",
      .to_float = to_float,
      .from_float = from_float,
      .absmax_bits = absmax_bits,
      .quantize = quantize,
      .unpack_int4 = unpack_int4,
      .unpack_int4_groups = unpack_each_group,
      .dequantize = dequantize,
      .requantize = requantize,
      .sum = sum,
      .scale = scale,
      .scale_each = scale_each,
      .max_bits = max_bits,
      .round_stochastic = round_stochastic,
      .range = range,
      .quantize_int4 = quantize_int4,
      .pack_int4 = pack_int4,
      .mask_clipped = mask_clipped,
      .quantize_clamped = quantize_clamped,
      .scale_gradient = scale_gradient,
      .transpose = transpose,
      .unit = 4,
      .a_shift = 128,
      .encode_a = encode_shifted,
      .encode_b = nullptr,
      .interleave = interleave,
      .interleave_int = interleave,
      .interleave_across = interleave_across<4>,
      .column_sums = column_sums,
      .mr = kMr,
      .mr_grouped = kMr,
      .mr_float = kMr,
      .nr = kNr,
      .int_tile = int_tile,
      .int_tile_grouped = int_tile_grouped,
      .float_tile = float_tile,
      .nibbles = nullptr,
      .store_int = store_int,
      .store_float = store_float,
      .dot_rows = {12, 8, 8, 4, 4},
      .dot_shift = 128,
      .dot_int8 = dot_int8,
      .x4_bytes = 1,
      .dot_int8_x4 = nullptr,
      .dot_int4 = dot_int4,
      .combine = combine,
      .dot_float = dot_float,
      .softmax_row = softmax_row,
      .scale_and_add = scale_and_add,
  };
  return table;
}

}  // namespace qk

#endif  // __x86_64__
