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

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace qk {
namespace {

static_assert(2 * 127 * 127 <= 32767 && 4 * 15 * 127 <= 32767, "see NOTE [no saturation]");

// 2 x int16 a unit.
void encode(const int8_t* q, int64_t k, uint32_t* units) {
  auto* out = reinterpret_cast<int16_t*>(units);
  for (int64_t i = 0; i < k; ++i) out[i] = q[i];
  if (k % 2 != 0) out[k] = 0;
}

#include "cpu/avx2.inc"

void dot_int8(const int8_t* x, const int8_t* const* w, int64_t k, int64_t group, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t begin = 0; begin < k; begin += group, sums += 4) {
    const int64_t end = begin + group < k ? begin + group : k;
    __m256i acc[4] = {};
    for (int64_t i = begin; i < end; i += 32) {
      const __m256i xs = load(x + i);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        __m256i ws;
        if (i + 32 <= end) {
          ws = load(w[r] + i);
        } else {
          int8_t tail[32] = {};
          __builtin_memcpy(tail, w[r] + i, end - i);
          ws = load(tail);
        }
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(ws), _mm256_sign_epi8(xs, ws));
        acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(pairs, ones));
      }
    }
    store_sum(sums, reduce4(acc));
  }
}

void dot_int4(const int8_t* x, const uint8_t* const* w, int64_t k, int64_t group, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8(15);
  __m256i acc[4] = {};
  for (int64_t i = 0; i < k; i += 64) {
    const __m256i even = load(x + i), odd = load(x + i + 32);
    __m256i block[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      __m256i bytes;
      if (i + 64 <= k) {
        bytes = load(w[r] + i / 2);
      } else {
        uint8_t tail[32] = {};
        __builtin_memcpy(tail, w[r] + i / 2, (k - i + 1) / 2);
        bytes = load(tail);
      }
      const __m256i low = _mm256_and_si256(bytes, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
      block[r] = _mm256_madd_epi16(pairs, ones);
    }
    if (group == 32) {  // the halves of the vectors are groups of their own
      const __m256i halves = reduce4(block);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), _mm256_castsi256_si128(halves));
      sums += 4;
      if (i + 32 < k) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), _mm256_extracti128_si256(halves, 1));
        sums += 4;
      }
      continue;
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) acc[r] = _mm256_add_epi32(acc[r], block[r]);
    if (i + 64 >= k || (i + 64) % group == 0) {
      store_sum(sums, reduce4(acc));
      sums += 4;
      for (int r = 0; r < 4; ++r) acc[r] = _mm256_setzero_si256();
    }
  }
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

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
      .encode_a = encode,
      .encode_b = encode,
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
