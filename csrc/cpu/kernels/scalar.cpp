// The scalar kernels: no intrinsics, one obvious loop each. They are the oracle of the other instruction sets and run
// on any CPU.
#include "cpu/kernels/kernels.h"

namespace qk {
namespace {

constexpr int kMr = 4, kMrGrouped = kMr;
constexpr int kNr = 8;

void half_to_floats(const uint16_t* src, int64_t n, float* dst);
void floats_to_half(const float* src, int64_t n, uint16_t* dst);

constexpr int kVector = 4;  // lanes of 32 bits
#include "cpu/kernels/common.inc"

void store_int(const int32_t* tile, const TileOutput& output) { store_tile(tile, output); }
void store_float(const float* tile, const TileOutput& output) { store_tile(tile, output); }

float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // Inf, NaN
  if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + ((127 - 15) << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

// Round to nearest even.
uint16_t half_of_float(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000;
  uint32_t bits = bits_of(x) & 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (bits >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 65536 and above: Inf
  if (bits < 0x38800000) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24, the subnormal step
    return static_cast<uint16_t>(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((bits - ((127 - 15) << 23)) >> 13));
}

void half_to_floats(const uint16_t* src, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = float_of_half(src[i]);
}

void floats_to_half(const float* src, int64_t n, uint16_t* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = half_of_float(src[i]);
}

void quantize(const float* x, int64_t n, float inverse, int8_t* q) {
  for (int64_t i = 0; i < n; ++i) {
    const float rounded = (x[i] * inverse + kRoundMagic) - kRoundMagic;
    q[i] = static_cast<int8_t>(rounded < -127.0f ? -127.0f : rounded > 127.0f ? 127.0f : rounded);
  }
}

void requantize(const int8_t* q, int64_t n, float scale, const float* inverse, int8_t* w8) {
  for (int64_t i = 0; i < n; ++i) {
    float w = (static_cast<float>(q[i]) * scale) * inverse[i];
    w = w > -127.0f ? w : -127.0f;
    w = w < 127.0f ? w : 127.0f;
    w8[i] = static_cast<int8_t>((w + kRoundMagic) - kRoundMagic);
  }
}

int nibble(const uint8_t* packed, int64_t i) { return i % 2 == 0 ? packed[i / 2] & 15 : packed[i / 2] >> 4; }

void unpack_int4(const uint8_t* packed, int64_t n, int zero, int8_t* q) {
  for (int64_t i = 0; i < n; ++i) q[i] = static_cast<int8_t>(nibble(packed, i) - zero);
}

void encode(const int8_t* q, int64_t k, uint32_t* units) {
  for (int64_t i = 0; i < k; ++i) units[i] = static_cast<uint32_t>(static_cast<int32_t>(q[i]));
}

void interleave(const uint32_t* const* sources, int rows, int64_t units, uint32_t* panel) {
  for (int64_t u = 0; u < units; ++u) {
    for (int r = 0; r < rows; ++r) panel[u * rows + r] = sources[r][u];
  }
}

void interleave_across(const int8_t* q, int64_t stride, int64_t rows, int64_t cols, uint32_t* panels, int64_t panel) {
  for (int64_t n = 0; n < rows; ++n, q += stride, panels += kNr) {
    for (int64_t c = 0; c < round_up(cols, kNr); ++c) {
      panels[c / kNr * panel + c % kNr] = c < cols ? static_cast<uint32_t>(static_cast<int32_t>(q[c])) : 0;
    }
  }
}

void int_tile(int64_t units, const uint32_t* a, const uint32_t* b, const int32_t* start, int64_t stride,
              int32_t* tile) {
  for (int i = 0; i < kMr; ++i) {
    for (int j = 0; j < kNr; ++j) {
      uint32_t acc = static_cast<uint32_t>(start[i * stride + j]);
      for (int64_t u = 0; u < units; ++u) acc += a[u * kMr + i] * b[u * kNr + j];
      tile[i * kNr + j] = static_cast<int32_t>(acc);
    }
  }
}

void int_tile_grouped(const GroupedTile& args) {
  int64_t g = 0;
  for (int64_t u = 0; u < args.units; u += args.group_units, ++g) {
    const int64_t units = args.units - u < args.group_units ? args.units - u : args.group_units;
    int32_t acc[kMr * kNr];
    int_tile(units, args.a + u * kMr, args.b + u * kNr, args.start + g * kNr, 0, acc);
    for (int i = 0; i < kMr; ++i) {
      const float x_scale = args.x_scales != nullptr ? args.x_scales[g * kMr + i] : 1.0f;
      for (int j = 0; j < kNr; ++j) {
        const float scale = args.w_scales[g * kNr + j] * x_scale;
        args.tile[i * kNr + j] = args.tile[i * kNr + j] + static_cast<float>(acc[i * kNr + j]) * scale;
      }
    }
  }
}

void float_tile(int64_t units, const float* a, const float* b, float* tile) {
  for (int64_t u = 0; u < units; ++u) {
    for (int i = 0; i < kMr; ++i) {
      for (int j = 0; j < kNr; ++j) tile[i * kNr + j] += a[u * kMr + i] * b[u * kNr + j];
    }
  }
}

// Products of bfloat16 numbers are exact, so the order of the two additions is all there is to choose: that of the
// Intel manual.
void bf16_tile(int64_t units, const uint32_t* a, const uint32_t* b, const float* scales, float* tile) {
  constexpr uint32_t kOdd = 0xffff0000;
  for (int i = 0; i < kMr; ++i) {
    for (int j = 0; j < kNr; ++j) {
      float acc = 0.0f;
      for (int64_t u = 0; u < units; ++u) {
        const uint32_t x = a[u * kMr + i], w = b[u * kNr + j];
        acc += float_of(x & kOdd) * float_of(w & kOdd);
        acc += float_of(x << 16) * float_of(w << 16);
      }
      tile[i * kNr + j] = tile[i * kNr + j] + acc * scales[j];
    }
  }
}

void encode_bf16(const int8_t* q, int64_t k, uint32_t* units) {
  for (int64_t i = 0; i < k; i += 2) {
    const float odd = i + 1 < k ? q[i + 1] : 0.0f;
    units[i / 2] = uint32_t{bfloat16_of(odd)} << 16 | bfloat16_of(q[i]);
  }
}

void encode_bf16_pair(const int8_t* const* q, const float* scales, int64_t n, uint32_t* units) {
  for (int64_t i = 0; i < n; ++i) {
    units[i] = uint32_t{bfloat16_of(q[1][i] * scales[1])} << 16 | bfloat16_of(q[0][i] * scales[0]);
  }
}

void encode_bf16_pair_min(const int8_t* const* q, const float* scales, const float* minima, int64_t n,
                          uint32_t* units) {
  for (int64_t i = 0; i < n; ++i) {
    const float low = q[0][i] * scales[0] + minima[0], high = q[1][i] * scales[1] + minima[1];
    units[i] = uint32_t{bfloat16_of(high)} << 16 | bfloat16_of(low);
  }
}

void dot_int8(const int8_t* x, const uint8_t* const* w, int64_t k, int64_t group, int32_t* sums) {
  for (int64_t begin = 0, g = 0; begin < k; begin += group, ++g) {
    const int64_t end = begin + group < k ? begin + group : k;
    for (int r = 0; r < 4; ++r) {
      int32_t acc = 0;
      for (int64_t i = begin; i < end; ++i) acc += x[i] * static_cast<int8_t>(w[r][i]);
      sums[g * 4 + r] = acc;
    }
  }
}

void dot_int4(const int8_t* x, const uint8_t* const* w, int64_t k, int64_t group, int32_t* sums) {
  for (int64_t begin = 0, g = 0; begin < k; begin += group, ++g) {
    const int64_t end = begin + group < k ? begin + group : k;
    for (int r = 0; r < 4; ++r) {
      int32_t acc = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t position = i / 64 * 64 + i % 2 * 32 + i % 64 / 2;  // even ones first, then odd ones
        acc += x[position] * nibble(w[r], i);
      }
      sums[g * 4 + r] = acc;
    }
  }
}

float dot_float(const float* x, const float* w, int64_t n) {
  float acc = 0.0f;
  for (int64_t i = 0; i < n; ++i) acc += x[i] * w[i];
  return acc;
}

#include "cpu/kernels/table.inc"

}  // namespace

const Kernels& scalar_kernels() {
  static constexpr Bf16Kernels bf16 = {.mr = kMr,
                                       .encode = encode_bf16,
                                       .encode_pair = encode_bf16_pair,
                                       .encode_pair_min = encode_bf16_pair_min,
                                       .tile = bf16_tile};
  static constexpr Kernels table = [] {
    constexpr PanelKernels panels = {
        .unit = 1,
        .encode_a = encode,
        .encode_b = encode,
        .interleave = interleave,
        .interleave_int = interleave,
        .interleave_across = interleave_across,
    };
    Kernels t = common_table("scalar", panels, int_tile, int_tile_grouped, {4, 4, 4, 4, 4});
    t.bf16 = &bf16;
    return t;
  }();
  return table;
}

}  // namespace qk
