// The blocked integer matrix driver. All of A is quantized and packed once; every task packs one panel of the weight
// (nr rows, straight from the canonical storage) into scratch and runs it against the panels of A.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/drivers.h"
#include "cpu/rows.h"
#include "cpu/split.h"

namespace qk {
namespace {

// What follows from the scheme and the shapes, for one call.
struct Plan {
  const Kernels& kernels;
  const NibbleKernels* nibbles;  // null: integer panels
  const Weight& w;
  bool grouped, x_grouped, w_grouped;
  int mr, nr, unit;
  int64_t group, groups;              // summed in integers
  int64_t units, group_units, steps;  // along k

  explicit Plan(const Weight& weight)
      : kernels(qk::kernels()),
        nibbles(weight.scheme.weight_bits == 4 ? kernels.nibbles : nullptr),
        w(weight),
        grouped(weight.scheme.grouped()),
        x_grouped(weight.scheme.act_group_size != 0),
        w_grouped(weight.scheme.group_size != 0),
        mr(grouped || nibbles != nullptr ? kernels.mr_grouped : kernels.mr),
        nr(kernels.nr),
        unit(nibbles != nullptr ? 4 : kernels.unit),
        group(weight.scheme.acc_group(weight.k)),
        groups(div_up(weight.k, group)),
        units((grouped || nibbles != nullptr ? round_up(weight.k, kGroupStep) : round_up(weight.k, unit)) / unit),
        group_units(grouped ? group / unit : units),
        steps(nibbles != nullptr ? div_up(weight.k, kNibbleStep) : 0) {}

  // The group of the weight that the sums' group g belongs to.
  int64_t weight_group(int64_t g) const { return group == w.group ? g : g * group / w.group; }

  // Units past the end of an encoded row are zero.
  void pad(uint32_t* encoded) const { std::fill(encoded + div_up(w.k, unit), encoded + units, 0u); }
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

void pack_a(const Plan& plan, const Matrix& x, int64_t begin, int64_t end, PackedA& packed) {
  const Kernels& kernels = plan.kernels;
  const int64_t k = plan.w.k, act_group = plan.w.scheme.act_group(k);
  Buffer<float> floats(k), scales(plan.w.scheme.act_groups(k));
  Buffer<int8_t> q(k);
  Buffer<uint32_t> encoded(plan.mr * plan.units), sums(plan.steps);
  std::vector<const uint32_t*> rows(plan.mr);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int i = 0; i < plan.mr; ++i) {
      const int64_t m = panel * plan.mr + i;
      rows[i] = &encoded[i * plan.units];
      if (m < x.rows) {
        quantize_row(kernels, float_row(kernels, x, m, floats.get()), k, act_group, q.get(), scales.get());
      } else {
        std::fill_n(q.get(), k, int8_t{0});
        std::fill_n(scales.get(), plan.w.scheme.act_groups(k), 1.0f);
      }
      if (plan.nibbles != nullptr) {
        plan.nibbles->encode_a(q.get(), k, &encoded[i * plan.units], sums.get());
        for (int64_t s = 0; s < plan.steps; ++s) packed.sums[(panel * plan.steps + s) * plan.mr + i] = sums[s];
      } else {
        kernels.encode_a(q.get(), k, &encoded[i * plan.units]);
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
    kernels.interleave_int(rows.data(), plan.mr, plan.units, &packed.panels[panel * plan.units * plan.mr]);
  }
}

// One panel of the weight: nr rows from n0 on; rows past the end are zero.
struct PackedB {
  Buffer<uint32_t> panel;      // [units, nr]
  Buffer<int32_t> start;       // [groups, nr], see NOTE [shift]; with nibbles: zero points, see NibbleTile
  Buffer<float> group_scales;  // [groups, nr], grouped schemes only
  Buffer<float> col_scales;    // [nr]: for the epilogue; 1 where the group scales hold it
  Buffer<float> bias;          // [nr]

  explicit PackedB(const Plan& plan)
      : panel(plan.units * plan.nr),
        start(plan.groups * plan.nr),
        group_scales(plan.grouped ? plan.groups * plan.nr : 0),
        col_scales(plan.nr),
        bias(plan.nr) {
    if (plan.grouped && !plan.w_grouped) std::fill_n(group_scales.get(), plan.groups * plan.nr, 1.0f);
  }
};

// Packs one panel after the other: each row is encoded, then all are interleaved, and so are the terms and the scales
// of their groups.
class PackB {
 public:
  PackB(const Plan& plan, const float* bias)
      : plan_(plan),
        bias_(bias),
        integers_(plan.w.scheme.weight_bits == 4 ? plan.w.k : 0),
        encoded_(plan.nr * plan.units),
        start_(plan.nr * plan.groups),
        scales_(plan.w_grouped ? plan.nr * plan.groups : 0) {}

