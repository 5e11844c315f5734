// AVX-512 VNNI kernels (Ice Lake, Zen 4 and later): vpdpbusd multiplies 64 unsigned by signed bytes an instruction.
// A is stored shifted by 128 in the panels, see NOTE [shift] in kernels.h; the row dots shift the weight instead, so
// that their correction depends on x only.
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__x86_64__)

// QK_EMULATED_AVX512: immintrin.h is a stand-in that computes the intrinsics below on a CPU without AVX-512
// (tests/emulation), so the compiler must not emit AVX-512 itself.
#if defined(QK_EMULATED_AVX512)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#endif

namespace qk {
namespace {

constexpr int kMr = 12;        // 12 x 2 accumulators, 2 vectors of B, 1 of A: 27 of 32 registers
constexpr int kMrGrouped = 6;  // 6 x 2 integer and 6 x 2 float accumulators
constexpr int kNr = 32;

// The first n of 16 (of 64) elements.
inline __mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
inline __mmask64 first64(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

void half_to_floats(const uint16_t* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
  for (; i < n; ++i) dst[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(src[i])));
}

void floats_to_half(const float* src, int64_t n, uint16_t* dst) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), half);
  }
  for (; i < n; ++i) {
    const __m128i half = _mm_cvtps_ph(_mm_set_ss(src[i]), _MM_FROUND_TO_NEAREST_INT);
    dst[i] = static_cast<uint16_t>(_mm_cvtsi128_si32(half));
  }
}

#include "cpu/common.inc"

// |x * inverse| <= 127 by the choice of inverse, so nothing is left to clamp.
void quantize(const float* x, int64_t n, float inverse, int8_t* q) {
  const __m512 factor = _mm512_set1_ps(inverse);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first16(n - i);
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor));
    _mm512_mask_cvtepi32_storeu_epi8(q + i, mask, v);
  }
}

void unpack_int4(const uint8_t* packed, int64_t n, int zero, int8_t* q) {
  const __m256i mask = _mm256_set1_epi8(15), offset = _mm256_set1_epi8(static_cast<char>(zero));
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + i / 2));
    const __m256i even = _mm256_sub_epi8(_mm256_and_si256(bytes, mask), offset);
    const __m256i odd = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), offset);
    const __m256i low = _mm256_unpacklo_epi8(even, odd), high = _mm256_unpackhi_epi8(even, odd);
    auto* out = reinterpret_cast<__m256i*>(q + i);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(low, high, 0x31));
  }
  for (; i < n; ++i) q[i] = static_cast<int8_t>((packed[i / 2] >> (i % 2 * 4) & 15) - zero);
}

// 4 x int8 a unit, shifted by 128 (also in the padding, which meets zeros in the other operand).
void encode_a(const int8_t* q, int64_t k, uint32_t* units) {
  auto* out = reinterpret_cast<uint8_t*>(units);
  for (int64_t i = 0; i < k; ++i) out[i] = static_cast<uint8_t>(q[i]) ^ 0x80;
  for (int64_t i = k; i < round_up(k, 4); ++i) out[i] = 0x80;
}

// Transposes a 16 x 16 block of 32-bit units.
inline void transpose16(const uint32_t* const* sources, int64_t u, __m512i* t) {
  __m512i s[16], m[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) s[i] = _mm512_loadu_si512(sources[i] + u);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    m[i] = _mm512_unpacklo_epi32(s[i], s[i + 1]);
    m[i + 1] = _mm512_unpackhi_epi32(s[i], s[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    s[i] = _mm512_unpacklo_epi64(m[i], m[i + 2]);
    s[i + 1] = _mm512_unpackhi_epi64(m[i], m[i + 2]);
    s[i + 2] = _mm512_unpacklo_epi64(m[i + 1], m[i + 3]);
    s[i + 3] = _mm512_unpackhi_epi64(m[i + 1], m[i + 3]);
  }
  // s[4 * q + c] now holds, in its 128-bit lane l, unit 4 * l + c of the sources 4 * q .. 4 * q + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(s[c], s[4 + c], 0x88), b = _mm512_shuffle_i32x4(s[c], s[4 + c], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(s[8 + c], s[12 + c], 0x88);
    const __m512i e = _mm512_shuffle_i32x4(s[8 + c], s[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
}

void interleave(const uint32_t* const* sources, int rows, int64_t units, uint32_t* panel) {
  int64_t u = 0;
  for (; u + 16 <= units; u += 16) {
    for (int r = 0; r < rows; r += 16) {
      const uint32_t* block[16];
      for (int i = 0; i < 16; ++i) block[i] = sources[r + i < rows ? r + i : r];
      const __mmask16 mask = first16(rows - r);
      __m512i t[16];
      transpose16(block, u, t);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(panel + (u + i) * rows + r, mask, t[i]);
    }
  }
  for (; u < units; ++u) {
    for (int r = 0; r < rows; ++r) panel[u * rows + r] = sources[r][u];
  }
}

// acc[i][j] += A * B^T for one unit of k. GCC keeps acc in registers only if every loop over it is fully unrolled.
template <int Mr>
__attribute__((always_inline)) inline void multiply(const uint32_t* a, const uint32_t* b, __m512i (&acc)[Mr][2]) {
  const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 12
  for (int i = 0; i < Mr; ++i) {
    const __m512i x = _mm512_set1_epi32(static_cast<int>(a[i]));
    acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], x, b0);
    acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], x, b1);
  }
}

