// The blocked integer matrix driver, for the forward (depth = k) and for the gradient with respect to x (depth = n).
// All of A is packed once; every task packs blocks of the weight, straight from the canonical storage, into scratch and
// runs them against the panels of A.
//
// NOTE [blocks]. A packed block of the weight takes half of L2. So many rows of A meet it before the next ones that
// their sums take another sixteenth, and the depth of both is cut into chunks, so that a panel of the chunk of B stays
// in L1. What comes from the slower memories then is each byte of the weight once and of A once for every block of
// columns; the latter is prefetched while the chunk before is multiplied.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/cache.h"
#include "cpu/drivers/activations.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/large_results.h"
#include "cpu/drivers/minima.h"
#include "cpu/drivers/rows.h"
#include "cpu/drivers/split.h"

namespace qk {
namespace {

// NOTE [blocks]: a chunk of a panel of B has this many bytes, a block of A this many rows, and the columns of a block
// of the weight follow from the size of L2.
constexpr int64_t kChunkBytes = 16 << 10;
constexpr int64_t kBlockRows = 256;
constexpr int64_t kL2BytesPerColumn = 16 * kBlockRows * sizeof(int32_t);
constexpr int64_t kL2PerBlock = 2;
// Where depth runs across the stored rows, the segment of a row has at least this many columns: with one cache line a
// row, packing took up to 1.6 times as long.
constexpr int64_t kSegment = 256;
// Blocks of the weight are small enough that each thread has some of them.
constexpr int64_t kBlocksPerThread = 4;
// Rows that are unpacked or requantized at a time there; their segments stay in L1.
constexpr int64_t kAcrossRows = 64;
static_assert(kAcrossRows % kGroupStep == 0);
// A segment is prefetched this many rows before it is unpacked: rows are too far apart for the hardware to do it.
constexpr int64_t kAhead = 16;

// A range of the depth: units [first, first + units), which are steps [k0, k0 + k) and padding, in groups [g0, g0 +
// groups).
struct Depth {
  int64_t first, units, k0, k, g0, groups;
};

// What the sums of a column start from, given the sum of its integers: NOTE [shift]. 2^31 wraps, as the sums do.
int32_t shift_term(int32_t column_sum, const PanelKernels& panels) {
  return static_cast<int32_t>(static_cast<uint32_t>(column_sum) * -static_cast<uint32_t>(panels.a_shift));
}

// What follows from the scheme and the shapes, for one call. The sums of the gradient are not grouped.
struct MatmulShape {
  const Kernels& kernels;
  const NibbleKernels* nibbles;  // null: integer panels
  const Weight& w;
  int64_t depth, cols;  // of the product
  bool forward, grouped, x_grouped, w_grouped;
  int mr, nr, unit;
  int64_t group, groups;              // summed in integers
  int64_t units, group_units, steps;  // along the depth
  int64_t panels, row_panels;         // of a block of the weight and of A
  int64_t block_units, chunk_units;   // along the depth of a block, of a chunk of it

