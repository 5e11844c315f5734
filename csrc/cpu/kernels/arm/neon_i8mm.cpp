// Advanced SIMD kernels with smmla (Neoverse V1 and N2, Cortex-X2, Apple M2 and later).
#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/target.h"

QK_BEGIN_TARGET("arch=armv8.2-a+dotprod+i8mm")

namespace qk {
namespace {

#include "cpu/kernels/arm/neon.inc"

// smmla adds a product of 2 x 8 by 8 x 2 bytes to 2 x 2 accumulators. A block of either operand is 2 rows of 8 k, so
// the integer panels hold pairs of units: units u and u + 1 of row r at panel[u * rows + 2 * r], u even. If the number
// of units is odd, the last one lies as in NOTE [panels].
struct Smmla {
  static constexpr DotRows kDotRows = {8, 4, 4, 4, 4};
  static constexpr int kRows = 2, kColumns = 2, kUnits = 2;

  static void interleave_int(const uint32_t* const* sources, int rows, int64_t units, uint32_t* panel) {
    int64_t u = 0;
    for (; u + 4 <= units; u += 4) {
      for (int r = 0; r < rows; r += 2) {
        const uint64x2_t even = vreinterpretq_u64_u32(vld1q_u32(sources[r] + u));
        const uint64x2_t odd = vreinterpretq_u64_u32(vld1q_u32(sources[r + 1] + u));
        uint32_t* out = panel + u * rows + 2 * r;
        vst1q_u32(out, vreinterpretq_u32_u64(vzip1q_u64(even, odd)));
        vst1q_u32(out + 2 * rows, vreinterpretq_u32_u64(vzip2q_u64(even, odd)));
      }
    }
    for (; u + 2 <= units; u += 2) {
      for (int r = 0; r < rows; ++r) vst1_u32(panel + u * rows + 2 * r, vld1_u32(sources[r] + u));
    }
    if (u < units) {
      for (int r = 0; r < rows; ++r) panel[u * rows + r] = sources[r][u];
    }
  }

  template <int Pairs>
  __attribute__((always_inline)) static inline void multiply(const uint32_t* a, const uint32_t* b,
                                                             int32x4_t (&acc)[Pairs][6]) {
    multiply_blocks<load_blocks>(a, b, acc);
  }

  template <int Pairs>
  static inline void multiply_last(const uint32_t* a, const uint32_t* b, int32x4_t (&acc)[Pairs][6]) {
    multiply_blocks<load_half_blocks>(a, b, acc);
  }

  static inline float32x4_t rows(const float* p) { return vzip1q_f32(columns(p), columns(p)); }
  static inline float32x4_t columns(const float* p) { return vcombine_f32(vld1_f32(p), vld1_f32(p)); }

  static inline float32x4_t block(const float* tile, int i, int j) {
    const float* first = tile + 2 * i * kNr + 2 * j;
    return vcombine_f32(vld1_f32(first), vld1_f32(first + kNr));
  }

  template <class T, int Pairs>
  static inline T row(const T (&acc)[Pairs][6], int r, int c) {
    const auto left = (uint64x2_t)acc[r / 2][c / 2], right = (uint64x2_t)acc[r / 2][c / 2 + 1];
    return (T)(r % 2 == 0 ? vzip1q_u64(left, right) : vzip2q_u64(left, right));
  }

 private:
  // Blocks i and i + 1 of an operand.
  static inline int8x16x2_t load_blocks(const uint32_t* units, int i) {
    return {{load_bytes(units + 4 * i), load_bytes(units + 4 * i + 4)}};
  }

  // The same of a last unit, paired with zeros.
  static inline int8x16x2_t load_half_blocks(const uint32_t* units, int i) {
    const uint32x4_t v = vld1q_u32(units + 2 * i), zero = vdupq_n_u32(0);
    return {{vreinterpretq_s8_u32(vzip1q_u32(v, zero)), vreinterpretq_s8_u32(vzip2q_u32(v, zero))}};
  }

  template <int8x16x2_t (*Load)(const uint32_t* units, int i), int Pairs>
  __attribute__((always_inline)) static inline void multiply_blocks(const uint32_t* a, const uint32_t* b,
                                                                    int32x4_t (&acc)[Pairs][6]) {
    int8x16x2_t rows[Pairs / 2];
#pragma GCC unroll 2
    for (int i = 0; i < Pairs; i += 2) rows[i / 2] = Load(a, i);
#pragma GCC unroll 3
    for (int j = 0; j < 6; j += 2) {
      // Keeps GCC from loading all of B first, which leaves too few registers for the accumulators.
      asm volatile("" ::: "memory");
      const int8x16x2_t columns = Load(b, j);
#pragma GCC unroll 2
      for (int i = 0; i < Pairs; i += 2) {
        acc[i][j] = vmmlaq_s32(acc[i][j], rows[i / 2].val[0], columns.val[0]);
        acc[i][j + 1] = vmmlaq_s32(acc[i][j + 1], rows[i / 2].val[0], columns.val[1]);
        acc[i + 1][j] = vmmlaq_s32(acc[i + 1][j], rows[i / 2].val[1], columns.val[0]);
        acc[i + 1][j + 1] = vmmlaq_s32(acc[i + 1][j + 1], rows[i / 2].val[1], columns.val[1]);
      }
    }
  }
};

}  // namespace

QK_END_TARGET

const Kernels& neon_i8mm_kernels() {
  static constexpr Kernels table = neon_table<Smmla>("neon_i8mm");
  return table;
}

}  // namespace qk

#endif  // __aarch64__
