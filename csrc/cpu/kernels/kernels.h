// The contract between the drivers and an ISA: one table of function pointers per ISA file.
//
// Glossary.
//   unit        32 bits that hold `unit` consecutive k of one row, in the form that the ISA multiplies: 1 x int32
//               (scalar), 2 x int16 (AVX2), 4 x int8 (VNNI), 1 x float, 2 x bfloat16
//   panel       some rows of an operand (mr of A, nr of B), unit by unit: NOTE [panels]
//   tile        mr x nr results, computed from a panel of A and a panel of B
//   depth       the dimension that is summed: k in the forward product, n in the gradient with respect to x
//   group step  kGroupStep k: all group sizes but kMinGroup, its half, are multiples of it
//   row dot     the product of a row of x with a row of the weight as it is stored: no panels
//   A, B        the left operand (x, or a gradient) and the right one (the weight)
//
// NOTE [panels]. Unit u of row r lies at panel[u * rows + r]. A panel of rows a, b, c, d with 3 units each:
//
//     rows of the operand, encoded                 the panel in memory
//     a0 a1 a2                                     a0 b0 c0 d0 | a1 b1 c1 d1 | a2 b2 c2 d2
//     b0 b1 b2      -- interleave ->               '- unit 0 -'  '- unit 1 -'  '- unit 2 -'
//     c0 c1 c2
//     d0 d1 d2                                     A step of a tile multiplies one such column of A with one of B.
//
// Rows are first encoded (`encode_a`, `encode_b`) and then transposed by 32-bit units (`interleave`), whatever their
// format. Integer panels may use another order inside kMinGroup k (`interleave_int`; A: inside `depth_step` units,
// `interleave_a`): only these (A: whole depth steps) must stay contiguous.
//
// In the forward product depth runs along the stored rows of the weight; in the gradient with respect to x it runs
// across them: a unit then holds `unit` consecutive rows of one column (`interleave_across`).
//
// NOTE [bf16]. The integers of a weight (|q| <= 128) are bfloat16 numbers, so in a forward product of a bfloat16 x the
// panels hold them exactly and the scales are applied to the float32 sums. The scales of the gradient run along the
// depth; its panels hold q * scale rounded to bfloat16. Products of two bfloat16 numbers are exact in float32. Where
// x is bfloat16 and the ISA has Bf16Kernels, float products are computed like this, otherwise in float32.
//
// NOTE [shift]. vpdpbusd multiplies unsigned by signed bytes. A is therefore stored as a + 128, and
//     sum a * b = sum (a + 128) * b - 128 * sum b,
// where the last term depends on the column only. Kernels start their accumulators from it (`start`), so it costs
// nothing per row. An ISA that multiplies signed values has a_shift = 0 and start values of 0. vpdpbusd does not
// saturate, and intermediate sums may wrap modulo 2^32: 131072 weights of -128 already make the last term 2^31. The
// corrected sum fits (kMaxReduction), so it is exact. Any byte may stand for b, and for a.
//
// NOTE [nibbles]. An ISA without a 32-bit multiply-add of bytes may multiply 4-bit weights in 16-bit lanes instead. B
// then holds nibbles (0..15) and A signed bytes, 4 k a unit, of which a lane takes the even or the odd pair. Within
// kNibbleStep k a lane sums 16 products, and
//     |sum (nibble - zero) * x| <= 16 * 15 * 127 = 30480 < 2^15,
// so the sum is exact if the lane starts from -zero * (sum of its x), whatever wraps on the way.
//
// NOTE [tile registers]. Some CPUs multiply matrices held in tile registers (AMX), whose shape is a state of the
// thread: a thread makes a TileState before it multiplies and drops it when it is done. Tiles are loaded whole, so the
// depth of the panels is padded with zeros to a multiple of `depth_step`.
#pragma once

#include "common/philox.h"
#include "common/rules.h"
#include "common/types.h"

