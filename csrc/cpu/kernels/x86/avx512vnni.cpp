// AVX-512 VNNI kernels (Ice Lake, Zen 4 and later): vpdpbusd multiplies 64 unsigned by signed bytes an instruction.
// A is stored shifted by 128 in the panels, see NOTE [shift] in kernels.h; the row dots shift the weight instead, so
// that their correction depends on x only.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/target.h"

QK_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")

namespace qk {
namespace {

constexpr int kUnit = 4;
constexpr int kUnitsPerPass = 8;  // GCC copies the accumulators once a pass

inline __m512i add_products(__m512i acc, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(acc, a, b); }

inline __m512i add_dot(__m512i acc, __m512i w, __m512i x) {
  return _mm512_dpbusd_epi32(acc, _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80))), x);
}

inline __m512i add_dot_int4(__m512i acc, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }

#include "cpu/kernels/x86/avx512.inc"

void column_sums(int64_t units, const uint32_t* panel, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i acc0 = _mm512_setzero_si512(), acc1 = _mm512_setzero_si512();
  for (int64_t u = 0; u < units; ++u, panel += kNr) {
    acc0 = add_products(acc0, ones, _mm512_loadu_si512(panel));
    acc1 = add_products(acc1, ones, _mm512_loadu_si512(panel + 16));
  }
  _mm512_storeu_si512(sums, acc0);
  _mm512_storeu_si512(sums + 16, acc1);
}

}  // namespace

QK_END_TARGET

const Kernels& avx512vnni_kernels() {
  static const Kernels table = {
      .name = "avx512vnni",
      .to_float = to_float,
      .from_float = from_float,
      .absmax_bits = absmax_bits,
      .quantize = quantize,
      .absmax_bits_bf16 = absmax_bits_bf16,
      .quantize_bf16 = quantize_bf16,
      .unpack_int4 = unpack_int4,
      .unpack_int4_groups = unpack_int4_groups,
      .dequantize = dequantize,
      .requantize = requantize,
      .sum = sum,
      .scale = scale,
      .scale_each = scale_each,
      .max_bits = max_bits,
      .round_stochastic = round_stochastic,
      .range = range,
      .quantize_int4 = quantize_int4,
      .pack_int4 = pack_int4,
      .mask_clipped = mask_clipped,
      .quantize_clamped = quantize_clamped,
      .scale_gradient = scale_gradient,
      .transpose = transpose,
      .unit = kUnit,
      .a_shift = 128,
      .encode_a = encode_shifted,
      .encode_b = nullptr,
      .interleave = interleave,
      .interleave_int = interleave,
      .interleave_across = interleave_across<4>,
      .column_sums = column_sums,
      .mr = kMr,
      .mr_grouped = kMrGrouped,
      .mr_float = kMr,
      .nr = kNr,
      .int_tile = int_tile,
      .int_tile_grouped = int_tile_grouped,
      .float_tile = float_tile,
      .nibbles = nullptr,
      .store_int = store_int,
      .store_float = store_float,
      .end_nontemporal = end_nontemporal,
      .dot_rows = {32, 12, 12, 16, 4},
      .dot_shift = 128,
      .dot_int8 = dot_int8,
      .x4_bytes = 1,
      .dot_int8_x4 = dot_int8_x4,
      .dot_int4 = dot_int4,
      .combine = combine,
      .group_dots = &kGroupDots,
      .dot_float = dot_float,
      .softmax_row = softmax_row,
      .scale_and_add = scale_and_add,
  };
  return table;
}

}  // namespace qk

#endif  // __x86_64__
