// A stand-in for the AVX-512 part of <immintrin.h>: the intrinsics that csrc/cpu uses, computed lane by lane as the
// Intel SDM defines them, so that the kernels can be compiled and run on a CPU with AVX2 only
// (tests/test_emulation.py). Everything up to AVX2 is the real thing. Masked loads touch selected lanes only.
#pragma once

#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

struct alignas(64) Int {
  int32_t lane[16];
};
struct alignas(64) Float {
  float lane[16];
};

template <class F>
inline Int ints(F f) {
  Int r;
  for (int i = 0; i < 16; ++i) r.lane[i] = f(i);
  return r;
}

template <class F>
inline Float floats(F f) {
  Float r;
  for (int i = 0; i < 16; ++i) r.lane[i] = f(i);
  return r;
}

inline Int load(const void* p) {
  Int r;
  std::memcpy(&r, p, 64);
  return r;
}
inline Float load_ps(const void* p) {
  Float r;
  std::memcpy(&r, p, 64);
  return r;
}
inline void store(void* p, const Int& v) { std::memcpy(p, &v, 64); }
inline void store_ps(void* p, const Float& v) { std::memcpy(p, &v, 64); }

inline Int set1_epi32(int x) {
  return ints([=](int) { return x; });
}
inline Int set1_epi8(char x) { return set1_epi32(static_cast<int>(0x01010101u * static_cast<uint8_t>(x))); }
inline Int set1_epi16(short x) { return set1_epi32(static_cast<int>(0x00010001u * static_cast<uint16_t>(x))); }
inline Float set1_ps(float x) {
  return floats([=](int) { return x; });
}

