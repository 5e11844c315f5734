// AMX kernels (Sapphire Rapids and later): tdpbssd multiplies a tile of 16 rows by 64 bytes of A with one of 16 units
// by 16 columns of B, 8 times as many products a cycle as vpdpbusd; tdpbf16ps does so with pairs of bfloat16 numbers.
// Both operands are signed. Everything but the matrix tiles is as in avx512bf16.cpp. tdpbf16ps reads and writes
// subnormal numbers as zeros, whatever the mode of the CPU (docs/numerics.md).
//
// A tile of a panel of A is 16 rows of 64 bytes: the panel is ordered as [units / 16, kMr, 16]. A tile of a panel of B
// is 16 units of 16 columns, as the panels of avx512.inc already have them, a row of the panel apart.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/target.h"

QK_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-int8,amx-bf16,fma")

namespace qk {
namespace {

constexpr int kMr = 32;  // 2 x 2 accumulators; with 2 tiles of A and 2 of B they are all 8 registers
constexpr int kNr = 32;
constexpr int kRows = kTileRows, kRowBytes = 64;  // of a tile
constexpr int kStep = kRowBytes / 4;              // units that a whole tile is deep
constexpr int kStrideB = kNr * 4;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Accumulators are registers 0 .. 3, tiles of A 4 and 5, tiles of B 6 and 7.
  constexpr explicit TileConfig(int depth_bytes) {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? depth_bytes : kRowBytes);
      rows[i] = static_cast<uint8_t>(i >= 6 ? depth_bytes / 4 : kRows);
    }
  }
};
constexpr TileConfig kWhole(kRowBytes), kHalf(kRowBytes / 2), kQuarter(kRowBytes / 4);

void begin_tiles(int64_t bytes) {
  _tile_loadconfig(bytes < kRowBytes / 2 ? &kQuarter : bytes < kRowBytes ? &kHalf : &kWhole);
}

void end_tiles() { _tile_release(); }

void encode_a(const int8_t* q, int64_t k, uint32_t* units) {
  units[(k - 1) / 4] = 0;
  __builtin_memcpy(units, q, k);
}

void interleave_a(const uint32_t* const* sources, int rows, int64_t units, uint32_t* panel) {
  for (int64_t u = 0; u < units; u += kStep) {
    const auto mask = static_cast<__mmask16>(units - u < kStep ? (1u << (units - u)) - 1 : 0xffff);
    for (int r = 0; r < rows; ++r, panel += kStep)
      _mm512_store_si512(panel, _mm512_maskz_loadu_epi32(mask, sources[r] + u));
  }
}

inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store(void* tile) {
  auto* bytes = static_cast<char*>(tile);
  _tile_stored(0, bytes, kStrideB);
  _tile_stored(1, bytes + kRowBytes, kStrideB);
  _tile_stored(2, bytes + kRows * kStrideB, kStrideB);
  _tile_stored(3, bytes + kRows * kStrideB + kRowBytes, kStrideB);
}

inline void load(const uint32_t* a, const uint32_t* b) {
  _tile_loadd(4, a, kRowBytes);
  _tile_loadd(6, b, kStrideB);
  _tile_loadd(5, a + kRows * kStep, kRowBytes);
  _tile_loadd(7, b + kStep, kStrideB);
}

inline void add_bf16(const uint32_t* a, const uint32_t* b) {
  load(a, b);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

// Prefetches a quarter of A two steps ahead into L1: it comes from L2, while B is in L1 already.
inline void prefetch_a(const uint32_t* a, int part) {
  constexpr int kLines = kMr / 4, kLineUnits = kRowBytes / 4;
#pragma GCC unroll 8
  for (int i = 0; i < kLines; ++i) __builtin_prefetch(a + 2 * kStep * kMr + (part * kLines + i) * kLineUnits, 0, 3);
}

void int_tile(int64_t units, const uint32_t* a, const uint32_t* b, const int32_t* start, int64_t stride,
              int32_t* tile) {
  if (stride == 0) {
    clear();
  } else {
    _tile_loadd(0, start, kStrideB);
    _tile_loadd(1, start + kStep, kStrideB);
    _tile_loadd(2, start + kRows * kNr, kStrideB);
    _tile_loadd(3, start + kRows * kNr + kStep, kStrideB);
  }
  for (int64_t u = 0; u < units; u += kStep, a += kStep * kMr, b += kStep * kNr) {
    _tile_loadd(4, a, kRowBytes);
    _tile_loadd(6, b, kStrideB);
    prefetch_a(a, 0);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, a + kRows * kStep, kRowBytes);
    prefetch_a(a, 1);
    _tile_dpbssd(2, 5, 6);
    _tile_loadd(7, b + kStep, kStrideB);
    prefetch_a(a, 2);
    _tile_dpbssd(1, 4, 7);
    prefetch_a(a, 3);
    _tile_dpbssd(3, 5, 7);
  }
  store(tile);
}

