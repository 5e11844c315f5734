// AVX-512 BF16 kernels (Zen 4, Sapphire Rapids and later): vdpbf16ps multiplies 32 pairs of bfloat16 numbers an
// instruction, twice as many as a float32 FMA. Everything else is as in avx512vnni.cpp. The instructions read and write
// subnormal numbers as zeros, whatever the mode of the CPU (docs/numerics.md).
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/target.h"

QK_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace qk {
namespace {

// The tile of avx512.inc.
constexpr int kMr = 12;
constexpr int kNr = 32;

inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline __m512 to_float(__m128i q) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)); }

// 16 and 16 integers as bfloat16.
inline __m512i to_bf16(__m128i q0, __m128i q1) { return (__m512i)_mm512_cvtne2ps_pbh(to_float(q1), to_float(q0)); }

inline __m128i load16(const int8_t* q) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)); }

void encode_bf16(const int8_t* q, int64_t k, uint32_t* units) {
  for (; k >= 32; k -= 32, q += 32, units += 16) _mm512_storeu_si512(units, to_bf16(load16(q), load16(q + 16)));
  if (k > 0) {
    const __m256i rest = _mm256_maskz_loadu_epi8((1u << k) - 1, q);
    const __m512i v = to_bf16(_mm256_castsi256_si128(rest), _mm256_extracti128_si256(rest, 1));
    _mm512_mask_storeu_epi32(units, first16((k + 1) / 2), v);
  }
}

// Picks bfloat16 i and 16 + i alternately.
struct PairIndex {
  uint32_t lane[16];
  constexpr PairIndex() : lane() {
    for (uint32_t i = 0; i < 16; ++i) lane[i] = (16 + i) << 16 | i;
  }
};
constexpr PairIndex kPairs;

// Two rows, whose value i `of(r, q)` makes of 16 integers, as pairs.
template <class F>
inline void encode_pairs(const int8_t* const* q, int64_t n, uint32_t* units, const F& of) {
  const auto pairs = [&](__m128i q0, __m128i q1) {
    const auto values = (__m512i)_mm512_cvtne2ps_pbh(of(1, to_float(q1)), of(0, to_float(q0)));
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(kPairs.lane), values);
  };
  const int8_t *q0 = q[0], *q1 = q[1];
  for (; n >= 16; n -= 16, q0 += 16, q1 += 16, units += 16) {
    _mm512_storeu_si512(units, pairs(load16(q0), load16(q1)));
  }
  if (n > 0) {
    const __mmask16 mask = first16(n);
    const __m128i rest0 = _mm_maskz_loadu_epi8(mask, q0), rest1 = _mm_maskz_loadu_epi8(mask, q1);
    _mm512_mask_storeu_epi32(units, mask, pairs(rest0, rest1));
  }
}

void encode_bf16_pair(const int8_t* const* q, const float* scales, int64_t n, uint32_t* units) {
  const __m512 scale[] = {_mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1])};
  encode_pairs(q, n, units, [&](int r, __m512 integers) { return _mm512_mul_ps(integers, scale[r]); });
}

void encode_bf16_pair_min(const int8_t* const* q, const float* scales, const float* minima, int64_t n,
                          uint32_t* units) {
  const __m512 scale[] = {_mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1])};
  const __m512 minimum[] = {_mm512_set1_ps(minima[0]), _mm512_set1_ps(minima[1])};
  encode_pairs(q, n, units,
               [&](int r, __m512 integers) { return _mm512_add_ps(_mm512_mul_ps(integers, scale[r]), minimum[r]); });
}

// The same pair in all lanes. Clang 16 does not end where it knows that a vector of bfloat16 is a broadcast.
inline __m512bh broadcast(uint32_t pair) {
  __m512i v = _mm512_set1_epi32(static_cast<int>(pair));
#if defined(__clang__)
  __asm__("" : "+v"(v));
#endif
  return (__m512bh)v;
}

void bf16_tile(int64_t units, const uint32_t* a, const uint32_t* b, const float* scales, float* tile) {
  __m512 acc[kMr][2];
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
  for (int64_t u = 0; u < units; ++u, a += kMr, b += kNr) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kMr; ++i) {
      const __m512bh x = broadcast(a[i]);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x, b0);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x, b1);
    }
  }
  const __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i, tile += kNr) {
    _mm512_storeu_ps(tile, _mm512_add_ps(_mm512_loadu_ps(tile), _mm512_mul_ps(acc[i][0], scale0)));
    _mm512_storeu_ps(tile + 16, _mm512_add_ps(_mm512_loadu_ps(tile + 16), _mm512_mul_ps(acc[i][1], scale1)));
  }
}

}  // namespace

QK_END_TARGET

const Kernels& avx512bf16_kernels() {
  static const Bf16Kernels bf16 = {.mr = kMr,
                                   .encode = encode_bf16,
                                   .encode_pair = encode_bf16_pair,
                                   .encode_pair_min = encode_bf16_pair_min,
                                   .tile = bf16_tile};
  static const Kernels table = [] {
    Kernels t = avx512vnni_kernels();
    t.name = "avx512bf16";
    t.bf16 = &bf16;
    return t;
  }();
  return table;
}

}  // namespace qk

#endif  // __x86_64__
