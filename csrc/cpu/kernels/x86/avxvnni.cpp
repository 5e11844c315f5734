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
  static constexpr Kernels table = avx2_table("avxvnni", shifted_panels(column_sums), {12, 8, 8, 4, 4}, 128);
  return table;
}

}  // namespace qk

#endif  // __x86_64__