namespace qk {

// The panels of grouped products are padded with zeros to a multiple of this many k.
constexpr int64_t kGroupStep = 2 * kMinGroup;
constexpr int64_t kNibbleStep = 32;

// One grouped tile: tile[i][j] += float(sum over a group) * (w_scales[g][j] * x_scales[g][i]), groups ascending, on the
// tile of the groups before (or zeros).
struct GroupedTile {
  int64_t units;          // units along k, a multiple of kMinGroup / unit
  int64_t group_units;    // units in a group, a multiple of the same; the last group may be shorter
  const uint32_t* a;      // panel of mr_grouped rows
  const uint32_t* b;      // panel of nr rows
  const int32_t* start;   // [groups, nr]
  const float* w_scales;  // [groups, nr]
  const float* x_scales;  // [groups, mr_grouped], or null for ones
  float* tile;            // [mr_grouped, nr]
};

// One tile on 4-bit weights, see NOTE [nibbles]. `a` and `b` are panels of 4 k a unit.
struct NibbleTile {
  int64_t steps;        // of kNibbleStep k
  int64_t group_steps;  // steps in a group; the last group may be shorter
  const uint32_t* a;    // panel of mr rows
  const uint32_t*
      sums;           // [steps, mr]: minus the sum of the row's values in the low and in the high lanes, as 2 x int16
  const uint32_t* b;  // panel of nr rows
  const int32_t* zeros;  // [groups, nr]: the zero point as 2 x int16
};

// Where a tile goes: out[i][j] = float(tile[i][j]) * (row_scales[i] * col_scales[j]) + bias[j], rounded to `dtype`, for
// the first `rows` rows and `cols` columns of the tile.
struct TileOutput {
  const float* row_scales;
  const float* col_scales;        // [nr]
  const float* bias;              // [nr], or null: nothing is added
  const float* minima = nullptr;  // [rows, nr]: what is added before the bias (minima_tile), or null
  int rows, cols;
  void* out;
  int64_t stride;  // elements from one row of out to the next
  DType dtype;
  bool nontemporal = false;  // past the caches, if the ISA can; see end_nontemporal
};

// Integer sums of 4 weight rows per group (element g * 4 + r belongs to group g of row r), and the scales that turn
// them into one float per row: y[r] = sum over g of float(sums - zeros * x_sums) * (w_scales * x_scales), groups
// ascending.
struct GroupSums {
  int64_t groups;
  const int32_t* sums;   // they may have wrapped modulo 2^32; what is left after the correction cannot
  const int32_t* zeros;  // or null: `zero` for all
  int32_t zero;
  const int32_t* x_sums;
  const float* w_scales;  // or null: ones; not both
  const float* x_scales;  // or null: ones
};

// Optional kernels for 4-bit weights, see NOTE [nibbles]: the same tiles as those of the integer panels.
struct NibbleKernels {
  // 4 x int8 a unit, padded with zeros to whole steps, and the negated sums that NibbleTile takes, 1 a step.
  void (*encode_a)(const int8_t* q, int64_t k, uint32_t* units, uint32_t* sums);
  void (*tile)(const NibbleTile& args, int32_t* tile);
  void (*tile_grouped)(const NibbleTile& args, const float* w_scales, const float* x_scales, float* tile);
};

// Two tiles of rows of the weight times panels of rows of x: totals[p][r][i] += float(sum over a group) * (w_scales *
// x_scales) for row r of the weight and row i of panel p, groups ascending.
constexpr int kTileRows = 16;
struct GroupedTileDot {
  int64_t groups, group;  // their number, and k in each; the last one is padded with zeros
  const int8_t* w;        // [2 * kTileRows, stride]
  int64_t stride;
  int64_t panels;
  const uint32_t* x;  // panels of kTileRows rows (NOTE [panels]), from the first group on, x_stride units apart
  int64_t x_stride;
  const float* w_scales;  // [2 * kTileRows, row_groups], or null: ones
  int64_t row_groups;
  const float* x_scales;  // [panels, x_scales_stride] of [groups, kTileRows], or null: ones; not both
  int64_t x_scales_stride;
  float* totals;  // [panels, 2 * kTileRows, kTileRows]
};

// Rows of a grouped weight times rows of x, group by group.
constexpr int kGroupDotRows = 4;     // of x, at most
constexpr int kGroupDotStreams = 4;  // rows of the weight
constexpr int kCombinedRows = 16;    // of the weight, whose sums are scaled and added side by side
struct GroupDot {
  const int8_t* x;  // [rows, x_stride], padded with zeros to whole steps (GroupDotKernels)
  int64_t x_stride;
  int rows;                 // 1 or kGroupDotRows
  const uint8_t* const* w;  // [kGroupDotStreams]
  int64_t k, group;
  // sums[(m * kCombinedRows + r) * sums_stride + g]: of x * (w + shift), or of x * nibble, over group g of row m of
  // x and row r of the weight. Groups of whole steps are written.
  int32_t* sums;
  int64_t sums_stride;
};

// How such sums become numbers: y[r] = sum over g of float(sums - zeros * x_sums) * (w_scales * x_scales), groups
// ascending. What belongs to x may be read up to a multiple of 16 groups, and its scales are 0 beyond the last one.
struct GroupRows {
  int64_t groups;
  const int32_t* sums;  // [kCombinedRows, sums_stride]
  int64_t sums_stride;
  const uint8_t* const* zeros;  // [kCombinedRows][groups], or null: `zero` for all
  int32_t zero;
  const int32_t* x_sums;         // [groups]
  const float* const* w_scales;  // [kCombinedRows][groups], or null: ones; not both
  const float* x_scales;         // [groups], or null: ones
};

// Optional kernels for few rows of x and a grouped scheme, which read scales and zero points as they are stored.
struct GroupDotKernel {
  void (*dot)(const GroupDot& args);
  int64_t x_block;  // see RowDot
};
struct GroupDotKernels {
  int64_t k_step;  // x is padded to a multiple of it
  GroupDotKernel int8, int4;
  void (*combine)(const GroupRows& args, float* y);  // [kCombinedRows]

