// The blocked integer matrix driver, for the forward (depth = k) and for the gradient with respect to x (depth = n).
// All of A is packed once; every task packs panels of the weight, straight from the canonical storage, into scratch and
// runs them against the panels of A.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/cache.h"
#include "cpu/drivers.h"
#include "cpu/rows.h"
#include "cpu/split.h"

namespace qk {
namespace {

// So many panels of the weight are packed together that they fill this part of L2, and so many rows of A meet them
// before the next rows that these do, too: the slower memories send each of them once to each block of the other.
constexpr int64_t kL2Share = 4;
// Where depth runs across the stored rows, the segment of a row has at least this many columns: with one cache line a
// row, packing took up to 1.6 times as long.
constexpr int64_t kSegment = 128;
// Blocks of the weight are small enough that each thread has some of them.
constexpr int64_t kBlocksPerThread = 4;
// Rows that are unpacked or requantized at a time there; their segments stay in L1.
constexpr int64_t kChunk = 64;
static_assert(kChunk % kGroupStep == 0);
// A segment is prefetched this many rows before it is unpacked: rows are too far apart for the hardware to do it.
constexpr int64_t kAhead = 16;

// What follows from the scheme and the shapes, for one call. The sums of the gradient are not grouped.
struct Plan {
  const Kernels& kernels;
  const NibbleKernels* nibbles;  // null: integer panels
  const Weight& w;
  int64_t depth, cols;  // of the product
  bool grouped, x_grouped, w_grouped;
  int mr, nr, unit;
  int64_t group, groups;              // summed in integers
  int64_t units, group_units, steps;  // along the depth
  int64_t panels, row_panels;         // of the weight, packed together, and of A, multiplied with them

  Plan(const Weight& weight, bool grad_input, int threads)
      : kernels(qk::kernels()),
        nibbles(weight.scheme.weight_bits == 4 && !grad_input ? kernels.nibbles : nullptr),
        w(weight),
        depth(grad_input ? weight.n : weight.k),
        cols(grad_input ? weight.k : weight.n),
        grouped(weight.scheme.grouped() && !grad_input),
        x_grouped(weight.scheme.act_group_size != 0 && !grad_input),
        w_grouped(weight.scheme.group_size != 0 && !grad_input),
        mr(grouped || nibbles != nullptr ? kernels.mr_grouped : kernels.mr),
        nr(kernels.nr),
        unit(nibbles != nullptr ? 4 : kernels.unit),
        group(grouped ? weight.scheme.acc_group(depth) : depth),
        groups(grouped ? div_up(depth, group) : 1),
        units(padded_units()),
        group_units(grouped ? group / unit : units),
        steps(nibbles != nullptr ? div_up(depth, kNibbleStep) : 0) {
    const int64_t l2_units =
        l2_bytes() / kL2Share / static_cast<int64_t>(sizeof(uint32_t)) / std::max<int64_t>(units, 1);
    const int64_t fair = div_up(cols, kBlocksPerThread * threads * nr);
    const int64_t segment = grad_input ? div_up(kSegment, nr) : 1;
    panels = round_up(std::max<int64_t>(std::min(l2_units / nr, fair), 1), segment);
    row_panels = std::max<int64_t>(l2_units / mr, 1);
  }

  // The group of the weight that the sums' group g belongs to.
  int64_t weight_group(int64_t g) const { return group == w.group ? g : g * group / w.group; }

  // Bytes of a row that are multiplied before scales are applied.
  int64_t group_bytes() const { return group_units * static_cast<int64_t>(sizeof(uint32_t)); }

  // Units past the end of an encoded row are zero.
  void pad(uint32_t* encoded) const { std::fill(encoded + div_up(depth, unit), encoded + units, 0u); }