  MatmulShape(const Kernels& table, const Weight& weight, bool grad_input, int threads)
      : kernels(table),
        nibbles(weight.scheme.weight->bits == 4 && !grad_input ? kernels.nibbles : nullptr),
        w(weight),
        depth(grad_input ? weight.n : weight.k),
        cols(grad_input ? weight.k : weight.n),
        forward(!grad_input),
        grouped(weight.scheme.grouped() && !grad_input),
        x_grouped(weight.scheme.act_group_size != 0 && !grad_input),
        w_grouped(weight.scheme.group_size != 0 && !grad_input),
        mr(grouped || nibbles != nullptr ? kernels.tiles.mr_grouped : kernels.tiles.mr),
        nr(kernels.tiles.nr),
        unit(nibbles != nullptr ? 4 : kernels.panels.unit),
        group(grouped ? weight.scheme.acc_group(depth) : std::max<int64_t>(depth, 1)),
        groups(grouped ? div_up(depth, group) : 1),
        units(padded_units()),
        group_units(grouped ? group / unit : units),
        steps(nibbles != nullptr ? div_up(depth, kNibbleStep) : 0) {
    const int64_t fair = div_up(cols, kBlocksPerThread * threads * nr);
    const int64_t segment = grad_input ? div_up(kSegment, nr) : 1;
    panels = round_up(std::clamp<int64_t>(l2_bytes() / kL2BytesPerColumn / nr, 1, std::max<int64_t>(fair, 1)), segment);
    row_panels = std::max<int64_t>(kBlockRows / mr, 1);
    chunk_units = block_units = std::max<int64_t>(units, 1);
    if (nibbles != nullptr || units == 0) return;
    constexpr int64_t kUnitBytes = sizeof(uint32_t);
    const int64_t whole_groups = kMaxGroup / unit;
    chunk_units = kChunkBytes / (nr * kUnitBytes) / whole_groups * whole_groups;
    block_units = l2_bytes() / kL2PerBlock / (panels * nr * kUnitBytes) / chunk_units * chunk_units;
    chunk_units = std::min(chunk_units, units);
    block_units = std::clamp(block_units, chunk_units, units);
  }

  // The part of the depth that a block of the weight holds, from unit `first` on.
  Depth block_depth(int64_t first) const {
    const int64_t count = std::min(block_units, units - first), k0 = first * unit, g0 = k0 / group;
    const int64_t k = std::min(count * unit, depth - k0);
    return {first, count, k0, k, g0, grouped ? div_up(k, group) : 1};
  }
  int64_t block_groups() const { return grouped ? div_up(block_units * unit, group) : 1; }

  // The group of the weight that the sums' group g belongs to.
  int64_t weight_group(int64_t g) const { return group == w.group ? g : g * group / w.group; }

  // Bytes of a row that are multiplied before scales are applied.
  int64_t group_bytes() const { return group_units * static_cast<int64_t>(sizeof(uint32_t)); }

  // Units past the end of an encoded row of k steps are zero.
  void pad(uint32_t* encoded, int64_t k, int64_t count) const {
    std::fill(encoded + div_up(k, unit), encoded + count, 0u);
  }

 private:
  int64_t padded_units() const {
    const int64_t step = grouped || nibbles != nullptr ? kGroupStep : unit;
    return round_up(round_up(depth, step) / unit, nibbles != nullptr ? 1 : kernels.panels.depth_step);
  }
};

// Quantized and packed rows of x.
struct PackedRows {
  Buffer<uint32_t> panels;     // [panels, units, mr]
  Buffer<uint32_t> sums;       // [panels, steps, mr], see NOTE [nibbles]
  Buffer<float> row_scales;    // [panels, mr]: for the epilogue; 1 where the group scales hold it
  Buffer<float> group_scales;  // [panels, groups, mr], x_grouped only
  XSums group_sums;            // of the forward

  // Rows with a scale for each `act_group` values.
  PackedRows(const MatmulShape& shape, const LinearInput& x, int64_t act_group, const Parallel& parallel)
      : PackedRows(shape, div_up(x.x.rows, shape.mr), x.x.rows) {
    parallel(div_up(x.x.rows, shape.mr), [&](int64_t begin, int64_t end) { pack(shape, x, act_group, begin, end); });
  }

 private:
  PackedRows(const MatmulShape& shape, int64_t count, int64_t rows)
      : panels(count * shape.units * shape.mr),
        sums(count * shape.steps * shape.mr),
        row_scales(count * shape.mr),
        group_scales(shape.x_grouped ? count * shape.groups * shape.mr : 0),
        group_sums(shape.kernels, shape.w, rows, shape.forward) {}

