// A stand-in for the AVX-512 and AMX parts of <immintrin.h>: the intrinsics that csrc/cpu uses, computed lane by lane
// as the Intel SDM defines them, so that the kernels can be compiled and run on a CPU with AVX2 only
// (tests/native/test_emulation.py). Everything up to AVX2 is the real thing. Masked loads touch selected lanes only.
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
inline Float floats_of(const Int& a) {
  Float r;
  std::memcpy(&r, &a, sizeof r);
  return r;
}
inline Int or_si(const Int& a, const Int& b) {
  return ints([&](int i) { return a.lane[i] | b.lane[i]; });
}
inline Int and_si(const Int& a, const Int& b) {
  return ints([&](int i) { return a.lane[i] & b.lane[i]; });
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

inline void mask_store8(void* p, uint64_t mask, const Int& v) {
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) static_cast<char*>(p)[i] = reinterpret_cast<const char*>(&v)[i];
  }
}
inline Int maskz_load32(uint16_t mask, const void* p) {
  Int r{};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(&r.lane[i], static_cast<const int32_t*>(p) + i, 4);
  }
  return r;
}

inline Int bits(const Float& v) { return load(&v); }
inline Int srli_epi32(const Int& v, int count) {
  return ints([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(v.lane[i]) >> count); });
}
inline uint16_t unordered(const Float& a, const Float& b) {
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint16_t>((std::isnan(a.lane[i]) || std::isnan(b.lane[i])) << i);
  return mask;
}
inline Int mask_or_epi32(const Int& source, uint16_t mask, const Int& a, const Int& b) {
  return ints([&](int i) { return mask >> i & 1 ? a.lane[i] | b.lane[i] : source.lane[i]; });
}
// The low halves of the lanes.
inline __m256i cvtepi32_epi16(const Int& v) {
  uint16_t low[16];
  for (int i = 0; i < 16; ++i) low[i] = static_cast<uint16_t>(v.lane[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
}

// 32 bytes, zero-extended to 16 bits.
inline Int cvtepu8_epi16(__m256i v) {
  uint8_t bytes[32];
  std::memcpy(bytes, &v, 32);
  return ints([&](int i) { return bytes[2 * i] | bytes[2 * i + 1] << 16; });
}
// 16 halves, zero-extended to 32 bits.
inline Int cvtepu16_epi32(__m256i v) {
  uint16_t halves[16];
  std::memcpy(halves, &v, 32);
  return ints([&](int i) { return halves[i]; });
}
inline Int slli_epi32(const Int& v, int count) {
  return ints([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(v.lane[i]) << count); });
}
inline Int slli_epi16(const Int& v, int count) {
  return ints([&](int i) {
    const auto lane = static_cast<uint32_t>(v.lane[i]);
    return static_cast<int32_t>((lane << count & 0xffff) | ((lane >> 16) << count & 0xffff) << 16);
  });
}

inline Int srli_epi16(const Int& v, int count) {
  return ints([&](int i) {
    const auto lane = static_cast<uint32_t>(v.lane[i]);
    return static_cast<int32_t>((lane & 0xffff) >> count | lane >> 16 >> count << 16);
  });
}

inline Int sub_epi32(const Int& a, const Int& b) {
  return ints([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) - b.lane[i]); });
}

// The low halves of the products.
inline Int mullo_epi32(const Int& a, const Int& b) {
  return ints([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) * b.lane[i]); });
}

inline Int permutexvar_epi32(const Int& index, const Int& a) {
  return ints([&](int i) { return a.lane[index.lane[i] & 15]; });
}

template <class... Lanes>
inline Int setr_epi32(Lanes... lanes) {
  return {{lanes...}};
}

inline Int broadcast_i32x4(__m128i v) {
  int32_t lanes[4];
  std::memcpy(lanes, &v, 16);
  return ints([&](int i) { return lanes[i % 4]; });
}

// VPSHUFB: within each 128-bit lane; 0 where the top bit of the index is set.
inline Int shuffle_epi8(const Int& a, const Int& index) {
  const auto *from = reinterpret_cast<const uint8_t*>(a.lane), *at = reinterpret_cast<const uint8_t*>(index.lane);
  uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = at[i] & 0x80 ? 0 : from[i / 16 * 16 + (at[i] & 15)];
  return load(bytes);
}

// 16 bytes, with zeros.
inline Int cvtepu8_epi32(__m128i v) {
  uint8_t bytes[16];
  std::memcpy(bytes, &v, 16);
  return ints([&](int i) { return bytes[i]; });
}

// 16 bytes, sign-extended.
inline Int cvtepi8_epi32(__m128i v) {
  int8_t bytes[16];
  std::memcpy(bytes, &v, 16);
  return ints([&](int i) { return bytes[i]; });
}