  void operator()(int64_t n0, PackedB& packed) {
    const Weight& w = plan_.w;
    const int nr = plan_.nr;
    std::vector<const uint32_t*> rows(nr), start(nr), scales(nr);
    for (int j = 0; j < nr; ++j) {
      const int64_t n = n0 + j;
      const bool valid = n < w.n;
      rows[j] = &encoded_[j * plan_.units];
      start[j] = reinterpret_cast<const uint32_t*>(&start_[j * plan_.groups]);
      packed.bias[j] = valid && bias_ != nullptr ? bias_[n] : 0.0f;
      packed.col_scales[j] = valid && !plan_.w_grouped ? w.scales[n] : 1.0f;
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
    plan_.kernels.interleave_int(rows.data(), nr, plan_.units, packed.panel.get());
    interleave(start, packed.start.get());
    if (plan_.w_grouped) interleave(scales, packed.group_scales.get());
  }

 private:
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

// One tile of the output, through the integer panels or the nibbles.
class Multiply {
 public:
  Multiply(const Plan& plan, const PackedA& a, const PackedB& b)
      : plan_(plan), a_(a), b_(b), int_tile_(plan.mr * plan.nr), float_tile_(plan.mr * plan.nr) {}

  void operator()(int64_t panel, const TileOutput& output) {
    const Kernels& kernels = plan_.kernels;
    const uint32_t* a = &a_.panels[panel * plan_.units * plan_.mr];
    const float* x_scales = plan_.x_grouped ? &a_.group_scales[panel * plan_.groups * plan_.mr] : nullptr;
    if (plan_.nibbles != nullptr) {
      const NibbleTile args = {
          .steps = plan_.steps,
          .group_steps = plan_.group / kNibbleStep,
          .a = a,
          .sums = &a_.sums[panel * plan_.steps * plan_.mr],
          .b = b_.panel.get(),
          .zeros = b_.start.get(),
      };
      if (plan_.grouped) {
        plan_.nibbles->tile_grouped(args, b_.group_scales.get(), x_scales, float_tile_.get());
      } else {
        plan_.nibbles->tile(args, int_tile_.get());
      }
    } else if (plan_.grouped) {
      kernels.int_tile_grouped({
          .units = plan_.units,
          .group_units = plan_.group_units,
          .a = a,
          .b = b_.panel.get(),
          .start = b_.start.get(),
          .w_scales = b_.group_scales.get(),
          .x_scales = x_scales,
          .tile = float_tile_.get(),
      });
    } else {
      kernels.int_tile(plan_.units, a, b_.panel.get(), b_.start.get(), int_tile_.get());
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

}  // namespace

void int_matmul(const Matrix& x, const Weight& w, const float* bias, Output out, const Parallel& parallel) {
  const Plan plan(w);
  const int64_t panels = div_up(x.rows, plan.mr);
  const Split split(panels, div_up(w.n, plan.nr), parallel.num_threads);

  PackedA a(plan, panels);
  parallel(panels, [&](int64_t begin, int64_t end) { pack_a(plan, x, begin, end, a); });

  parallel(split.tasks(), [&](int64_t begin, int64_t end) {
    PackB pack_b(plan, bias);
    PackedB b(plan);
    Multiply multiply(plan, a, b);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n0 = split.column(task) * plan.nr;
      if (n0 != packed) pack_b(n0, b);
      packed = n0;
      for (int64_t panel = split.row_begin(task); panel < split.row_end(task); ++panel) {
        const int64_t m0 = panel * plan.mr;
        multiply(panel, {
                            .row_scales = &a.row_scales[m0],
                            .col_scales = b.col_scales.get(),
                            .bias = bias != nullptr ? b.bias.get() : nullptr,
                            .rows = static_cast<int>(std::min<int64_t>(plan.mr, x.rows - m0)),
                            .cols = static_cast<int>(std::min<int64_t>(plan.nr, w.n - n0)),
                            .out = static_cast<char*>(out.data) + (m0 * w.n + n0) * size_of(out.dtype),
                            .stride = w.n,
                            .dtype = out.dtype,
                        });
      }
    }
  });
}

}  // namespace qk