 private:
  int64_t padded_units() const {
    const int64_t step = grouped || nibbles != nullptr ? kGroupStep : unit;
    return round_up(round_up(depth, step) / unit, nibbles != nullptr ? 1 : kernels.depth_step);
  }
};

// Quantized and packed rows of x.
struct PackedA {
  Buffer<uint32_t> panels;     // [panels, units, mr]
  Buffer<uint32_t> sums;       // [panels, steps, mr], see NOTE [nibbles]
  Buffer<float> row_scales;    // [panels, mr]: for the epilogue; 1 where the group scales hold it
  Buffer<float> group_scales;  // [panels, groups, mr], x_grouped only

  PackedA(const Plan& plan, int64_t count)
      : panels(count * plan.units * plan.mr),
        sums(count * plan.steps * plan.mr),
        row_scales(count * plan.mr),
        group_scales(plan.x_grouped ? count * plan.groups * plan.mr : 0) {}
};

// Rows of x, quantized on the way. Each thread has its own.
class QuantizeRows {
 public:
  QuantizeRows(const Plan& plan, const Matrix& x)
      : plan_(plan), x_(x), act_group_(plan.w.scheme.act_group(x.cols)), floats_(x.cols), q_(x.cols) {}

  int64_t scales() const { return div_up(x_.cols, act_group_); }  // of a row

  // The integers of row m, with its scales.
  const int8_t* operator()(int64_t m, float* scales) {
    const float* row = float_row(plan_.kernels, x_, m, floats_.get());
    quantize_row(plan_.kernels, row, x_.cols, act_group_, q_.get(), scales);
    return q_.get();
  }

 private:
  const Plan& plan_;
  const Matrix& x_;
  int64_t act_group_;
  Buffer<float> floats_;
  Buffer<int8_t> q_;
};

// Rows that are quantized already.
class StoredRows {
 public:
  explicit StoredRows(const QuantizedRows& rows) : rows_(rows) {}

  int64_t scales() const { return 1; }

  const int8_t* operator()(int64_t m, float* scales) const {
    *scales = rows_.scales[m];
    return rows_.data + m * rows_.cols;
  }

 private:
  const QuantizedRows& rows_;
};

// Packs panels [begin, end) of the `rows` rows that `read` gives.
template <class Read>
void pack_a(const Plan& plan, int64_t rows, Read&& read, int64_t begin, int64_t end, PackedA& packed) {
  const Kernels& kernels = plan.kernels;
  const int64_t k = plan.depth, act_group = plan.x_grouped ? plan.w.scheme.act_group(k) : 1;
  Buffer<float> scales(read.scales());
  Buffer<int8_t> zeros(k);
  Buffer<uint32_t> encoded(plan.mr * plan.units), sums(plan.steps);
  const bool own_order = kernels.interleave_a != nullptr && plan.nibbles == nullptr;
  const auto interleave = own_order ? kernels.interleave_a : kernels.interleave_int;
  std::vector<const uint32_t*> sources(plan.mr);
  std::fill_n(zeros.get(), k, int8_t{0});
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int i = 0; i < plan.mr; ++i) {
      const int64_t m = panel * plan.mr + i;
      const int8_t* q = zeros.get();
      sources[i] = &encoded[i * plan.units];
      if (m < rows) {
        q = read(m, scales.get());
      } else {
        std::fill_n(scales.get(), read.scales(), 1.0f);
      }
      if (plan.nibbles != nullptr) {
        plan.nibbles->encode_a(q, k, &encoded[i * plan.units], sums.get());
        for (int64_t s = 0; s < plan.steps; ++s) packed.sums[(panel * plan.steps + s) * plan.mr + i] = sums[s];
      } else {
        kernels.encode_a(q, k, &encoded[i * plan.units]);
        plan.pad(&encoded[i * plan.units]);
      }
      packed.row_scales[panel * plan.mr + i] = plan.x_grouped ? 1.0f : scales[0];
      if (plan.x_grouped) {
        float* group_scales = &packed.group_scales[panel * plan.groups * plan.mr];
        for (int64_t g = 0; g < plan.groups; ++g) {
          group_scales[g * plan.mr + i] = scales[g * plan.group / act_group];
        }
      }
    }
    interleave(sources.data(), plan.mr, plan.units, &packed.panels[panel * plan.units * plan.mr]);
  }
}

