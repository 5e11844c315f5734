// AVX2 kernels (Haswell, Zen and later; needs FMA and F16C too).
//
// NOTE [no saturation]. vpmaddubsw adds two products of an unsigned and a signed byte into 16 bits with saturation.
// It is used only where that cannot happen:
//   |x| <= 127 and -128 <= w <= 127 (dot_int8), where the unsigned byte is |w| <= 128 and the signed one is x with
//   the sign of w, for -127 .. 127 has both signs: 2 * 128 * 127 = 32512 <= 32767.
//
//   nibble <= 15 and |x| <= 127 (dot_int4), even and odd sums added: 4 * 15 * 127 = 7620 <= 32767.
//
//   The same in the matrix kernel for nibbles, where later sums wrap: 2 * 15 * 127 = 3810, see NOTE [nibbles].
//
// The matrix kernel for int8 multiplies 16-bit values by vpmaddwd, which is exact.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/target.h"

QK_BEGIN_TARGET("avx2,fma,f16c")

namespace qk {
namespace {

static_assert(2 * 128 * 127 <= 32767 && 4 * 15 * 127 <= 32767, "see NOTE [no saturation]");

inline __m256i add_products(__m256i acc, __m256i a, __m256i b) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}

// The magnitude of -128 is the byte 128, which is read as unsigned. Not the other way round: x with a magnitude and w
// with a sign would need +128 as a signed byte.
inline __m256i add_dot(__m256i acc, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return add_products(acc, pairs, _mm256_set1_epi16(1));
}

inline __m256i add_dot_int4(__m256i acc, __m256i even, __m256i x_even, __m256i odd, __m256i x_odd) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, x_even), _mm256_maddubs_epi16(odd, x_odd));
  return add_products(acc, pairs, _mm256_set1_epi16(1));
}

#include "cpu/kernels/x86/avx2.inc"

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
  for (int64_t s = 0; s < args.steps; s += args.group_steps, zeros += kNr, w_scales += kNr) {
    nibble_sums(args, s, s + args.group_steps < args.steps ? s + args.group_steps : args.steps, zeros, sums);
    add_scaled(sums, w_scales, x_scales, tile);
    if (x_scales != nullptr) x_scales += kMr;
  }
}

// acc[i][j] += 16 values of row i of x times 16 of row j of the weight.
__attribute__((always_inline)) inline void add_wide_dots(const int16_t* x, int64_t stride, __m128i w0, __m128i w1,
                                                         __m256i (&acc)[4][2]) {
  const __m256i wide0 = _mm256_cvtepi8_epi16(w0), wide1 = _mm256_cvtepi8_epi16(w1);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i xs = load(x + i * stride);
    acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(xs, wide0));
    acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(xs, wide1));
  }
}

// 4 rows of x, as int16, with 2 rows of the weight: sums[i * 4 + j].
void dot_int8_4x2(const int16_t* x, int64_t stride, const uint8_t* w0, const uint8_t* w1, int64_t k, int32_t* sums) {
  __m256i acc[4][2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
  const auto bytes = [](const uint8_t* w) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(w)); };
  int64_t at = 0;
  for (; at + 16 <= k; at += 16) add_wide_dots(x + at, stride, bytes(w0 + at), bytes(w1 + at), acc);
  if (at < k) {
    uint8_t tails[2][16] = {};
    __builtin_memcpy(tails[0], w0 + at, k - at);
    __builtin_memcpy(tails[1], w1 + at, k - at);
    add_wide_dots(x + at, stride, bytes(tails[0]), bytes(tails[1]), acc);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    const __m256i rows[4] = {acc[i][0], acc[i][1], acc[i + 1][0], acc[i + 1][1]};
    int32_t both[4];
    store_sum(both, reduce4(rows));
    __builtin_memcpy(sums + i * 4, both, 8);
    __builtin_memcpy(sums + i * 4 + 4, both + 2, 8);
  }
}

void dot_int8_x4(const void* x_rows, int64_t stride, const uint8_t* const* w, int64_t k, int32_t* sums) {
  const auto* x = static_cast<const int16_t*>(x_rows);
  dot_int8_4x2(x, stride, w[0], w[1], k, sums);
  dot_int8_4x2(x, stride, w[2], w[3], k, sums + 2);
}

}  // namespace

QK_END_TARGET

const Kernels& avx2_kernels() {
  static constexpr NibbleKernels nibbles = {
      .encode_a = encode_nibble_a,
      .tile = nibble_tile,
      .tile_grouped = nibble_tile_grouped,
  };
  static constexpr Kernels table = [] {
    Kernels t = avx2_table("avx2", int16_panels(), {24, 8, 6, 4, 4});
    t.dots.x4_bytes = 2;
    t.dots.dot_int8_x4 = dot_int8_x4;
    t.nibbles = &nibbles;
    return t;
  }();
  return table;
}

}  // namespace qk

#endif  // __x86_64__
