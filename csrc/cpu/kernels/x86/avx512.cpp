// AVX-512 kernels without VNNI (Skylake-X): vpmaddwd on 32 x int16 is exact; vpmaddubsw where NOTE [no saturation] of
// avx2.cpp holds.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/target.h"

QK_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")

namespace qk {
namespace {

constexpr int kUnit = 2;
constexpr int kUnitsPerPass = 2;  // with more, GCC multiplies ahead and spills the products

inline __m512i add_products(__m512i acc, __m512i a, __m512i b) {
  return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
}

// 2 * 15 * 127 <= 32767.
inline __m512i add_dot_int4(__m512i acc, __m512i w, __m512i x) {
  return add_products(acc, _mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1));
}

// |w| times x with the sign of w: 2 * 127 * 127 <= 32767.
inline __m512i add_dot(__m512i acc, __m512i w, __m512i x) {
  const __m512i signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
  return add_products(acc, _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x), _mm512_set1_epi16(1));
}

#include "cpu/kernels/x86/avx512.inc"

}  // namespace

QK_END_TARGET

const Kernels& avx512_kernels() {
  static const Kernels table = {
      .name = "avx512",
      .to_float = to_float,
      .from_float = from_float,
      .absmax_bits = absmax_bits,
      .quantize = quantize,
      .absmax_bits_bf16 = absmax_bits_bf16,
      .quantize_bf16 = quantize_bf16,
      .unpack_int4 = unpack_int4,
      .unpack_int4_groups = unpack_int4_groups,
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
      .unit = kUnit,
      .a_shift = 0,
      .encode_a = encode_int16,
      .encode_b = encode_int16,
      .interleave = interleave,
      .interleave_int = interleave,
      .interleave_across = interleave_across<2>,
      .column_sums = nullptr,
      .mr = kMr,
      .mr_grouped = kMrGrouped,
      .mr_float = kMr,
      .nr = kNr,
      .int_tile = int_tile,
      .int_tile_grouped = int_tile_grouped,
      .float_tile = float_tile,
      .nibbles = nullptr,
      .store_int = store_int,
      .store_float = store_float,
      .end_nontemporal = end_nontemporal,
      .dot_rows = {16, 8, 8, 4, 4},
      .dot_shift = 0,
      .dot_int8 = dot_int8,
      .x4_bytes = 1,
      .dot_int8_x4 = dot_int8_x4,
      .dot_int4 = dot_int4,
      .combine = combine,
      .group_dots = &kGroupDots,
      .dot_float = dot_float,
      .softmax_row = softmax_row,
      .scale_and_add = scale_and_add,
  };
  return table;
}

}  // namespace qk

#endif  // __x86_64__