void int_tile(int64_t units, const uint32_t* a, const uint32_t* b, const int32_t* start, int32_t* tile) {
  __m512i acc[kMr][2];
  const __m512i start0 = _mm512_loadu_si512(start), start1 = _mm512_loadu_si512(start + 16);
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) {
    acc[i][0] = start0;
    acc[i][1] = start1;
  }
  for (int64_t u = 0; u < units; ++u) multiply<kMr>(a + u * kMr, b + u * kNr, acc);
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) {
    _mm512_storeu_si512(tile + i * kNr, acc[i][0]);
    _mm512_storeu_si512(tile + i * kNr + 16, acc[i][1]);
  }
}

template <bool RowScales>
inline void grouped(const GroupedTile& args) {
  constexpr int64_t kStep = kGroupStep / 4;
  __m512 total[kMrGrouped][2];
#pragma GCC unroll 6
  for (int i = 0; i < kMrGrouped; ++i) total[i][0] = total[i][1] = _mm512_setzero_ps();
  const int32_t* start = args.start;
  const float* w_scales = args.w_scales;
  const float* x_scales = args.x_scales;
  for (int64_t u = 0; u < args.units; u += args.group_units, start += kNr, w_scales += kNr) {
    const int64_t units = args.units - u < args.group_units ? args.units - u : args.group_units;
    __m512i acc[kMrGrouped][2];
    const __m512i start0 = _mm512_loadu_si512(start), start1 = _mm512_loadu_si512(start + 16);
#pragma GCC unroll 6
    for (int i = 0; i < kMrGrouped; ++i) {
      acc[i][0] = start0;
      acc[i][1] = start1;
    }
    // 32 k at a time, unrolled: GCC copies the accumulators once an iteration.
    for (int64_t v = u; v < u + units; v += kStep) {
#pragma GCC unroll 8
      for (int64_t s = 0; s < kStep; ++s) {
        multiply<kMrGrouped>(args.a + (v + s) * kMrGrouped, args.b + (v + s) * kNr, acc);
      }
    }
    const __m512 s0 = _mm512_loadu_ps(w_scales), s1 = _mm512_loadu_ps(w_scales + 16);
#pragma GCC unroll 6
    for (int i = 0; i < kMrGrouped; ++i) {
      __m512 scale0 = s0, scale1 = s1;
      if constexpr (RowScales) {
        const __m512 x_scale = _mm512_set1_ps(x_scales[i]);
        scale0 = _mm512_mul_ps(s0, x_scale);
        scale1 = _mm512_mul_ps(s1, x_scale);
      }
      total[i][0] = _mm512_add_ps(total[i][0], _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][0]), scale0));
      total[i][1] = _mm512_add_ps(total[i][1], _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][1]), scale1));
    }
    if constexpr (RowScales) x_scales += kMrGrouped;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kMrGrouped; ++i) {
    _mm512_storeu_ps(args.tile + i * kNr, total[i][0]);
    _mm512_storeu_ps(args.tile + i * kNr + 16, total[i][1]);
  }
}

void int_tile_grouped(const GroupedTile& args) {
  if (args.x_scales != nullptr) {
    grouped<true>(args);
  } else {
    grouped<false>(args);
  }
}