  // Panels [begin, end).
  void pack(const MatmulShape& shape, const LinearInput& x, int64_t act_group, int64_t begin, int64_t end);
};

void PackedRows::pack(const MatmulShape& shape, const LinearInput& x, int64_t act_group, int64_t begin, int64_t end) {
  const Kernels& kernels = shape.kernels;
  const int64_t k = shape.depth, rows = x.x.rows;
  IntRows read(kernels, x, act_group);
  Buffer<float> scales(read.groups());
  Buffer<int8_t> zeros(k);
  Buffer<uint32_t> encoded(shape.mr * shape.units), row_sums(shape.steps);
  const bool own_order = kernels.panels.interleave_a != nullptr && shape.nibbles == nullptr;
  const auto interleave = own_order ? kernels.panels.interleave_a : kernels.panels.interleave_int;
  std::vector<const uint32_t*> sources(shape.mr);
  std::fill_n(zeros.get(), k, int8_t{0});
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int i = 0; i < shape.mr; ++i) {
      const int64_t m = panel * shape.mr + i;
      const int8_t* q = zeros.get();
      sources[i] = &encoded[i * shape.units];
      if (m < rows) {
        q = read(m, scales.get());
        group_sums.set(m, q, scales.get());
      } else {
        std::fill_n(scales.get(), read.groups(), 1.0f);
      }
      if (shape.nibbles != nullptr) {
        shape.nibbles->encode_a(q, k, &encoded[i * shape.units], row_sums.get());
        for (int64_t s = 0; s < shape.steps; ++s) sums[(panel * shape.steps + s) * shape.mr + i] = row_sums[s];
      } else {
        kernels.panels.encode_a(q, k, &encoded[i * shape.units]);
        shape.pad(&encoded[i * shape.units], k, shape.units);
      }
      row_scales[panel * shape.mr + i] = shape.x_grouped ? 1.0f : scales[0];
      if (shape.x_grouped) {
        float* panel_scales = &group_scales[panel * shape.groups * shape.mr + i];
        expand_groups(scales.get(), act_group, shape.group, shape.groups, panel_scales, shape.mr);
      }
    }
    interleave(sources.data(), shape.mr, shape.units, &panels[panel * shape.units * shape.mr]);
  }
}

// Panels of the weight, from a column of the product on; columns past the end are zero.
struct WeightPanels {
  int64_t block_groups;
  Buffer<uint32_t> panels;  // [panels, block_units, nr]
  Buffer<int32_t> start;    // [panels, block_groups, nr], see NOTE [shift]; with nibbles: zero points, see NibbleTile
  Buffer<float> group_scales;  // [panels, block_groups, nr], grouped schemes only
  Buffer<float> col_scales;    // [panels, nr]: for the epilogue; 1 where the group scales hold it
  Buffer<float> bias;          // [panels, nr], forward only

  explicit WeightPanels(const MatmulShape& shape)
      : block_groups(shape.block_groups()),
        panels(shape.panels * shape.block_units * shape.nr),
        start(shape.panels * block_groups * shape.nr),
        group_scales(shape.grouped ? shape.panels * block_groups * shape.nr : 0),
        col_scales(shape.panels * shape.nr),
        bias(shape.panels * shape.nr) {
    if (shape.grouped && !shape.w_grouped)
      std::fill_n(group_scales.get(), shape.panels * block_groups * shape.nr, 1.0f);
  }
};

// Depth along the stored rows: each row is encoded, then all are interleaved, and so are the terms and the scales of
// their groups.
class PackAlong {
 public:
  PackAlong(const MatmulShape& shape, const float* bias)
      : shape_(shape),
        bias_(bias),
        integers_(shape.block_units * shape.unit),
        encoded_(shape.nr * shape.block_units),
        zeros_(shape.nibbles != nullptr ? shape.nr * shape.block_groups() : 0),
        scales_(shape.w_grouped ? shape.nr * shape.block_groups() : 0) {}

  const float* bias(const WeightPanels& packed, int64_t p) const {
    return bias_ != nullptr ? &packed.bias[p * shape_.nr] : nullptr;
  }