  const GroupDotKernel& of(const WeightFormat& weight) const { return weight.in_place() ? int8 : int4; }
};

// Up to how many rows of x the dots are faster than what packs the weight into panels first: by the format of the
// weight, and whether there are groups. Measured on avx2, avx512vnni and amx (docs/performance.md),
// estimated from instruction counts where no such machine was at hand.
struct DotRows {
  int int8, int8_grouped, int4, int4_grouped, floats;
};

// A chunk of a row of logits, for softmax_row.
struct LogitRow {
  const float* logits;  // [n]
  int64_t n;
  const float* w_scales;  // [n]: multiplied into the gradient, or null: ones
  float softcap;          // c: the logits become c * tanh(logit / c); 0: they stay
  int64_t target;         // the column of the target, if it is in [0, n)
  uint32_t dither;        // of the first column
  int8_t* q;              // [n], or null: no gradient
};

// The running softmax state of a row.
struct SoftmaxState {
  float max = -3.402823466e38f;
  float sum = 0.0f;     // of exp(logit - max)
  double total = 0.0;   // of the logits
  float target = 0.0f;  // the target's logit
};

// A chunk multiplies the sums before it by `before`, and its own gradient q, which belongs to exp(logit - its own max),
// by `own`.
struct SoftmaxFactors {
  float before, own;
  uint32_t absmax_bits;  // of the gradient before it was quantized
};

// Optional kernels for float products of bfloat16, see NOTE [bf16]. A unit is 2 x bfloat16.
struct Bf16Kernels {
  int mr;
  int depth_step = 1;  // in units, see NOTE [tile registers]
  void (*encode)(const int8_t* q, int64_t k, uint32_t* units);
  // Two rows side by side: unit i = scales[r] * q[r][i], rounded to nearest even, row 0 in the low half.
  void (*encode_pair)(const int8_t* const* q, const float* scales, int64_t n, uint32_t* units);
  // The same of scales[r] * q[r][i] + minima[r], each rounded to float32 first.
  void (*encode_pair_min)(const int8_t* const* q, const float* scales, const float* minima, int64_t n, uint32_t* units);
  // float tile [mr, nr] += (A * B^T)[i][j] * scales[j]: the product with the scale and the addition are each rounded.
  void (*tile)(int64_t units, const uint32_t* a, const uint32_t* b, const float* scales, float* tile);
  void (*interleave_a)(const uint32_t* const* sources, int rows, int64_t units, uint32_t* panel) = nullptr;  // or null
};

// Loops over n contiguous values.
struct ElementwiseKernels {
  void (*to_float)(const void* src, DType dtype, int64_t n, float* dst);
  void (*from_float)(const float* src, int64_t n, DType dtype, void* dst);  // round to nearest even
  uint32_t (*absmax_bits)(const float* x, int64_t n);                       // max of the bits of |x|
  void (*quantize)(const float* x, int64_t n, float inverse, int8_t* q);    // clamp(rne(x * inverse), -127, 127)
  // The same two for bfloat16 x, as its floats would be. Null: such rows are converted first.
  uint32_t (*absmax_bits_bf16)(const uint16_t* x, int64_t n) = nullptr;
  void (*quantize_bf16)(const uint16_t* x, int64_t n, float inverse, int8_t* q) = nullptr;
  void (*unpack_int4)(const uint8_t* packed, int64_t n, int zero, int8_t* q);  // nibble - zero
  // The same with a zero point for each group of n values.
  void (*unpack_int4_groups)(const uint8_t* packed, int64_t n, int64_t group, const uint8_t* zeros, int8_t* q);
  void (*dequantize)(const int8_t* q, int64_t n, float scale, float* w);
  void (*dequantize_min)(const int8_t* q, int64_t n, float scale, float minimum, float* w);  // q * scale + minimum
  // w8 = clamp(rne((q * scale) * inverse[i]), -127, 127); NaN becomes -127
  void (*requantize)(const int8_t* q, int64_t n, float scale, const float* inverse, int8_t* w8);
  int32_t (*sum)(const int8_t* q, int64_t n);
  void (*scale)(const float* x, int64_t n, float factor, float* out);         // x * factor
  void (*scale_each)(const float* x, const float* y, int64_t n, float* out);  // x * y
  void (*max_bits)(const float* x, int64_t n, uint32_t* max);                 // max[i] = max(max[i], bits of |x[i]|)
  // v = x * inverse; clamp(floor(v) + (u < v - floor(v)), -127, 127), where u = (word >> 8) * 2^-24 and value i takes a
  // word of the random row at column + i; column is a multiple of kPhiloxWords. NaN becomes -127.
  void (*round_stochastic)(const float* x, int64_t n, float inverse, const PhiloxRow& random, int64_t column,
                           int8_t* q);
  // Quantizing a weight to 4 bits. range: of finite values; otherwise one of the two is not finite.
  void (*range)(const float* w, int64_t n, float* low, float* high);
  // clamp(rne(w * inverse) + zero, 0, 15), a byte each; even ones into the low nibbles, the pad nibble 0.
  void (*quantize_int4)(const float* w, int64_t n, float inverse, int zero, uint8_t* nibbles);
  // clamp(rne((w - minimum) * inverse), least, greatest), a byte each
  void (*quantize_min)(const float* w, int64_t n, float minimum, float inverse, int least, int greatest, int8_t* codes);
  void (*pack_int4)(const uint8_t* nibbles, int64_t n, uint8_t* packed);
  // The gradient of what that gives: 0 where clamping changed it.
  void (*mask_clipped)(const float* w, int64_t n, float inverse, int zero, float* grad);
  // Of a given scale: clamp(rne(x * inverse), -127, 127), where NaN becomes -127. Returns the max of the bits of |x|.
  uint32_t (*quantize_clamped)(const float* x, int64_t n, float inverse, int8_t* q);
  uint32_t (*quantize_clamped_bf16)(const uint16_t* x, int64_t n, float inverse, int8_t* q) = nullptr;  // or null
  // The gradient of that scale (rule 11): the sum of grad * (rounded - v), or of grad * the bound where v = w * inverse
  // is rounded to more than low or high; there grad becomes 0.
  float (*scale_gradient)(const float* w, int64_t n, float inverse, int low, int high, float* grad);
  // out[c * out_stride + r] = q[r * stride + c]
  void (*transpose)(const int8_t* q, int64_t stride, int64_t rows, int64_t cols, int8_t* out, int64_t out_stride);
};

// Operands as panels of 32-bit units, see NOTE [panels]. k is padded with zeros to a whole unit.
struct PanelKernels {
  int unit;         // k per unit of the integer panels
  int a_shift = 0;  // see NOTE [shift]
  void (*encode_a)(const int8_t* q, int64_t k, uint32_t* units);
  void (*encode_b)(const int8_t* q, int64_t k, uint32_t* units) = nullptr;  // or null: a unit is 4 x int8 as stored
  // panel[u * rows + r] = sources[r][u]; interleave_int: for integer panels, perhaps in another order (NOTE [panels])
  void (*interleave)(const uint32_t* const* sources, int rows, int64_t units, uint32_t* panel);
  void (*interleave_int)(const uint32_t* const* sources, int rows, int64_t units, uint32_t* panel);
  void (*interleave_a)(const uint32_t* const* sources, int rows, int64_t units, uint32_t* panel) = nullptr;  // or null

