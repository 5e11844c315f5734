// AVX-VNNI kernels (Alder Lake, Zen 5 and later): vpdpbusd on 256 bits, without AVX-512. Where operands are shifted by
// 128 is as in avx512vnni.cpp.
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__x86_64__)

QK_BEGIN_TARGET("avx2,fma,f16c,avxvnni")

namespace qk {
namespace {

// 4 x int8 a unit, xor-ed with `flip` in every byte (also in the padding, which meets zeros in the other operand).
inline void encode(const int8_t* q, int64_t k, uint8_t flip, uint32_t* units) {
  auto* out = reinterpret_cast<uint8_t*>(units);
  for (int64_t i = 0; i < k; ++i) out[i] = static_cast<uint8_t>(q[i]) ^ flip;
  for (int64_t i = k; i < round_up(k, 4); ++i) out[i] = flip;
}

void encode_a(const int8_t* q, int64_t k, uint32_t* units) { encode(q, k, 0x80, units); }
void encode_b(const int8_t* q, int64_t k, uint32_t* units) { encode(q, k, 0, units); }

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
      .encode_a = encode_a,
      .encode_b = encode_b,
      .interleave = interleave,
      .mr = kMr,
      .mr_grouped = kMr,
      .nr = kNr,
      .int_tile = int_tile,
      .int_tile_grouped = int_tile_grouped,
      .float_tile = float_tile,
      .store_int = store_int,
      .store_float = store_float,
      .dot_shift = 128,
      .dot_int8 = dot_int8,
      .dot_int4 = dot_int4,
      .dot_float = dot_float,
  };
  return table;
}

}  // namespace qk

#endif  // __x86_64__