  void operator()(int64_t n0, const Depth& depth, WeightPanels& packed) {
    for (int64_t p = 0; p < shape_.panels && n0 < shape_.cols; ++p, n0 += shape_.nr) pack(n0, depth, p, packed);
  }

 private:
  // Panel p, from column n0 on.
  void pack(int64_t n0, const Depth& depth, int64_t p, WeightPanels& packed) {
    const Weight& w = shape_.w;
    const int nr = shape_.nr;
    std::vector<const uint32_t*> rows(nr), zeros(nr), scales(nr);
    float *bias = &packed.bias[p * nr], *col_scales = &packed.col_scales[p * nr];
    for (int j = 0; j < nr; ++j) {
      const int64_t n = n0 + j;
      const bool valid = n < w.n;
      uint32_t* encoded = &encoded_[j * shape_.block_units];
      rows[j] = encoded;
      bias[j] = valid && bias_ != nullptr ? bias_[n] : 0.0f;
      col_scales[j] = valid && !shape_.w_grouped ? w.scales[n] : 1.0f;
      if (valid) {
        rows[j] = encode(n, depth, encoded);
      } else {
        std::fill_n(encoded, depth.units, 0u);
      }
      if (shape_.nibbles != nullptr) zeros[j] = zero_points(n, &zeros_[j * packed.block_groups]);
      if (shape_.w_grouped) scales[j] = group_scales(std::min(n, w.n - 1), depth, &scales_[j * packed.block_groups]);
    }
    const auto interleave = [&](const std::vector<const uint32_t*>& sources, void* panel) {
      shape_.kernels.panels.interleave(sources.data(), nr, depth.groups, static_cast<uint32_t*>(panel));
    };
    uint32_t* const panel = &packed.panels[p * shape_.block_units * nr];
    shape_.kernels.panels.interleave_int(rows.data(), nr, depth.units, panel);
    int32_t* const start = &packed.start[p * packed.block_groups * nr];
    shape_.nibbles != nullptr ? interleave(zeros, start) : shift_terms(panel, depth, start);
    if (shape_.w_grouped) interleave(scales, &packed.group_scales[p * packed.block_groups * nr]);
  }

  // The zero points of the groups of row n as NibbleTile takes them; 0 past the last row.
  const uint32_t* zero_points(int64_t n, uint32_t* zeros) const {
    const Weight& w = shape_.w;
    for (int64_t g = 0; g < shape_.groups; ++g) {
      const int zero = n >= w.n             ? 0
                       : w.zeros != nullptr ? w.zeros[n * w.groups + shape_.weight_group(g)]
                                            : w.scheme.stored_zero();
      zeros[g] = zero * 0x10001;
    }
    return zeros;
  }

  // Of a packed panel, what the sums of each group start from: NOTE [shift].
  void shift_terms(const uint32_t* panel, const Depth& depth, int32_t* start) const {
    const PanelKernels& panels = shape_.kernels.panels;
    const int64_t nr = shape_.nr, units = shape_.grouped ? shape_.group_units : depth.units;
    if (panels.column_sums == nullptr) {
      std::fill_n(start, depth.groups * nr, 0);
      return;
    }
    for (int64_t g = 0, u = 0; g < depth.groups; ++g, u += units)
      panels.column_sums(std::min(units, depth.units - u), panel + u * nr, start + g * nr);
    for (int64_t i = 0; i < depth.groups * nr; ++i) start[i] = shift_term(start[i], panels);
  }

