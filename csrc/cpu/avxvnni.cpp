// AVX-VNNI kernels (Alder Lake, Zen 5 and later): vpdpbusd on 256 bits, without AVX-512. Where operands are shifted by
// 128 is as in avx512vnni.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/target.h"

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

#include "cpu/avx2.inc"

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
      .dequantize = dequantize,
      .sum = sum,
      .unit = 4,
      .a_shift = 128,
      .encode_a = encode_shifted,
      .encode_b = nullptr,
      .interleave = interleave,
      .interleave_int = interleave,
      .mr = kMr,
      .mr_grouped = kMr,
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
  };
  return table;
}

}  // namespace qk

#endif  // __x86_64__