  // Depth across rows, `stride` bytes apart: unit u of column c goes to row c % nr of panel c / nr, of which the next
  // begins `panel` units later. Rows are padded with zeros to a whole unit, columns to a whole panel; the rest of the
  // panels that cover 32 columns may be written too.
  void (*interleave_across)(const int8_t* q, int64_t stride, int64_t rows, int64_t cols, uint32_t* panels,
                            int64_t panel);
  // sums[j] = the sum of row j of a panel of B. Null where a_shift is 0: only start values need it.
  void (*column_sums)(int64_t units, const uint32_t* panel, int32_t* sums) = nullptr;
  int depth_step = 1;  // the units of an integer panel are padded with zeros to a multiple of it
};

// Tiles of panels. Panels and tiles are aligned to 64 bytes. NOTE [tile registers] tells when kernels need a TileState.
struct TileKernels {
  int mr, mr_grouped, mr_float, nr;
  // int32 tile [mr, nr] = start + A * B^T, where row i starts from start[i * stride, i * stride + nr): the tile itself
  // with the sums of other units, or the same for all rows (stride 0), which is zeros where a_shift is 0.
  void (*int_tile)(int64_t units, const uint32_t* a, const uint32_t* b, const int32_t* start, int64_t stride,
                   int32_t* tile);
  void (*int_tile_grouped)(const GroupedTile& args);
  // float tile [mr_float, nr] += A * B^T
  void (*float_tile)(int64_t units, const float* a, const float* b, float* tile);
  // float tile [rows, nr] = sum over g, ascending from 0, of sums[i * stride + g] * minima[g * nr + j], where the
  // product and the sum are each rounded (docs/numerics.md, rule 16). Any number of rows.
  void (*minima_tile)(int64_t groups, const float* sums, int64_t stride, int64_t rows, const float* minima,
                      float* tile);
  // The epilogue of an int32 or float tile, see TileOutput.
  void (*store_int)(const int32_t* tile, const TileOutput& output);
  void (*store_float)(const float* tile, const TileOutput& output);
  // Makes what a thread has stored past the caches visible to others. Null: the ISA stores nothing so.
  void (*end_nontemporal)() = nullptr;
};

// A dot of a row of x with 4 rows of the weight as they are stored: sums[g * 4 + r] = sum over group g of x * (w_r +
// shift), where w_r are the stored values of row r. x is zero-padded to a multiple of 64 and w may not be read past k.
struct RowDot {
  void (*dot)(const int8_t* x, const uint8_t* const* w, int64_t k, int64_t group, int32_t* sums);
  int64_t x_block;                   // x holds each block of so many values as its even ones, then its odd ones; or 1
  int shift;                         // see NOTE [shift]
  int most_rows, most_rows_grouped;  // for more rows of x it is faster to pack the weight (DotRows)
};

// Dots for few rows of x.
struct RowDotKernels {
  RowDot int8, int4;
  int most_rows_float;  // for dot_float
  // As int8.dot for 4 rows of x, `stride` values apart, in one group: sums[i * 4 + r] for row i of x. Values of x have
  // x4_bytes bytes there (int8 or int16). Null: one row at a time.
  int x4_bytes = 1;
  void (*dot_int8_x4)(const void* x, int64_t stride, const uint8_t* const* w, int64_t k, int32_t* sums) = nullptr;
  void (*combine)(const GroupSums& args, float* y);
  float (*dot_float)(const float* x, const float* w, int64_t n);