  // Row n of the weight as units, in place or in `encoded`.
  const uint32_t* encode(int64_t n, const Depth& depth, uint32_t* encoded) {
    const Kernels& kernels = shape_.kernels;
    const Weight& w = shape_.w;
    if (shape_.nibbles != nullptr) {
      kernels.elementwise.unpack_int4(w.row(n), w.k, 0, reinterpret_cast<int8_t*>(encoded));
      std::memset(reinterpret_cast<int8_t*>(encoded) + w.k, 0, shape_.units * shape_.unit - w.k);
      return encoded;
    }
    // Without an encoder bytes are units: 4-bit rows are unpacked in place, 8-bit ones read where they are stored.
    encoded[div_up(depth.k, shape_.unit) - 1] = 0;
    shape_.pad(encoded, depth.k, depth.units);
    auto* bytes = reinterpret_cast<int8_t*>(encoded);
    int8_t* scratch = kernels.panels.encode_b == nullptr ? bytes : integers_.get();
    const int8_t* q = integer_row(kernels, w, n, depth.k0, depth.k, scratch);
    const bool whole = depth.k == depth.units * shape_.unit;
    if (kernels.panels.encode_b != nullptr) {
      kernels.panels.encode_b(q, depth.k, encoded);
    } else if (whole && reinterpret_cast<uintptr_t>(q) % alignof(uint32_t) == 0) {
      return reinterpret_cast<const uint32_t*>(q);
    } else if (q != bytes) {
      std::memcpy(bytes, q, depth.k);
    }
    return encoded;
  }

  // The scales of the groups of row n, in place or in `expanded`.
  const uint32_t* group_scales(int64_t n, const Depth& depth, float* expanded) const {
    const float* scales = shape_.w.scales + n * shape_.w.groups + shape_.weight_group(depth.g0);
    if (shape_.group == shape_.w.group) return reinterpret_cast<const uint32_t*>(scales);
    expand_groups(scales, shape_.w.group, shape_.group, depth.groups, expanded);
    return reinterpret_cast<const uint32_t*>(expanded);
  }

  const MatmulShape& shape_;
  const float* bias_;
  Buffer<int8_t> integers_;   // [block_units * unit]
  Buffer<uint32_t> encoded_;  // [nr, block_units]
  Buffer<uint32_t> zeros_;    // [nr, block_groups], with nibbles only
  Buffer<float> scales_;      // [nr, block_groups]
};

// Depth across the stored rows. Where the scales differ along a row, its integers are made anew for one scale a column.
class PackAcross {
 public:
  PackAcross(const MatmulShape& shape, const float* column_scales)
      : shape_(shape),
        column_scales_(column_scales),
        width_(shape.panels * shape.nr),
        inverse_(width_),
        integers_(width_),
        floats_(shape.w.minima != nullptr ? width_ : 0),
        chunk_(kAcrossRows * width_) {}

  static const float* bias(const WeightPanels&, int64_t) { return nullptr; }

  void operator()(int64_t k0, const Depth& depth, WeightPanels& packed) {
    const Kernels& kernels = shape_.kernels;
    const Weight& w = shape_.w;
    const int64_t cols = std::min(width_, w.k - k0), panel = shape_.block_units * shape_.nr;
    const int64_t first = depth.k0, last = depth.k0 + depth.k;  // rows of the weight
    std::fill_n(packed.col_scales.get(), width_, 1.0f);
    if (column_scales_ != nullptr) {
      std::copy_n(column_scales_ + k0, cols, packed.col_scales.get());
      for (int64_t i = 0; i < cols; ++i) inverse_[i] = 1.0f / column_scales_[k0 + i];
    }
    if (w.scheme.weight->in_place() && column_scales_ == nullptr) {
      const auto* q = reinterpret_cast<const int8_t*>(w.row(first)) + k0;
      kernels.panels.interleave_across(q, w.row_bytes, depth.k, cols, packed.panels.get(), panel);
    } else {
      for (int64_t n0 = first; n0 < last; n0 += kAcrossRows) {
        const int64_t rows = std::min(kAcrossRows, last - n0);
        for (int64_t r = 0; r < rows; ++r) {
          __builtin_prefetch(w.row(std::min(n0 + r + kAhead, w.n - 1)) + w.scheme.packed_features(k0));
          read(n0 + r, k0, cols, &chunk_[r * width_]);
        }
        uint32_t* units = &packed.panels[(n0 - first) / shape_.unit * shape_.nr];
        kernels.panels.interleave_across(chunk_.get(), width_, rows, cols, units, panel);
      }
    }
    for (int64_t p = 0; p * shape_.nr < cols; ++p) {
      uint32_t* units = &packed.panels[p * panel];
      std::fill(units + div_up(depth.k, shape_.unit) * shape_.nr, units + depth.units * shape_.nr, 0u);
      int32_t* start = &packed.start[p * shape_.nr];
      if (kernels.panels.column_sums == nullptr) {
        std::fill_n(start, shape_.nr, 0);
      } else {
        kernels.panels.column_sums(depth.units, units, start);
        for (int j = 0; j < shape_.nr; ++j) start[j] = shift_term(start[j], kernels.panels);
      }
    }
  }

