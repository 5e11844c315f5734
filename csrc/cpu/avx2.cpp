// AVX2 kernels (Haswell, Zen and later; needs FMA and F16C too).
//
// NOTE [no saturation]. vpmaddubsw adds two products of an unsigned and a signed byte into 16 bits with saturation.
// It is used only where that cannot happen:
//   |x| <= 127 and |w| <= 127 (dot_int8, with the sign of w moved to x): 2 * 127 * 127 = 32258 <= 32767;
//   nibble <= 15 and |x| <= 127 (dot_int4), even and odd sums added:     4 *  15 * 127 =  7620 <= 32767;
//   the same in the matrix kernel for nibbles, where later sums wrap:    2 *  15 * 127 =  3810, see NOTE [nibbles].
// The matrix kernel for int8 multiplies 16-bit values by vpmaddwd, which is exact.
#include <immintrin.h>

#include "cpu/kernels.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace qk {
namespace {

constexpr int kMr = 6;
constexpr int kNr = 16;
static_assert(2 * 127 * 127 <= 32767 && 4 * 15 * 127 <= 32767, "see NOTE [no saturation]");

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

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

// |x * inverse| <= 127 by the choice of inverse, so nothing is left to clamp.
void quantize(const float* x, int64_t n, float inverse, int8_t* q) {
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256i v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), factor));
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    store(q + i, _mm256_permutevar8x32_epi32(packed, order));
  }
  for (; i < n; ++i) q[i] = static_cast<int8_t>(_mm_cvtss_si32(_mm_set_ss(x[i] * inverse)));
}

void unpack_int4(const uint8_t* packed, int64_t n, int zero, int8_t* q) {
  const __m128i mask = _mm_set1_epi8(15), offset = _mm_set1_epi8(static_cast<char>(zero));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
    const __m128i even = _mm_and_si128(bytes, mask), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    auto* out = reinterpret_cast<__m128i*>(q + i);
    _mm_storeu_si128(out, _mm_sub_epi8(_mm_unpacklo_epi8(even, odd), offset));
    _mm_storeu_si128(out + 1, _mm_sub_epi8(_mm_unpackhi_epi8(even, odd), offset));
  }
  for (; i < n; ++i) q[i] = static_cast<int8_t>((packed[i / 2] >> (i % 2 * 4) & 15) - zero);
}

// 2 x int16 a unit.
void encode(const int8_t* q, int64_t k, uint32_t* units) {
  auto* out = reinterpret_cast<int16_t*>(units);
  for (int64_t i = 0; i < k; ++i) out[i] = q[i];
  if (k % 2 != 0) out[k] = 0;
}