inline Int xor_si(const Int& a, const Int& b) {
  return ints([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
inline Int add_epi32(const Int& a, const Int& b) {
  return ints([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + b.lane[i]); });
}
inline Float add_ps(const Float& a, const Float& b) {
  return floats([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Float mul_ps(const Float& a, const Float& b) {
  return floats([&](int i) { return a.lane[i] * b.lane[i]; });
}
// MINPS, MAXPS: the second operand if either is NaN.
inline Float min_ps(const Float& a, const Float& b) {
  return floats([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Float max_ps(const Float& a, const Float& b) {
  return floats([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Float fmadd_ps(const Float& a, const Float& b, const Float& c) {
  return floats([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline Float cvtepi32_ps(const Int& a) {
  return floats([&](int i) { return static_cast<float>(a.lane[i]); });
}
inline Int cvtps_epi32(const Float& a) {  // round to nearest even
  return ints([&](int i) { return static_cast<int32_t>(std::nearbyint(a.lane[i])); });
}
// The order of Intel's reduction: halves, quarters, pairs.
inline float reduce_add_ps(Float a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.lane[i] = a.lane[i] + a.lane[i + width];
  }
  return a.lane[0];
}

// The bytes, sign-extended or not, and the 16-bit halves of a lane.
inline int int8(int32_t lane, int j) { return static_cast<int8_t>(lane >> (8 * j)); }
inline int uint8(int32_t lane, int j) { return static_cast<uint8_t>(lane >> (8 * j)); }
inline int int16(int32_t lane, int j) { return static_cast<int16_t>(lane >> (16 * j)); }

// A lane of four bytes, f(byte, its index in the vector).
template <class F>
inline Int bytes(const Int& v, F f) {
  return ints([&](int i) {
    uint32_t lane = 0;
    for (int j = 0; j < 4; ++j) lane |= static_cast<uint32_t>(f(int8(v.lane[i], j), 4 * i + j) & 255) << (8 * j);
    return static_cast<int32_t>(lane);
  });
}

inline Int abs_epi8(const Int& v) {
  return bytes(v, [](int x, int) { return x < 0 ? -x : x; });
}
inline uint64_t movepi8_mask(const Int& v) {
  uint64_t mask = 0;
  bytes(v, [&](int x, int i) { return mask |= static_cast<uint64_t>(x < 0) << i, 0; });
  return mask;
}
inline Int mask_sub_epi8(const Int& source, uint64_t mask, const Int& a, const Int& b) {
  return bytes(source, [&](int x, int i) {
    return mask >> i & 1 ? int8(a.lane[i / 4], i % 4) - int8(b.lane[i / 4], i % 4) : x;
  });
}

// VPMADDWD: two products of 16-bit integers, added.
inline Int madd_epi16(const Int& a, const Int& b) {
  return ints([&](int i) {
    uint32_t sum = 0;
    for (int j = 0; j < 2; ++j) sum += static_cast<uint32_t>(int16(a.lane[i], j) * int16(b.lane[i], j));
    return static_cast<int32_t>(sum);
  });
}

// VPMADDUBSW: two products of an unsigned byte of a and a signed byte of b, added with saturation to 16 bits.
inline Int maddubs_epi16(const Int& a, const Int& b) {
  return ints([&](int i) {
    uint32_t lane = 0;
    for (int j = 0; j < 2; ++j) {
      int sum = 0;
      for (int h = 2 * j; h < 2 * j + 2; ++h) sum += uint8(a.lane[i], h) * int8(b.lane[i], h);
      sum = sum < -32768 ? -32768 : sum > 32767 ? 32767 : sum;
      lane |= static_cast<uint32_t>(sum & 0xffff) << (16 * j);
    }
    return static_cast<int32_t>(lane);
  });
}

// VPDPBUSD: four products of an unsigned byte of a and a signed byte of b, added to the 32-bit lane without saturation.
inline Int dpbusd(const Int& acc, const Int& a, const Int& b) {
  return ints([&](int i) {
    uint32_t sum = static_cast<uint32_t>(acc.lane[i]);
    for (int j = 0; j < 4; ++j) sum += static_cast<uint32_t>(uint8(a.lane[i], j) * int8(b.lane[i], j));
    return static_cast<int32_t>(sum);
  });
}

// Per 128-bit lane: the low (high) two 32-bit elements of a and b, interleaved.
inline Int unpack32(const Int& a, const Int& b, int first) {
  return ints([&](int i) { return (i % 2 == 0 ? a : b).lane[i / 4 * 4 + first + i % 4 / 2]; });
}
// Per 128-bit lane: the low (high) 64-bit element of a, then that of b.
inline Int unpack64(const Int& a, const Int& b, int first) {
  return ints([&](int i) { return (i % 4 < 2 ? a : b).lane[i / 4 * 4 + first + i % 2]; });
}
// 128-bit lanes: two of a, then two of b, chosen by two bits each.
inline Int shuffle_i32x4(const Int& a, const Int& b, int control) {
  return ints([&](int i) { return (i < 8 ? a : b).lane[(control >> (i / 4 * 2) & 3) * 4 + i % 4]; });
}

inline Int widen(__m256i v) {  // the upper half is undefined in hardware: noise here
  Int r = set1_epi32(0x5a5a5a5a);
  std::memcpy(&r, &v, 32);
  return r;
}
inline __m256i half(const Int& v, int which) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v.lane + 8 * which));
}
inline Int insert_half(Int v, __m256i x, int which) {
  std::memcpy(v.lane + 8 * which, &x, 32);
  return v;
}

inline Int maskz_load8(uint64_t mask, const void* p) {
  Int r{};
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) std::memcpy(reinterpret_cast<char*>(&r) + i, static_cast<const char*>(p) + i, 1);
  }
  return r;
}
inline Float maskz_load_ps(uint16_t mask, const void* p) {
  Float r{};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) r.lane[i] = static_cast<const float*>(p)[i];
  }
  return r;
}
inline void mask_store32(void* p, uint16_t mask, const Int& v) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<int32_t*>(p)[i] = v.lane[i];
  }
}
inline void mask_store_low8(void* p, uint16_t mask, const Int& v) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<int8_t*>(p)[i] = static_cast<int8_t>(v.lane[i]);
  }
}

// 16 bytes, sign-extended.
inline Int cvtepi8_epi32(__m128i v) {
  int8_t bytes[16];
  std::memcpy(bytes, &v, 16);
  return ints([&](int i) { return bytes[i]; });
}

// A bfloat16 number as float, and the instructions on them: subnormal numbers are read and written as zeros.
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float bf16(int32_t lane, int half) {
  const uint32_t bits = half == 0 ? static_cast<uint32_t>(lane) << 16 : static_cast<uint32_t>(lane) & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, 4);
  return flush(x);
}
// VCVTNE2PS2BF16: 16 lanes of b, then 16 of a, rounded to nearest even.
inline Int cvtne2ps(const Float& a, const Float& b) {
  const auto round = [](float x) {
    const float flushed = flush(x);
    uint32_t bits;
    std::memcpy(&bits, &flushed, 4);
    return std::isnan(x) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return ints([&](int i) {
    const float* source = (i < 8 ? b : a).lane + i % 8 * 2;
    return static_cast<int32_t>(round(source[1]) << 16 | round(source[0]));
  });
}
// VDPBF16PS: the product of the odd (upper) halves is added first, then that of the even ones.
inline Float dpbf16(const Float& acc, const Int& a, const Int& b) {
  return floats([&](int i) {
    const float odd = flush(std::fma(bf16(a.lane[i], 1), bf16(b.lane[i], 1), flush(acc.lane[i])));
    return flush(std::fma(bf16(a.lane[i], 0), bf16(b.lane[i], 0), odd));
  });
}
inline Int permutexvar_epi16(const Int& index, const Int& a) {
  uint16_t from[32], to[32], indices[32];
  std::memcpy(from, &a, 64);
  std::memcpy(indices, &index, 64);
  for (int i = 0; i < 32; ++i) to[i] = from[indices[i] & 31];
  return load(to);
}

}  // namespace emulated

#define __m512i emulated::Int
#define __m512 emulated::Float
#define _mm512_loadu_si512(p) emulated::load(p)
#define _mm512_storeu_si512(p, v) emulated::store(p, v)
#define _mm512_loadu_ps(p) emulated::load_ps(p)
#define _mm512_storeu_ps(p, v) emulated::store_ps(p, v)
#define _mm512_setzero_si512() emulated::set1_epi32(0)
#define _mm512_setzero_ps() emulated::set1_ps(0.0f)
#define _mm512_set1_epi32(x) emulated::set1_epi32(x)
#define _mm512_set1_epi8(x) emulated::set1_epi8(x)
#define _mm512_set1_epi16(x) emulated::set1_epi16(x)
#define _mm512_set1_ps(x) emulated::set1_ps(x)
#define _mm512_xor_si512(a, b) emulated::xor_si(a, b)
#define _mm512_add_epi32(a, b) emulated::add_epi32(a, b)
#define _mm512_abs_epi8(a) emulated::abs_epi8(a)
#define _mm512_movepi8_mask(a) emulated::movepi8_mask(a)
#define _mm512_mask_sub_epi8(s, m, a, b) emulated::mask_sub_epi8(s, m, a, b)
#define _mm512_madd_epi16(a, b) emulated::madd_epi16(a, b)
#define _mm512_maddubs_epi16(a, b) emulated::maddubs_epi16(a, b)
#define _mm512_add_ps(a, b) emulated::add_ps(a, b)
#define _mm512_mul_ps(a, b) emulated::mul_ps(a, b)
#define _mm512_min_ps(a, b) emulated::min_ps(a, b)
#define _mm512_max_ps(a, b) emulated::max_ps(a, b)
#define _mm512_fmadd_ps(a, b, c) emulated::fmadd_ps(a, b, c)
#define _mm512_cvtepi32_ps(a) emulated::cvtepi32_ps(a)
#define _mm512_cvtps_epi32(a) emulated::cvtps_epi32(a)
#define _mm512_reduce_add_ps(a) emulated::reduce_add_ps(a)
#define _mm512_dpbusd_epi32(c, a, b) emulated::dpbusd(c, a, b)
#define _mm256_dpbusd_avx_epi32(c, a, b) \
  emulated::half(emulated::dpbusd(emulated::widen(c), emulated::widen(a), emulated::widen(b)), 0)
#define _mm512_unpacklo_epi32(a, b) emulated::unpack32(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack32(a, b, 2)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack64(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack64(a, b, 2)
#define _mm512_shuffle_i32x4(a, b, c) emulated::shuffle_i32x4(a, b, c)
#define _mm512_castsi256_si512(a) emulated::widen(a)
#define _mm512_castsi512_si256(a) emulated::half(a, 0)
#define _mm512_extracti64x4_epi64(a, i) emulated::half(a, i)
#define _mm512_inserti64x4(a, b, i) emulated::insert_half(a, b, i)
#define _mm512_maskz_loadu_epi8(m, p) emulated::maskz_load8(m, p)
#define _mm256_maskz_loadu_epi8(m, p) emulated::half(emulated::maskz_load8(static_cast<uint32_t>(m), p), 0)
#define _mm512_maskz_loadu_ps(m, p) emulated::maskz_load_ps(m, p)
#define _mm512_mask_storeu_epi32(p, m, v) emulated::mask_store32(p, m, v)
#define _mm512_mask_cvtepi32_storeu_epi8(p, m, v) emulated::mask_store_low8(p, m, v)

#define __m512bh emulated::Int
#define _mm512_cvtepi8_epi32(a) emulated::cvtepi8_epi32(a)
#define _mm512_cvtne2ps_pbh(a, b) emulated::cvtne2ps(a, b)
#define _mm512_dpbf16_ps(c, a, b) emulated::dpbf16(c, a, b)
#define _mm512_permutexvar_epi16(i, a) emulated::permutexvar_epi16(i, a)
#define _mm_maskz_loadu_epi8(m, p) \
  _mm256_castsi256_si128(emulated::half(emulated::maskz_load8(static_cast<uint16_t>(m), p), 0))
