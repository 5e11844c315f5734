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

// |w| times x with the sign of w: 2 * 128 * 127 <= 32767.
inline __m512i add_dot(__m512i acc, __m512i w, __m512i x) {
  const __m512i signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
  return add_products(acc, _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x), _mm512_set1_epi16(1));
}

#include "cpu/kernels/x86/avx512.inc"

}  // namespace

QK_END_TARGET

const Kernels& avx512_kernels() {
  static constexpr Kernels table = avx512_table("avx512", int16_panels(), {16, 8, 8, 4, 4});
  return table;
}

}  // namespace qk

#endif  // __x86_64__