  const RowDot& of(const WeightFormat& weight) const { return weight.in_place() ? int8 : int4; }
};

struct SoftmaxKernels {
  // Adds a chunk to the softmax of its row and quantizes its gradient (docs/numerics.md, rule 7). `scratch` holds the
  // chunk's columns, rounded up to 16.
  void (*softmax_row)(const LogitRow& row, float* scratch, SoftmaxState& state, SoftmaxFactors& factors);
  void (*scale_and_add)(float* acc, int64_t n, float factor, const float* x);  // acc = acc * factor + x
};

// Optional kernels on matrices held in tile registers, see NOTE [tile registers].
struct TileRegisterKernels {
  void (*begin)(int64_t bytes);  // of a row of a panel that are multiplied before scales are applied
  void (*end)();
  // 2 * kTileRows rows of the weight, `stride` bytes apart and read in whole tiles, times `panels` panels of kTileRows
  // rows of x (NOTE [panels], each `units` long): int32 sums [panels, 2 * kTileRows, kTileRows].
  void (*dot_tile)(int64_t units, const int8_t* w, int64_t stride, const uint32_t* x, int panels, int32_t* sums);
  void (*dot_tile_grouped)(const GroupedTileDot& args);
};

// The table of an instruction set. Optional groups are null where it has none.
struct Kernels {
  const char* name;
  ElementwiseKernels elementwise;
  PanelKernels panels;
  TileKernels tiles;
  RowDotKernels dots;
  SoftmaxKernels softmax;
  const NibbleKernels* nibbles = nullptr;       // 4-bit weights then take no integer panels; tiles have mr_grouped rows
  const Bf16Kernels* bf16 = nullptr;            // without them bfloat16 is multiplied in float32
  const GroupDotKernels* group_dots = nullptr;  // with them `dots` gets products of one group only
  const TileRegisterKernels* tile_registers = nullptr;
};

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512vnni_kernels();
const Kernels& neon_dotprod_kernels();
const Kernels& neon_i8mm_kernels();
const Kernels& avx512bf16_kernels();
const Kernels& amx_kernels();

// The table in use; see cpu/isa.h.
const Kernels& kernels();

// Tile registers can be used while it lives, see NOTE [tile registers].
class TileState {
 public:
  TileState(const Kernels& kernels, int64_t bytes) : registers_(kernels.tile_registers) {
    if (registers_ != nullptr) registers_->begin(bytes);
  }
  ~TileState() {
    if (registers_ != nullptr) registers_->end();
  }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

 private:
  const TileRegisterKernels* registers_;
};

}  // namespace qk