// Panels of the weight, from a column of the product on; columns past the end are zero.
struct PackedB {
  Buffer<uint32_t> panels;     // [panels, units, nr]
  Buffer<int32_t> start;       // [panels, groups, nr], see NOTE [shift]; with nibbles: zero points, see NibbleTile
  Buffer<float> group_scales;  // [panels, groups, nr], grouped schemes only
  Buffer<float> col_scales;    // [panels, nr]: for the epilogue; 1 where the group scales hold it
  Buffer<float> bias;          // [panels, nr], forward only

  explicit PackedB(const Plan& plan)
      : panels(plan.panels * plan.units * plan.nr),
        start(plan.panels * plan.groups * plan.nr),
        group_scales(plan.grouped ? plan.panels * plan.groups * plan.nr : 0),
        col_scales(plan.panels * plan.nr),
        bias(plan.panels * plan.nr) {
    if (plan.grouped && !plan.w_grouped) std::fill_n(group_scales.get(), plan.panels * plan.groups * plan.nr, 1.0f);
  }
};

// Depth along the stored rows: each row is encoded, then all are interleaved, and so are the terms and the scales of
// their groups.
class PackAlong {
 public:
  PackAlong(const Plan& plan, const float* bias)
      : plan_(plan),
        bias_(bias),
        integers_(plan.w.scheme.weight_bits == 4 ? plan.w.k : 0),
        encoded_(plan.nr * plan.units),
        start_(plan.nr * plan.groups),
        scales_(plan.w_grouped ? plan.nr * plan.groups : 0) {}

  const float* bias(const PackedB& packed, int64_t p) const {
    return bias_ != nullptr ? &packed.bias[p * plan_.nr] : nullptr;
  }

  void operator()(int64_t n0, PackedB& packed) {
    for (int64_t p = 0; p < plan_.panels && n0 < plan_.cols; ++p, n0 += plan_.nr) pack(n0, p, packed);
  }

 private:
  // Panel p, from column n0 on.
  void pack(int64_t n0, int64_t p, PackedB& packed) {
    const Weight& w = plan_.w;
    const int nr = plan_.nr;
    std::vector<const uint32_t*> rows(nr), start(nr), scales(nr);
    float *bias = &packed.bias[p * nr], *col_scales = &packed.col_scales[p * nr];
    for (int j = 0; j < nr; ++j) {
      const int64_t n = n0 + j;
      const bool valid = n < w.n;
      rows[j] = &encoded_[j * plan_.units];
      start[j] = reinterpret_cast<const uint32_t*>(&start_[j * plan_.groups]);
      bias[j] = valid && bias_ != nullptr ? bias_[n] : 0.0f;
      col_scales[j] = valid && !plan_.w_grouped ? w.scales[n] : 1.0f;
      if (valid) {
        rows[j] = encode(n, &encoded_[j * plan_.units], &start_[j * plan_.groups]);
      } else {
        std::fill_n(&encoded_[j * plan_.units], plan_.units, 0u);
        std::fill_n(&start_[j * plan_.groups], plan_.groups, 0);
      }
      if (plan_.w_grouped) scales[j] = group_scales(std::min(n, w.n - 1), &scales_[j * plan_.groups]);
    }
    const auto interleave = [&](const std::vector<const uint32_t*>& sources, void* panel) {
      plan_.kernels.interleave(sources.data(), nr, plan_.groups, static_cast<uint32_t*>(panel));
    };
    plan_.kernels.interleave_int(rows.data(), nr, plan_.units, &packed.panels[p * plan_.units * nr]);
    interleave(start, &packed.start[p * plan_.groups * nr]);
    if (plan_.w_grouped) interleave(scales, &packed.group_scales[p * plan_.groups * nr]);
  }