void float_tile(int64_t units, const float* a, const float* b, float* tile) {
  __m512 acc[kMr][2];
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) {
    acc[i][0] = _mm512_loadu_ps(tile + i * kNr);
    acc[i][1] = _mm512_loadu_ps(tile + i * kNr + 16);
  }
  for (int64_t u = 0; u < units; ++u, a += kMr, b += kNr) {
    const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kMr; ++i) {
      const __m512 x = _mm512_set1_ps(a[i]);
      acc[i][0] = _mm512_fmadd_ps(x, b0, acc[i][0]);
      acc[i][1] = _mm512_fmadd_ps(x, b1, acc[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kMr; ++i) {
    _mm512_storeu_ps(tile + i * kNr, acc[i][0]);
    _mm512_storeu_ps(tile + i * kNr + 16, acc[i][1]);
  }
}

// Sums of 4 vectors: the low half holds those of the low halves, the high half those of the high halves.
inline __m256i reduce4(const __m256i* v) {
  return _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
}

inline __m128i low(__m256i v) { return _mm256_castsi256_si128(v); }
inline __m128i high(__m256i v) { return _mm256_extracti128_si256(v, 1); }
inline __m256i low(__m512i v) { return _mm512_castsi512_si256(v); }
inline __m256i high(__m512i v) { return _mm512_extracti64x4_epi64(v, 1); }

inline void store_sums(int32_t* sums, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), v); }

void dot_int8(const int8_t* x, const int8_t* const* w, int64_t k, int64_t group, int32_t* sums) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i acc[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) acc[r] = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 64) {
    const __m512i xs = _mm512_loadu_si512(x + i);
    const __mmask64 mask = first64(k - i);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m512i ws = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w[r] + i), flip);
      acc[r] = _mm512_dpbusd_epi32(acc[r], ws, xs);
    }
    const bool halves_apart = group == 32;
    if (!halves_apart && i + 64 < k && (i + 64) % group != 0) continue;
    // A group ends here (two of them, if a group is half a vector).
    __m256i lows[4], highs[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      lows[r] = low(acc[r]);
      highs[r] = high(acc[r]);
      acc[r] = _mm512_setzero_si512();
    }
    const __m256i first = reduce4(lows), second = reduce4(highs);
    const __m128i first_sums = _mm_add_epi32(low(first), high(first));
    const __m128i second_sums = _mm_add_epi32(low(second), high(second));
    if (halves_apart) {
      store_sums(sums, first_sums);
      sums += 4;
      if (i + 32 >= k) continue;
      store_sums(sums, second_sums);
    } else {
      store_sums(sums, _mm_add_epi32(first_sums, second_sums));
    }
    sums += 4;
  }
}

void dot_int4(const int8_t* x, const uint8_t* const* w, int64_t k, int64_t group, int32_t* sums) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m512i acc[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) acc[r] = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 64) {
    const __m512i xs = _mm512_loadu_si512(x + i);
    const auto mask = static_cast<__mmask32>(first64((k - i + 1) / 2));
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m256i bytes = _mm256_maskz_loadu_epi8(mask, w[r] + i / 2);
      const __m256i even = _mm256_and_si256(bytes, nibble);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
      const __m512i ws = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
      acc[r] = _mm512_dpbusd_epi32(acc[r], ws, xs);
    }
    const bool halves_apart = group == 32;
    if (!halves_apart && i + 64 < k && (i + 64) % group != 0) continue;
    // Even and odd values of the same k lie in the two halves of acc; after adding them, a group of 32 is a half.
    __m256i folded[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      folded[r] = _mm256_add_epi32(low(acc[r]), high(acc[r]));
      acc[r] = _mm512_setzero_si512();
    }
    const __m256i halves = reduce4(folded);
    if (halves_apart) {
      store_sums(sums, low(halves));
      sums += 4;
      if (i + 32 >= k) continue;
      store_sums(sums, high(halves));
    } else {
      store_sums(sums, _mm_add_epi32(low(halves), high(halves)));
    }
    sums += 4;
  }
}

float dot_float(const float* x, const float* w, int64_t n) {
  __m512 acc[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) acc[j] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      acc[j] = _mm512_fmadd_ps(_mm512_loadu_ps(x + i + 16 * j), _mm512_loadu_ps(w + i + 16 * j), acc[j]);
    }
  }
  for (; i < n; i += 16) {
    const __mmask16 mask = first16(n - i);
    acc[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_maskz_loadu_ps(mask, w + i), acc[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])));
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels& avx512vnni_kernels() {
  static const Kernels table = {
      .name = "avx512vnni",
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
      .encode_b = nullptr,
      .interleave = interleave,
      .mr = kMr,
      .mr_grouped = kMrGrouped,
      .nr = kNr,
      .int_tile = int_tile,
      .int_tile_grouped = int_tile_grouped,
      .float_tile = float_tile,
      .nibbles = nullptr,
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