// VPMULUDQ: 64-bit products of the even (low) lanes.
inline Int mul_epu32(const Int& a, const Int& b) {
  return ints([&](int i) {
    const uint64_t product = uint64_t{static_cast<uint32_t>(a.lane[i & ~1])} * static_cast<uint32_t>(b.lane[i & ~1]);
    return static_cast<int32_t>(product >> (i % 2 * 32));
  });
}
inline Int high_halves(const Int& a) {  // VPSRLQ by 32
  return ints([&](int i) { return i % 2 == 0 ? a.lane[i + 1] : 0; });
}
inline Int mask_shuffle_epi32(const Int& source, uint16_t mask, const Int& a, int control) {
  return ints([&](int i) { return mask >> i & 1 ? a.lane[i / 4 * 4 + (control >> (i % 4 * 2) & 3)] : source.lane[i]; });
}
inline Int min_epi32(const Int& a, const Int& b) {
  return ints([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Int max_epi32(const Int& a, const Int& b) {
  return ints([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Int mask_add_epi32(const Int& source, uint16_t mask, const Int& a, const Int& b) {
  const Int sum = add_epi32(a, b);
  return ints([&](int i) { return mask >> i & 1 ? sum.lane[i] : source.lane[i]; });
}
inline Float sub_ps(const Float& a, const Float& b) {
  return floats([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Float floor_ps(const Float& a) {
  return floats([&](int i) { return std::floor(a.lane[i]); });
}
inline uint16_t less_mask(const Float& a, const Float& b) {
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) mask = static_cast<uint16_t>(mask | (a.lane[i] < b.lane[i]) << i);
  return mask;
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

// The tile registers of a thread and their shapes. What a load does not reach is zero.
struct Tiles {
  uint8_t data[8][16][64];
  int rows[8], row_bytes[8];
};
inline thread_local Tiles tiles;

inline void tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  std::memset(&tiles, 0, sizeof tiles);
  for (int t = 0; t < 8; ++t) {
    tiles.row_bytes[t] = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8;
    tiles.rows[t] = bytes[48 + t];
  }
}
inline void tile_zero(int t) { std::memset(tiles.data[t], 0, sizeof tiles.data[t]); }
inline void tile_load(int t, const void* p, int64_t stride) {
  tile_zero(t);
  for (int r = 0; r < tiles.rows[t]; ++r) {
    std::memcpy(tiles.data[t][r], static_cast<const char*>(p) + r * stride, tiles.row_bytes[t]);
  }
}
inline void tile_store(int t, void* p, int64_t stride) {
  for (int r = 0; r < tiles.rows[t]; ++r) {
    std::memcpy(static_cast<char*>(p) + r * stride, tiles.data[t][r], tiles.row_bytes[t]);
  }
}
template <class T>
inline T* tile_row(int t, int r) {
  return reinterpret_cast<T*>(tiles.data[t][r]);
}

// TDPBSSD: four products of signed bytes, added to the 32-bit element.
inline void tile_dpbssd(int c, int a, int b) {
  for (int m = 0; m < tiles.rows[c]; ++m) {
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      auto sum = static_cast<uint32_t>(tile_row<int32_t>(c, m)[n]);
      for (int k = 0; k < tiles.row_bytes[a]; ++k) {
        sum += static_cast<uint32_t>(tile_row<int8_t>(a, m)[k] * tile_row<int8_t>(b, k / 4)[4 * n + k % 4]);
      }
      tile_row<int32_t>(c, m)[n] = static_cast<int32_t>(sum);
    }
  }
}
// TDPBF16PS: the products of the even and of the odd numbers are summed apart, and their sum is added to the element.
inline void tile_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < tiles.rows[c]; ++m) {
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      float sums[2] = {};
      for (int k = 0; k < tiles.row_bytes[a] / 4; ++k) {
        for (int h = 0; h < 2; ++h) {
          sums[h] = flush(std::fma(bf16(tile_row<int32_t>(a, m)[k], h), bf16(tile_row<int32_t>(b, k)[n], h), sums[h]));
        }
      }
      float& element = tile_row<float>(c, m)[n];
      element = flush(flush(element) + flush(sums[0] + sums[1]));
    }
  }
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
#define _mm512_load_si512(p) emulated::load(p)
#define _mm512_store_si512(p, v) emulated::store(p, v)
#define _mm512_stream_si512(p, v) emulated::store(p, v)
#define _mm512_load_ps(p) emulated::load_ps(p)
#define _mm512_store_ps(p, v) emulated::store_ps(p, v)
#define _mm512_loadu_ps(p) emulated::load_ps(p)
#define _mm512_storeu_ps(p, v) emulated::store_ps(p, v)
#define _mm512_setzero_si512() emulated::set1_epi32(0)
#define _mm512_setzero_ps() emulated::set1_ps(0.0f)
#define _mm512_set1_epi32(x) emulated::set1_epi32(x)
#define _mm512_set1_epi8(x) emulated::set1_epi8(x)
#define _mm512_set1_epi16(x) emulated::set1_epi16(x)
#define _mm512_set1_ps(x) emulated::set1_ps(x)
#define _mm512_castps_si512(a) emulated::bits(a)
#define _mm512_castsi512_ps(a) emulated::floats_of(a)
#define _mm512_srli_epi32(a, n) emulated::srli_epi32(a, n)
#define _mm512_mask_or_epi32(s, m, a, b) emulated::mask_or_epi32(s, m, a, b)
#define _mm512_cvtepi32_epi16(a) emulated::cvtepi32_epi16(a)
#define _mm512_or_si512(a, b) emulated::or_si(a, b)
#define _mm512_and_si512(a, b) emulated::and_si(a, b)
#define _mm512_slli_epi16(a, n) emulated::slli_epi16(a, n)
#define _mm512_slli_epi32(a, n) emulated::slli_epi32(a, n)
#define _mm512_cvtepu8_epi16(a) emulated::cvtepu8_epi16(a)
#define _mm512_cvtepu16_epi32(a) emulated::cvtepu16_epi32(a)
#define _mm512_xor_si512(a, b) emulated::xor_si(a, b)
#define _mm512_broadcast_i32x4(a) emulated::broadcast_i32x4(a)
#define _mm512_shuffle_epi8(a, i) emulated::shuffle_epi8(a, i)
#define _mm512_srli_epi16(a, n) emulated::srli_epi16(a, n)
#define _mm512_sub_epi32(a, b) emulated::sub_epi32(a, b)
#define _mm512_mullo_epi32(a, b) emulated::mullo_epi32(a, b)
#define _mm512_permutexvar_epi32(i, a) emulated::permutexvar_epi32(i, a)
#define _mm512_setr_epi32(...) emulated::setr_epi32(__VA_ARGS__)
#define _mm512_cvtepu8_epi32(a) emulated::cvtepu8_epi32(a)
#define _mm512_add_epi32(a, b) emulated::add_epi32(a, b)
#define _mm512_abs_epi8(a) emulated::abs_epi8(a)
#define _mm512_movepi8_mask(a) emulated::movepi8_mask(a)
#define _mm512_sub_epi8(a, b) emulated::mask_sub_epi8(a, ~0ull, a, b)
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
#define _mm512_maskz_loadu_epi32(m, p) emulated::maskz_load32(m, p)
#define _mm512_mask_storeu_epi8(p, m, v) emulated::mask_store8(p, m, v)
#define _mm512_mask_storeu_epi32(p, m, v) emulated::mask_store32(p, m, v)
#define _mm512_mask_cvtepi32_storeu_epi8(p, m, v) emulated::mask_store_low8(p, m, v)

// VRNDSCALEPS, VCMPPS and VPSRLQ as they are used: towards minus infinity, unordered or less than, by 32.
#define _mm512_roundscale_ps(a, control) emulated::floor_ps(a)
#define _mm512_cmp_ps_mask(a, b, predicate) \
  ((predicate) == _CMP_UNORD_Q ? emulated::unordered(a, b) : emulated::less_mask(a, b))
#define _mm512_srli_epi64(a, count) emulated::high_halves(a)
#define _mm512_mul_epu32(a, b) emulated::mul_epu32(a, b)
#define _mm512_mask_shuffle_epi32(s, m, a, c) emulated::mask_shuffle_epi32(s, m, a, c)
#define _mm512_min_epi32(a, b) emulated::min_epi32(a, b)
#define _mm512_max_epi32(a, b) emulated::max_epi32(a, b)
#define _mm512_mask_add_epi32(s, m, a, b) emulated::mask_add_epi32(s, m, a, b)
#define _mm512_sub_ps(a, b) emulated::sub_ps(a, b)

#define __m512bh emulated::Int
#define _mm512_cvtepi8_epi32(a) emulated::cvtepi8_epi32(a)
#define _mm512_cvtne2ps_pbh(a, b) emulated::cvtne2ps(a, b)
#define _mm512_dpbf16_ps(c, a, b) emulated::dpbf16(c, a, b)
#define _mm512_permutexvar_epi16(i, a) emulated::permutexvar_epi16(i, a)
#define _mm_maskz_loadu_epi8(m, p) \
  _mm256_castsi256_si128(emulated::half(emulated::maskz_load8(static_cast<uint16_t>(m), p), 0))

#define _tile_loadconfig(p) emulated::tile_loadconfig(p)
#define _tile_release() ((void)0)
#define _tile_zero(t) emulated::tile_zero(t)
#define _tile_loadd(t, p, stride) emulated::tile_load(t, p, stride)
#define _tile_stored(t, p, stride) emulated::tile_store(t, p, stride)
#define _tile_dpbssd(c, a, b) emulated::tile_dpbssd(c, a, b)
#define _tile_dpbf16ps(c, a, b) emulated::tile_dpbf16ps(c, a, b)