  // Row n of the weight as units, in place or in `encoded`, and its terms of `start`.
  const uint32_t* encode(int64_t n, uint32_t* encoded, int32_t* start) {
    const Kernels& kernels = plan_.kernels;
    const Weight& w = plan_.w;
    if (plan_.nibbles != nullptr) {
      kernels.unpack_int4(w.row(n), w.k, 0, reinterpret_cast<int8_t*>(encoded));
      std::memset(reinterpret_cast<int8_t*>(encoded) + w.k, 0, plan_.units * plan_.unit - w.k);
      for (int64_t g = 0; g < plan_.groups; ++g) {
        const int zero = w.zeros != nullptr ? w.zeros[n * w.groups + plan_.weight_group(g)] : 8;
        start[g] = zero * 0x10001;
      }
      return encoded;
    }
    // Without an encoder bytes are units: 4-bit rows are unpacked in place, 8-bit ones read where they are stored.
    encoded[div_up(w.k, plan_.unit) - 1] = 0;
    plan_.pad(encoded);
    auto* bytes = reinterpret_cast<int8_t*>(encoded);
    const int8_t* q = integer_row(kernels, w, n, 0, w.k, kernels.encode_b == nullptr ? bytes : integers_.get());
    for (int64_t g = 0; g < plan_.groups; ++g) {
      const int64_t begin = g * plan_.group, count = std::min(plan_.group, w.k - begin);
      start[g] = kernels.a_shift != 0 ? -kernels.a_shift * kernels.sum(q + begin, count) : 0;
    }
    if (readable_as_units(q)) return reinterpret_cast<const uint32_t*>(q);
    if (kernels.encode_b != nullptr) {
      kernels.encode_b(q, w.k, encoded);
    } else if (q != bytes) {
      std::memcpy(bytes, q, w.k);
    }
    return encoded;
  }

  // Whether bytes q[0, k) are whole units, without padding, that can be read as such.
  bool readable_as_units(const int8_t* q) const {
    return plan_.kernels.encode_b == nullptr && plan_.w.k == plan_.units * plan_.unit &&
           reinterpret_cast<uintptr_t>(q) % alignof(uint32_t) == 0;
  }

  // The scale of each group of row n, in place or in `expanded`.
  const uint32_t* group_scales(int64_t n, float* expanded) const {
    const float* scales = plan_.w.scales + n * plan_.w.groups;
    if (plan_.group != plan_.w.group) {
      for (int64_t g = 0; g < plan_.groups; ++g) expanded[g] = scales[plan_.weight_group(g)];
      scales = expanded;
    }
    return reinterpret_cast<const uint32_t*>(scales);
  }

  const Plan& plan_;
  const float* bias_;
  Buffer<int8_t> integers_;   // [k]
  Buffer<uint32_t> encoded_;  // [nr, units]
  Buffer<int32_t> start_;     // [nr, groups]
  Buffer<float> scales_;      // [nr, groups]
};

// Depth across the stored rows. Where the scales differ along a row, its integers are made anew for one scale a column.
class PackAcross {
 public:
  PackAcross(const Plan& plan, const float* column_scales)
      : plan_(plan),
        column_scales_(column_scales),
        width_(plan.panels * plan.nr),
        inverse_(width_),
        integers_(width_),
        chunk_(kChunk * width_) {}

  static const float* bias(const PackedB&, int64_t) { return nullptr; }