 private:
  // Columns [k0, k0 + cols) of row n as they are multiplied.
  void read(int64_t n, int64_t k0, int64_t cols, int8_t* out) {
    const Kernels& kernels = shape_.kernels;
    const Weight& w = shape_.w;
    if (column_scales_ == nullptr) {
      integer_row(kernels, w, n, k0, cols, out);
      return;
    }
    if (w.minima != nullptr) {
      dequantize_row(kernels, w, n, k0, cols, integers_.get(), floats_.get());
      kernels.elementwise.scale_each(floats_.get(), inverse_.get(), cols, floats_.get());
      kernels.elementwise.quantize_clamped(floats_.get(), cols, 1.0f, out);
      return;
    }
    const int8_t* q = integer_row(kernels, w, n, k0, cols, integers_.get());
    const float* scale = w.scales + n * w.groups + k0 / w.group;
    for (int64_t k = k0, end = k0 / w.group * w.group; k < k0 + cols; k = end, ++scale) {
      end = std::min(end + w.group, k0 + cols);
      kernels.elementwise.requantize(q + (k - k0), end - k, *scale, &inverse_[k - k0], out + (k - k0));
    }
  }

  const MatmulShape& shape_;
  const float* column_scales_;  // or null: the integers are multiplied as they are
  int64_t width_;
  Buffer<float> inverse_;    // [width]
  Buffer<int8_t> integers_;  // [width]
  Buffer<float> floats_;     // [width], for a weight with minima
  Buffer<int8_t> chunk_;     // [kAcrossRows, width]
};

// Tiles of the sums, through the integer panels or the nibbles, and where they go.
class Multiply {
 public:
  Multiply(const MatmulShape& shape, const PackedRows& a, const WeightPanels& b) : shape_(shape), a_(a), b_(b) {}

  // Adds the products of panel `panel` of A and panel p of the block of B, which begins with unit `first`, over units
  // [u, end), to a tile, or sets it where they are the first.
  void add(int64_t panel, int64_t p, int64_t first, int64_t u, int64_t end, uint32_t* tile) {
    const Kernels& kernels = shape_.kernels;
    const int64_t size = shape_.mr * shape_.nr, g0 = shape_.grouped ? first / shape_.group_units : 0;
    const int64_t g = shape_.grouped ? u / shape_.group_units : 0, b_group = (p * b_.block_groups + g - g0) * shape_.nr;
    const uint32_t* a = &a_.panels[(panel * shape_.units + u) * shape_.mr];
    const uint32_t* b = &b_.panels[(p * shape_.block_units + u - first) * shape_.nr];
    const int32_t* start = &b_.start[b_group];
    if (shape_.nibbles != nullptr || shape_.grouped) {
      auto* floats = reinterpret_cast<float*>(tile);
      if (shape_.grouped && u == 0) std::fill_n(floats, size, 0.0f);
      const float* w_scales = shape_.grouped ? &b_.group_scales[b_group] : nullptr;
      const float* x_scales = shape_.x_grouped ? &a_.group_scales[(panel * shape_.groups + g) * shape_.mr] : nullptr;
      shape_.nibbles != nullptr ? add_nibbles(panel, a, b, start, w_scales, x_scales, tile)
                                : kernels.tiles.int_tile_grouped({
                                      .units = std::min(end, shape_.groups * shape_.group_units) - u,
                                      .group_units = shape_.group_units,
                                      .a = a,
                                      .b = b,
                                      .start = start,
                                      .w_scales = w_scales,
                                      .x_scales = x_scales,
                                      .tile = floats,
                                  });
      return;
    }
    auto* sums = reinterpret_cast<int32_t*>(tile);
    if (u == 0) {
      kernels.tiles.int_tile(end - u, a, b, start, 0, sums);
      return;
    }
    if (u == first && kernels.panels.a_shift != 0) {
      for (int64_t i = 0; i < size; ++i) tile[i] += static_cast<uint32_t>(start[i % shape_.nr]);
    }
    kernels.tiles.int_tile(end - u, a, b, sums, shape_.nr, sums);
  }

