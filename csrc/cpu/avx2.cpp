// AVX2 kernels (Haswell, Zen and later; needs FMA and F16C too).
//
// NOTE [no saturation]. vpmaddubsw adds two products of an unsigned and a signed byte into 16 bits with saturation.
// It is used only where that cannot happen:
//   |x| <= 127 and |w| <= 127 (dot_int8, with the sign of w moved to x): 2 * 127 * 127 = 32258 <= 32767;
//   nibble <= 15 and |x| <= 127 (dot_int4), even and odd sums added:     4 *  15 * 127 =  7620 <= 32767.
// The matrix kernel multiplies 16-bit values by vpmaddwd, which is exact.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/target.h"

QK_BEGIN_TARGET("avx2,fma,f16c")

namespace qk {
namespace {

static_assert(2 * 127 * 127 <= 32767 && 4 * 15 * 127 <= 32767, "see NOTE [no saturation]");

inline __m256i add_products(__m256i acc, __m256i a, __m256i b) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}

inline __m256i add_dot(__m256i acc, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return add_products(acc, pairs, _mm256_set1_epi16(1));
}

inline __m256i add_dot_int4(__m256i acc, __m256i even, __m256i x_even, __m256i odd, __m256i x_odd) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, x_even), _mm256_maddubs_epi16(odd, x_odd));
  return add_products(acc, pairs, _mm256_set1_epi16(1));
}

#include "cpu/avx2.inc"

}  // namespace

QK_END_TARGET

const Kernels& avx2_kernels() {
  static const Kernels table = {
      .name = "avx2",
      .to_float = to_float,
      .from_float = from_float,
      .absmax_bits = absmax_bits,
      .quantize = quantize,
      .unpack_int4 = unpack_int4,
      .dequantize = dequantize,
      .sum = sum,
      .unit = 2,
      .a_shift = 0,
      .encode_a = encode_int16,
      .encode_b = encode_int16,
      .interleave = interleave,
      .interleave_int = interleave,
      .mr = kMr,
      .mr_grouped = kMr,
      .nr = kNr,
      .int_tile = int_tile,
      .int_tile_grouped = int_tile_grouped,
      .float_tile = float_tile,
      .store_int = store_int,
      .store_float = store_float,
      .dot_shift = 0,
      .dot_int8 = dot_int8,
      .dot_int4 = dot_int4,
      .dot_float = dot_float,
  };
  return table;
}

}  // namespace qk

#endif  // __x86_64__