  void operator()(int64_t k0, PackedB& packed) {
    const Kernels& kernels = plan_.kernels;
    const Weight& w = plan_.w;
    const int64_t cols = std::min(width_, w.k - k0), panel = plan_.units * plan_.nr;
    std::fill_n(packed.col_scales.get(), width_, 1.0f);
    if (column_scales_ != nullptr) {
      std::copy_n(column_scales_ + k0, cols, packed.col_scales.get());
      for (int64_t i = 0; i < cols; ++i) inverse_[i] = 1.0f / column_scales_[k0 + i];
    }
    if (w.scheme.weight_bits == 8 && column_scales_ == nullptr) {
      const auto* q = reinterpret_cast<const int8_t*>(w.qweight) + k0;
      kernels.interleave_across(q, w.row_bytes, w.n, cols, packed.panels.get(), panel);
    } else {
      for (int64_t n0 = 0; n0 < w.n; n0 += kChunk) {
        const int64_t rows = std::min(kChunk, w.n - n0);
        for (int64_t r = 0; r < rows; ++r) {
          __builtin_prefetch(w.row(std::min(n0 + r + kAhead, w.n - 1)) + w.scheme.packed_features(k0));
          read(n0 + r, k0, cols, &chunk_[r * width_]);
        }
        uint32_t* units = &packed.panels[n0 / plan_.unit * plan_.nr];
        kernels.interleave_across(chunk_.get(), width_, rows, cols, units, panel);
      }
    }
    const int64_t used = div_up(plan_.depth, plan_.unit) * plan_.nr;
    for (int64_t p = 0; p * plan_.nr < cols; ++p) {
      std::fill(&packed.panels[p * panel + used], &packed.panels[(p + 1) * panel], 0u);
      int32_t* start = &packed.start[p * plan_.nr];
      if (kernels.column_sums == nullptr) {
        std::fill_n(start, plan_.nr, 0);
      } else {
        kernels.column_sums(plan_.units, &packed.panels[p * panel], start);
        for (int j = 0; j < plan_.nr; ++j) start[j] *= -kernels.a_shift;
      }
    }
  }

 private:
  // Columns [k0, k0 + cols) of row n as they are multiplied.
  void read(int64_t n, int64_t k0, int64_t cols, int8_t* out) {
    const Kernels& kernels = plan_.kernels;
    const Weight& w = plan_.w;
    if (column_scales_ == nullptr) {
      integer_row(kernels, w, n, k0, cols, out);
      return;
    }
    const int8_t* q = integer_row(kernels, w, n, k0, cols, integers_.get());
    const float* scale = w.scales + n * w.groups + k0 / w.group;
    for (int64_t k = k0, end = k0 / w.group * w.group; k < k0 + cols; k = end, ++scale) {
      end = std::min(end + w.group, k0 + cols);
      kernels.requantize(q + (k - k0), end - k, *scale, &inverse_[k - k0], out + (k - k0));
    }
  }

  const Plan& plan_;
  const float* column_scales_;  // or null: the integers are multiplied as they are
  int64_t width_;
  Buffer<float> inverse_;    // [width]
  Buffer<int8_t> integers_;  // [width]
  Buffer<int8_t> chunk_;     // [kChunk, width]
};

// One tile of the output, through the integer panels or the nibbles.
class Multiply {
 public:
  Multiply(const Plan& plan, const PackedA& a, const PackedB& b)
      : plan_(plan), a_(a), b_(b), int_tile_(plan.mr * plan.nr), float_tile_(plan.mr * plan.nr) {}

  // Panel p of the weight, and a panel of A.
  void operator()(int64_t p, int64_t panel, const TileOutput& output) {
    const Kernels& kernels = plan_.kernels;
    const uint32_t* b = &b_.panels[p * plan_.units * plan_.nr];
    const int32_t* start = &b_.start[p * plan_.groups * plan_.nr];
    const uint32_t* a = &a_.panels[panel * plan_.units * plan_.mr];
    const float* w_scales = &b_.group_scales[plan_.grouped ? p * plan_.groups * plan_.nr : 0];
    const float* x_scales = plan_.x_grouped ? &a_.group_scales[panel * plan_.groups * plan_.mr] : nullptr;
    if (plan_.nibbles != nullptr) {
      const NibbleTile args = {
          .steps = plan_.steps,
          .group_steps = plan_.group / kNibbleStep,
          .a = a,
          .sums = &a_.sums[panel * plan_.steps * plan_.mr],
          .b = b,
          .zeros = start,
      };
      if (plan_.grouped) {
        plan_.nibbles->tile_grouped(args, w_scales, x_scales, float_tile_.get());
      } else {
        plan_.nibbles->tile(args, int_tile_.get());
      }
    } else if (plan_.grouped) {
      kernels.int_tile_grouped({
          .units = std::min(plan_.units, plan_.groups * plan_.group_units),
          .group_units = plan_.group_units,
          .a = a,
          .b = b,
          .start = start,
          .w_scales = w_scales,
          .x_scales = x_scales,
          .tile = float_tile_.get(),
      });
    } else {
      kernels.int_tile(plan_.units, a, b, start, int_tile_.get());
    }
    if (plan_.grouped) {
      kernels.store_float(float_tile_.get(), output);
    } else {
      kernels.store_int(int_tile_.get(), output);
    }
  }