void bf16_tile(int64_t units, const uint32_t* a, const uint32_t* b, const float* scales, float* tile) {
  alignas(64) float sums[kMr * kNr];
  clear();
  for (int64_t u = 0; u < units; u += kStep) add_bf16(a + u * kMr, b + u * kNr);
  store(sums);
  const __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
  for (float* sum = sums; sum < sums + kMr * kNr; sum += kNr, tile += kNr) {
    _mm512_store_ps(tile, _mm512_add_ps(_mm512_load_ps(tile), _mm512_mul_ps(_mm512_load_ps(sum), scale0)));
    _mm512_store_ps(tile + 16,
                    _mm512_add_ps(_mm512_load_ps(tile + 16), _mm512_mul_ps(_mm512_load_ps(sum + 16), scale1)));
  }
}

// The weight takes the place of A, so that its rows are tiles as they are stored. They are prefetched: 32 streams
// are more than the hardware follows.
void dot_tile(int64_t units, const int8_t* w, int64_t stride, const uint32_t* x, int panels, int32_t* sums) {
  constexpr int64_t kAhead = 8 * kRowBytes;
  const uint32_t* next = x + (panels > 1 ? units * kRows : 0);
  clear();
  for (int64_t u = 0; u < units; u += kStep, w += kRowBytes) {
    for (int r = 0; r < 2 * kRows; ++r) __builtin_prefetch(w + r * stride + kAhead, 0, 2);
    _tile_loadd(6, x + u * kRows, kRowBytes);
    _tile_loadd(4, w, stride);
    _tile_loadd(5, w + kRows * stride, stride);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(2, 5, 6);
    if (panels == 1) continue;
    _tile_loadd(7, next + u * kRows, kRowBytes);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(3, 5, 7);
  }
  constexpr int kTile = kRows * kRows;
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(2, sums + kTile, kRowBytes);
  if (panels == 1) return;
  _tile_stored(1, sums + 2 * kTile, kRowBytes);
  _tile_stored(3, sums + 3 * kTile, kRowBytes);
}

// Group g of tile `tile` of the weight and panel `panel` of x.
struct GroupAt {
  int64_t panel = 0, tile = 0, g = 0;

  // Two groups further; their number is even or the last is alone.
  void advance(int64_t groups) {
    g += 2;
    if (g < groups) return;
    g = 0;
    tile ^= 1;
    if (tile == 0) ++panel;
  }
};

// The sums of a group, of which neighbours take registers of their own. GCC wants the numbers of tiles as literals.
template <bool Odd>
__attribute__((always_inline)) inline void multiply_group(const GroupedTileDot& args, const GroupAt& at,
                                                          int32_t* sums) {
  const int64_t k = (at.g + Odd) * args.group;
  const int8_t* w = args.w + at.tile * kTileRows * args.stride + k;
  const uint32_t* x = args.x + at.panel * args.x_stride + k / 4 * kTileRows;
  if constexpr (Odd) {
    _tile_zero(1);
  } else {
    _tile_zero(0);
  }
  for (int64_t i = 0; i < args.group; i += kRowBytes, x += kRowBytes / 4 * kTileRows) {
    if constexpr (Odd) {
      _tile_loadd(5, w + i, args.stride);
      _tile_loadd(7, x, kRowBytes);
      _tile_dpbssd(1, 5, 7);
    } else {
      _tile_loadd(4, w + i, args.stride);
      _tile_loadd(6, x, kRowBytes);
      _tile_dpbssd(0, 4, 6);
    }
    if (at.tile == 0) {
      for (int64_t j = 0; j < kRowBytes / 4; ++j) __builtin_prefetch(x + args.x_stride + j * kTileRows);
    }
  }
  if constexpr (Odd) {
    _tile_stored(1, sums, kRowBytes);
  } else {
    _tile_stored(0, sums, kRowBytes);
  }
}