// Transposes an 8 x 8 block of 32-bit units.
inline void transpose8(const uint32_t* const* sources, int64_t u, __m256i* t) {
  __m256i s[8], m[8];
  for (int i = 0; i < 8; ++i) s[i] = load(sources[i] + u);
  for (int i = 0; i < 8; i += 2) {
    m[i] = _mm256_unpacklo_epi32(s[i], s[i + 1]);
    m[i + 1] = _mm256_unpackhi_epi32(s[i], s[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_unpacklo_epi64(m[i], m[i + 2]);
    s[i + 1] = _mm256_unpackhi_epi64(m[i], m[i + 2]);
    s[i + 2] = _mm256_unpacklo_epi64(m[i + 1], m[i + 3]);
    s[i + 3] = _mm256_unpackhi_epi64(m[i + 1], m[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(s[i], s[i + 4], 0x31);
  }
}

void interleave(const uint32_t* const* sources, int rows, int64_t units, uint32_t* panel) {
  // With fewer than 8 rows left, a store covers the beginning of the next unit too, which is stored later. The last
  // units therefore go one by one: nothing is written past the panel, where another thread may be at work.
  const int64_t vector_units = rows % 8 == 0 ? units : units - 1;
  int64_t u = 0;
  for (; u + 8 <= vector_units; u += 8) {
    for (int r = 0; r < rows; r += 8) {
      const uint32_t* block[8];
      for (int i = 0; i < 8; ++i) block[i] = sources[r + i < rows ? r + i : r];
      __m256i t[8];
      transpose8(block, u, t);
      for (int i = 0; i < 8; ++i) store(panel + (u + i) * rows + r, t[i]);
    }
  }
  for (; u < units; ++u) {
    for (int r = 0; r < rows; ++r) panel[u * rows + r] = sources[r][u];
  }
}

// GCC keeps the accumulators in registers only if every loop over them is fully unrolled, and not in a larger function:
// the grouped kernel calls this one.
__attribute__((noinline)) void int_tile(int64_t units, const uint32_t* a, const uint32_t* b, const int32_t* start,
                                        int32_t* tile) {
  __m256i acc[kMr][2];
#pragma GCC unroll 6
  for (int i = 0; i < kMr; ++i) {
    acc[i][0] = load(start);
    acc[i][1] = load(start + 8);
  }
  for (int64_t u = 0; u < units; ++u, a += kMr, b += kNr) {
    const __m256i b0 = load(b), b1 = load(b + 8);
#pragma GCC unroll 6
    for (int i = 0; i < kMr; ++i) {
      const __m256i x = _mm256_set1_epi32(static_cast<int>(a[i]));
      acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(x, b0));
      acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(x, b1));
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kMr; ++i) {
    store(tile + i * kNr, acc[i][0]);
    store(tile + i * kNr + 8, acc[i][1]);
  }
}

// tile += float(sums) * (w_scales * x_scales), x_scales null: ones. The float accumulators stay in the tile (L1): the
// integer ones take all the registers there are.
inline void add_scaled(const int32_t* sums, const float* w_scales, const float* x_scales, float* tile) {
  const __m256 s0 = _mm256_loadu_ps(w_scales), s1 = _mm256_loadu_ps(w_scales + 8);
  for (int i = 0; i < kMr; ++i, sums += kNr, tile += kNr) {
    __m256 scale0 = s0, scale1 = s1;
    if (x_scales != nullptr) {
      const __m256 x_scale = _mm256_set1_ps(x_scales[i]);
      scale0 = _mm256_mul_ps(s0, x_scale);
      scale1 = _mm256_mul_ps(s1, x_scale);
    }
    const __m256 y0 = _mm256_mul_ps(_mm256_cvtepi32_ps(load(sums)), scale0);
    const __m256 y1 = _mm256_mul_ps(_mm256_cvtepi32_ps(load(sums + 8)), scale1);
    _mm256_storeu_ps(tile, _mm256_add_ps(_mm256_loadu_ps(tile), y0));
    _mm256_storeu_ps(tile + 8, _mm256_add_ps(_mm256_loadu_ps(tile + 8), y1));
  }
}

void int_tile_grouped(const GroupedTile& args) {
  alignas(32) int32_t sums[kMr * kNr];
  const float* w_scales = args.w_scales;
  const float* x_scales = args.x_scales;
  __builtin_memset(args.tile, 0, kMr * kNr * sizeof(float));
  for (int64_t u = 0; u < args.units; u += args.group_units, w_scales += kNr) {
    const int64_t units = args.units - u < args.group_units ? args.units - u : args.group_units;
    int_tile(units, args.a + u * kMr, args.b + u * kNr, args.start, sums);
    add_scaled(sums, w_scales, x_scales, args.tile);
    if (x_scales != nullptr) x_scales += kMr;
  }
}

void encode_nibble_a(const int8_t* q, int64_t k, uint32_t* units, uint32_t* sums) {
  const int64_t steps = div_up(k, kNibbleStep);
  __builtin_memcpy(units, q, k);
  __builtin_memset(reinterpret_cast<char*>(units) + k, 0, steps * kNibbleStep - k);
  const __m256i ones = _mm256_set1_epi8(1);
  for (int64_t s = 0; s < steps; ++s) {
    const __m256i pairs = _mm256_maddubs_epi16(ones, load(units + s * (kNibbleStep / 4)));
    __m128i lanes = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    lanes = _mm_add_epi16(lanes, _mm_unpackhi_epi64(lanes, lanes));
    lanes = _mm_add_epi16(lanes, _mm_srli_epi64(lanes, 32));
    sums[s] = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), lanes)));
  }
}

// acc += nibbles * x. GCC 12 would schedule all products before the sums and run out of registers.
__attribute__((always_inline)) inline void add_nibble_products(__m256i nibbles, __m256i x, __m256i& acc) {
  __m256i product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(nibbles), "x"(x));
}

