// Advanced SIMD kernels with sdot (Cortex-A76, Neoverse N1, Apple M1 and later).
#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/target.h"

QK_BEGIN_TARGET("arch=armv8.2-a+dotprod")

namespace qk {
namespace {

#include "cpu/kernels/arm/neon.inc"

// sdot multiplies 4 bytes by 4 bytes into each accumulator: the units of 4 columns by the unit of one row, a lane.
struct Sdot {
  static constexpr DotRows kDotRows = {16, 4, 4, 4, 4};
  static constexpr auto interleave_int = interleave;
  static constexpr int kRows = 1, kColumns = 4, kUnits = 1;

  template <int Rows>
  __attribute__((always_inline)) static inline void multiply(const uint32_t* a, const uint32_t* b,
                                                             int32x4_t (&acc)[Rows][3]) {
    const int8x16_t columns[3] = {load_bytes(b), load_bytes(b + 4), load_bytes(b + 8)};
#pragma GCC unroll 2
    for (int i = 0; i < Rows; i += 4) {
      const int8x16_t rows = load_bytes(a + i);
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        acc[i][j] = vdotq_laneq_s32(acc[i][j], columns[j], rows, 0);
        acc[i + 1][j] = vdotq_laneq_s32(acc[i + 1][j], columns[j], rows, 1);
        acc[i + 2][j] = vdotq_laneq_s32(acc[i + 2][j], columns[j], rows, 2);
        acc[i + 3][j] = vdotq_laneq_s32(acc[i + 3][j], columns[j], rows, 3);
      }
    }
  }

  static inline float32x4_t rows(const float* p) { return vld1q_dup_f32(p); }
  static inline float32x4_t columns(const float* p) { return vld1q_f32(p); }

  static inline float32x4_t block(const float* tile, int i, int j) { return vld1q_f32(tile + i * kNr + 4 * j); }

  template <class T, int Rows>
  static inline T row(const T (&acc)[Rows][3], int r, int c) {
    return acc[r][c / 4];
  }
};

}  // namespace

QK_END_TARGET

const Kernels& neon_dotprod_kernels() {
  static constexpr Kernels table = neon_table<Sdot>("neon_dotprod");
  return table;
}

}  // namespace qk

#endif  // __aarch64__