// totals += float(sums) * (w_scales * x_scales) for one group.
template <bool WScales, bool XScales>
__attribute__((always_inline)) inline void add_scaled(const GroupedTileDot& args, const GroupAt& at, int64_t g,
                                                      const int32_t* sums, __m512 (&totals)[kTileRows]) {
  const __m512 x_scales =
      XScales ? _mm512_loadu_ps(args.x_scales + at.panel * args.x_scales_stride + g * kTileRows) : _mm512_setzero_ps();
  const float* w_scales = WScales ? args.w_scales + at.tile * kTileRows * args.row_groups + g : nullptr;
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    __m512 scale = x_scales;
    if (WScales) scale = _mm512_set1_ps(w_scales[r * args.row_groups]);
    if (WScales && XScales) scale = _mm512_mul_ps(scale, x_scales);
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kTileRows));
    totals[r] = _mm512_add_ps(totals[r], _mm512_mul_ps(sum, scale));
  }
}

// Two groups are scaled while the tiles of the next two multiply, hence the buffers.
template <bool WScales, bool XScales>
void dot_tile_groups(const GroupedTileDot& args) {
  alignas(64) int32_t sums[2][2][kTileRows * kTileRows];
  __m512 totals[kTileRows];
  GroupAt now, before;
  const int64_t steps = args.panels * 2 * div_up(args.groups, 2);
  for (int64_t step = 0; step <= steps; ++step) {
    auto& to = sums[step % 2];
    const auto& from = sums[step % 2 ^ 1];
    if (step < steps) multiply_group<false>(args, now, to[0]);
    float* place = args.totals + (before.panel * 2 + before.tile) * kTileRows * kTileRows;
    if (step > 0) {
      if (before.g == 0) {
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) totals[r] = _mm512_loadu_ps(place + r * kTileRows);
      }
      add_scaled<WScales, XScales>(args, before, before.g, from[0], totals);
    }
    if (step < steps && now.g + 1 < args.groups) multiply_group<true>(args, now, to[1]);
    if (step > 0) {
      if (before.g + 1 < args.groups) add_scaled<WScales, XScales>(args, before, before.g + 1, from[1], totals);
      if (before.g + 2 >= args.groups) {
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) _mm512_storeu_ps(place + r * kTileRows, totals[r]);
      }
    }
    before = now;
    now.advance(args.groups);
  }
}

void dot_tile_grouped(const GroupedTileDot& args) {
  const bool w = args.w_scales != nullptr, x = args.x_scales != nullptr;
  (w ? (x ? dot_tile_groups<true, true> : dot_tile_groups<true, false>) : dot_tile_groups<false, true>)(args);
}

}  // namespace

QK_END_TARGET

const Kernels& amx_kernels() {
  static const Bf16Kernels bf16 = [] {
    Bf16Kernels kernels = *avx512bf16_kernels().bf16;
    kernels.mr = kMr;
    kernels.depth_step = kStep;
    kernels.tile = bf16_tile;
    kernels.interleave_a = interleave_a;
    return kernels;
  }();
  static constexpr TileRegisterKernels registers = {
      .begin = begin_tiles,
      .end = end_tiles,
      .dot_tile = dot_tile,
      .dot_tile_grouped = dot_tile_grouped,
  };
  static const Kernels table = [] {
    Kernels t = avx512bf16_kernels();
    t.name = "amx";
    t.panels.a_shift = 0;
    t.panels.encode_a = encode_a;
    t.panels.interleave_a = interleave_a;
    t.panels.column_sums = nullptr;
    t.panels.depth_step = kStep;
    t.tiles.mr = kMr;
    t.tiles.int_tile = int_tile;
    t.tiles.int_tile_grouped = nullptr;  // dot_tile_grouped takes all grouped products
    t.dots.int8.most_rows = t.dots.int4.most_rows = 4 * kRows;
    t.dots.int8.most_rows_grouped = t.dots.int4.most_rows_grouped = 4;
    t.bf16 = &bf16;
    t.tile_registers = &registers;
    return t;
  }();
  return table;
}

}  // namespace qk

#endif  // __x86_64__