// int32 sums [mr, nr] = one step, or += it.
template <bool Add>
__attribute__((noinline)) void nibble_step(const uint32_t* a, const uint32_t* a_sums, const uint32_t* b,
                                           const int32_t* zeros, int32_t* sums) {
  const __m256i z0 = load(zeros), z1 = load(zeros + 8), ones = _mm256_set1_epi16(1);
  __m256i acc[kMr][2];
#pragma GCC unroll 6
  for (int i = 0; i < kMr; ++i) {
    const __m256i x = _mm256_set1_epi32(static_cast<int>(a_sums[i]));
    acc[i][0] = _mm256_mullo_epi16(z0, x);
    acc[i][1] = _mm256_mullo_epi16(z1, x);
  }
#pragma GCC unroll 1
  for (int u = 0; u < kNibbleStep / 4; ++u) {
    const __m256i b0 = load(b + u * kNr), b1 = load(b + u * kNr + 8);
#pragma GCC unroll 6
    for (int i = 0; i < kMr; ++i) {
      const __m256i x = _mm256_set1_epi32(static_cast<int>(a[u * kMr + i]));
      add_nibble_products(b0, x, acc[i][0]);
      add_nibble_products(b1, x, acc[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      int32_t* target = sums + i * kNr + j * 8;
      const __m256i step = _mm256_madd_epi16(acc[i][j], ones);
      store(target, Add ? _mm256_add_epi32(load(target), step) : step);
    }
  }
}

// The sum over the steps [begin, end), which share a zero point.
void nibble_sums(const NibbleTile& args, int64_t begin, int64_t end, const int32_t* zeros, int32_t* sums) {
  constexpr int64_t kUnits = kNibbleStep / 4;
  for (int64_t s = begin; s < end; ++s) {
    const auto step = s == begin ? nibble_step<false> : nibble_step<true>;
    step(args.a + s * kUnits * kMr, args.sums + s * kMr, args.b + s * kUnits * kNr, zeros, sums);
  }
}

void nibble_tile(const NibbleTile& args, int32_t* tile) { nibble_sums(args, 0, args.steps, args.zeros, tile); }

void nibble_tile_grouped(const NibbleTile& args, const float* w_scales, const float* x_scales, float* tile) {
  alignas(32) int32_t sums[kMr * kNr];
  const int32_t* zeros = args.zeros;
  __builtin_memset(tile, 0, kMr * kNr * sizeof(float));
  for (int64_t s = 0; s < args.steps; s += args.group_steps, zeros += kNr, w_scales += kNr) {
    nibble_sums(args, s, s + args.group_steps < args.steps ? s + args.group_steps : args.steps, zeros, sums);
    add_scaled(sums, w_scales, x_scales, tile);
    if (x_scales != nullptr) x_scales += kMr;
  }
}

void float_tile(int64_t units, const float* a, const float* b, float* tile) {
  __m256 acc[kMr][2];
#pragma GCC unroll 6
  for (int i = 0; i < kMr; ++i) {
    acc[i][0] = _mm256_loadu_ps(tile + i * kNr);
    acc[i][1] = _mm256_loadu_ps(tile + i * kNr + 8);
  }
  for (int64_t u = 0; u < units; ++u, a += kMr, b += kNr) {
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int i = 0; i < kMr; ++i) {
      const __m256 x = _mm256_set1_ps(a[i]);
      acc[i][0] = _mm256_fmadd_ps(x, b0, acc[i][0]);
      acc[i][1] = _mm256_fmadd_ps(x, b1, acc[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kMr; ++i) {
    _mm256_storeu_ps(tile + i * kNr, acc[i][0]);
    _mm256_storeu_ps(tile + i * kNr + 8, acc[i][1]);
  }
}

// Sums of 4 vectors: the low half holds those of the low halves, the high half those of the high halves.
inline __m256i reduce4(const __m256i* v) {
  return _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
}

inline void store_sum(int32_t* sums, __m256i halves) {
  const __m128i total = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), total);
}

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

float dot_float(const float* x, const float* w, int64_t n) {
  __m256 acc[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) acc[j] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      acc[j] = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8 * j), _mm256_loadu_ps(w + i + 8 * j), acc[j]);
    }
  }
  const __m256 v = _mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3]));
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, v);
  float total = 0.0f;
  for (int j = 0; j < 8; ++j) total += lanes[j];
  for (; i < n; ++i) total += x[i] * w[i];
  return total;
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels& avx2_kernels() {
  static const NibbleKernels nibbles = {
      .encode_a = encode_nibble_a,
      .tile = nibble_tile,
      .tile_grouped = nibble_tile_grouped,
  };
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
      .mr = kMr,
      .mr_grouped = kMr,
      .nr = kNr,
      .int_tile = int_tile,
      .int_tile_grouped = int_tile_grouped,
      .float_tile = float_tile,
      .nibbles = &nibbles,
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