  // Prefetches into L2 part p of all `panels` parts of a chunk of A.
  void prefetch(int64_t panel, int64_t u, int64_t p, int64_t panels) {
    constexpr int64_t kLineUnits = 64 / sizeof(uint32_t);
    const int64_t size = std::min(shape_.chunk_units, shape_.units - u) * shape_.mr;
    const uint32_t* chunk = &a_.panels[(panel * shape_.units + u) * shape_.mr];
    for (int64_t i = p * size / panels; i < (p + 1) * size / panels; i += kLineUnits)
      __builtin_prefetch(chunk + i, 0, 2);
  }

  void store(const uint32_t* tile, const TileOutput& output) {
    if (shape_.grouped) {
      shape_.kernels.tiles.store_float(reinterpret_cast<const float*>(tile), output);
    } else {
      shape_.kernels.tiles.store_int(reinterpret_cast<const int32_t*>(tile), output);
    }
  }

 private:
  // The whole depth at once.
  void add_nibbles(int64_t panel, const uint32_t* a, const uint32_t* b, const int32_t* zeros, const float* w_scales,
                   const float* x_scales, uint32_t* tile) {
    const NibbleTile args = {
        .steps = shape_.steps,
        .group_steps = shape_.group / kNibbleStep,
        .a = a,
        .sums = &a_.sums[panel * shape_.steps * shape_.mr],
        .b = b,
        .zeros = zeros,
    };
    if (shape_.grouped) {
      shape_.nibbles->tile_grouped(args, w_scales, x_scales, reinterpret_cast<float*>(tile));
    } else {
      shape_.nibbles->tile(args, reinterpret_cast<int32_t*>(tile));
    }
  }

  const MatmulShape& shape_;
  const PackedRows& a_;
  const WeightPanels& b_;
};

