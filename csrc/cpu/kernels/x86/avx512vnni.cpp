// AVX-512 VNNI kernels (Ice Lake, Zen 4 and later): vpdpbusd multiplies 64 unsigned by signed bytes an instruction.
// A is stored shifted by 128 in the panels, see NOTE [shift] in kernels.h; the row dots shift the weight instead, so
// that their correction depends on x only.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/target.h"

QK_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")

namespace qk {
namespace {

constexpr int kUnit = 4;
constexpr int kUnitsPerPass = 8;  // GCC copies the accumulators once a pass

inline __m512i add_products(__m512i acc, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(acc, a, b); }

inline __m512i add_dot(__m512i acc, __m512i w, __m512i x) {
  return _mm512_dpbusd_epi32(acc, _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80))), x);
}

inline __m512i add_dot_int4(__m512i acc, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }

#include "cpu/kernels/x86/avx512.inc"

void column_sums(int64_t units, const uint32_t* panel, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i acc0 = _mm512_setzero_si512(), acc1 = _mm512_setzero_si512();
  for (int64_t u = 0; u < units; ++u, panel += kNr) {
    acc0 = add_products(acc0, ones, _mm512_loadu_si512(panel));
    acc1 = add_products(acc1, ones, _mm512_loadu_si512(panel + 16));
  }
  _mm512_storeu_si512(sums, acc0);
  _mm512_storeu_si512(sums + 16, acc1);
}

}  // namespace

QK_END_TARGET

const Kernels& avx512vnni_kernels() {
  static constexpr Kernels table = avx512_table("avx512vnni", shifted_panels(column_sums), {32, 12, 12, 16, 4}, 128);
  return table;
}

}  // namespace qk

#endif  // __x86_64__