 private:
  const Plan& plan_;
  const PackedA& a_;
  const PackedB& b_;
  Buffer<int32_t> int_tile_;
  Buffer<float> float_tile_;
};

// The product of `rows` packed rows with the weight, which `Pack` packs: PackAlong with the bias, or PackAcross with
// the scales of the columns.
template <class Pack>
void multiply_panels(const Plan& plan, int64_t rows, const PackedA& a, const float* pack_argument, Output out,
                     const Parallel& parallel) {
  const int64_t width = plan.panels * plan.nr;
  const Split split(div_up(rows, plan.mr), div_up(plan.cols, width), parallel.num_threads);

  parallel(split.tasks(), [&](int64_t begin, int64_t end) {
    const TileState state(plan.kernels, plan.group_bytes());
    Pack pack(plan, pack_argument);
    PackedB b(plan);
    Multiply multiply(plan, a, b);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = split.column(task) * width, last = split.row_end(task);
      if (c0 != packed) pack(c0, b);
      packed = c0;
      for (int64_t block = split.row_begin(task); block < last; block += plan.row_panels) {
        for (int64_t p = 0, n0 = c0; p < plan.panels && n0 < plan.cols; ++p, n0 += plan.nr) {
          for (int64_t panel = block; panel < std::min(block + plan.row_panels, last); ++panel) {
            const int64_t m0 = panel * plan.mr;
            multiply(p, panel,
                     {
                         .row_scales = &a.row_scales[m0],
                         .col_scales = &b.col_scales[p * plan.nr],
                         .bias = pack.bias(b, p),
                         .rows = static_cast<int>(std::min<int64_t>(plan.mr, rows - m0)),
                         .cols = static_cast<int>(std::min<int64_t>(plan.nr, plan.cols - n0)),
                         .out = static_cast<char*>(out.data) + (m0 * plan.cols + n0) * size_of(out.dtype),
                         .stride = plan.cols,
                         .dtype = out.dtype,
                     });
          }
        }
      }
    }
  });
}

}  // namespace

void int_matmul(const Matrix& x, const Weight& w, const float* bias, Output out, const Parallel& parallel) {
  const Plan plan(w, false, parallel.num_threads);
  const int64_t panels = div_up(x.rows, plan.mr);
  PackedA a(plan, panels);
  parallel(panels, [&](int64_t begin, int64_t end) { pack_a(plan, x.rows, QuantizeRows(plan, x), begin, end, a); });
  multiply_panels<PackAlong>(plan, x.rows, a, bias, out, parallel);
}

void int_matmul_grad_input(const QuantizedRows& grad_out, const Weight& w, const float* column_scales, Output out,
                           const Parallel& parallel) {
  const Plan plan(w, true, parallel.num_threads);
  const int64_t panels = div_up(grad_out.rows, plan.mr);
  PackedA a(plan, panels);
  parallel(panels,
           [&](int64_t begin, int64_t end) { pack_a(plan, grad_out.rows, StoredRows(grad_out), begin, end, a); });
  multiply_panels<PackAcross>(plan, grad_out.rows, a, column_scales, out, parallel);
}

}  // namespace qk