// The product of `rows` packed rows with the weight, which `Pack` packs: PackAlong with the bias, or PackAcross with
// the scales of the columns. See NOTE [blocks].
template <class Pack>
void multiply_panels(const MatmulShape& shape, int64_t rows, const PackedRows& a, const float* pack_argument,
                     Output out, const Parallel& parallel) {
  const int64_t width = shape.panels * shape.nr, tile_size = shape.mr * shape.nr;
  const Split split(div_up(rows, shape.mr), div_up(shape.cols, width), parallel.num_threads);
  const bool one_chunk = shape.chunk_units == shape.units;

  parallel(split.tasks(), [&](int64_t begin, int64_t end) {
    const TileState state(shape.kernels, shape.group_bytes());
    Pack pack(shape, pack_argument);
    WeightPanels b(shape);
    Multiply multiply(shape, a, b);
    MinimaTile minima(shape.kernels, a.group_sums, shape.mr);
    Buffer<uint32_t> tiles(one_chunk ? tile_size : split.max_rows() * shape.panels * tile_size);
    int64_t packed = -1;  // the first column of a block that holds the whole depth
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = split.column(task) * width, first_panel = split.row_begin(task), last = split.row_end(task);
      const int64_t panels = std::min(shape.panels, div_up(shape.cols - c0, shape.nr));
      for (int64_t first = 0; first == 0 || first < shape.units; first += shape.block_units) {
        const Depth depth = shape.block_depth(first);
        if (c0 != packed) pack(c0, depth, b);
        packed = depth.units == shape.units ? c0 : -1;
        const int64_t block_end = first + depth.units;
        for (int64_t block = first_panel; block < last; block += shape.row_panels) {
          const int64_t block_last = std::min(block + shape.row_panels, last);
          for (int64_t u = first; u == first || u < block_end; u += shape.chunk_units) {
            const int64_t chunk_end = std::min(u + shape.chunk_units, block_end);
            for (int64_t p = 0; p < panels; ++p) {
              for (int64_t panel = block; panel < block_last; ++panel) {
                uint32_t* tile = &tiles[one_chunk ? 0 : ((panel - first_panel) * shape.panels + p) * tile_size];
                if (chunk_end < block_end) {
                  multiply.prefetch(panel, chunk_end, p, panels);
                } else if (panel + shape.row_panels < last) {
                  multiply.prefetch(panel + shape.row_panels, first, p, panels);
                }
                multiply.add(panel, p, first, u, chunk_end, tile);
                if (chunk_end < shape.units) continue;
                const int64_t m0 = panel * shape.mr, n0 = c0 + p * shape.nr,
                              valid = std::min<int64_t>(shape.mr, rows - m0);
                multiply.store(tile, {
                                         .row_scales = &a.row_scales[m0],
                                         .col_scales = &b.col_scales[p * shape.nr],
                                         .bias = pack.bias(b, p),
                                         .minima = minima(shape.w, n0, m0, valid),
                                         .rows = static_cast<int>(valid),
                                         .cols = static_cast<int>(std::min<int64_t>(shape.nr, shape.cols - n0)),
                                         .out = out.at(m0, n0, shape.cols),
                                         .stride = out.row_stride(shape.cols),
                                         .dtype = out.dtype,
                                         .nontemporal = out.nontemporal,
                                     });
              }
            }
          }
        }
      }
    }
    if (out.nontemporal) shape.kernels.tiles.end_nontemporal();
  });
}

// x [M, k] for the forward.
class IntMatmulOperand : public LinearOperand {
 public:
  IntMatmulOperand(const Kernels& kernels, const LinearInput& input, const Weight& w, const Parallel& parallel)
      : kernels_(kernels),
        rows_(input.x.rows),
        packed_(MatmulShape(kernels, w, false, parallel.num_threads), input, w.scheme.act_group(w.k), parallel) {}

  void multiply(const Weight& w, const float* bias, const Output& out, const Parallel& parallel) const override {
    const MatmulShape shape(kernels_, w, false, parallel.num_threads);
    multiply_panels<PackAlong>(shape, rows_, packed_, bias, out, parallel);
  }

 private:
  const Kernels& kernels_;
  int64_t rows_;
  PackedRows packed_;
};

}  // namespace

const LinearDriver kIntMatmul = {
    .name = "int_matmul",
    .reason = "many rows of x: it pays to pack the weight into panels, a block of it at a time",
    .accepts = [](const Kernels&, const Scheme& scheme, int64_t) { return scheme.int_activations(); },
    .prepare = prepare<IntMatmulOperand>,
};

void int_matmul_grad_input(const Kernels& kernels, const QuantizedRows& grad_out, const Weight& w,
                           const float* column_scales, Output out, const Parallel& parallel) {
  const MatmulShape shape(kernels, w, true, parallel.num_threads);
  const LinearInput rows = {{nullptr, DType::float32, grad_out.rows, grad_out.cols}, grad_out.data, grad_out.scales};
  const PackedRows packed(shape, rows, shape.depth, parallel);
  const int64_t bytes = grad_out.rows * shape.cols * static_cast<int64_t>(size_of(out.dtype));
  out.nontemporal = begin_nontemporal(kernels, out.data, bytes, parallel);
  multiply_panels<PackAcross>(shape, grad_out.rows, packed, column_scales, out, parallel);
}

}  // namespace qk
