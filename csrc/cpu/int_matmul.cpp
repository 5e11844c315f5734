// The blocked integer matrix driver. All of A is quantized and packed once; every task packs one panel of the weight
// (nr rows, straight from the canonical storage) into scratch and runs it against the panels of A.
#include <algorithm>
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
  const Weight& w;
  int mr, nr;
  int64_t group, groups;       // summed in integers
  int64_t units, group_units;  // along k
  bool grouped, x_grouped, w_grouped;

  explicit Plan(const Weight& weight)
      : kernels(qk::kernels()),
        w(weight),
        mr(weight.scheme.grouped() ? kernels.mr_grouped : kernels.mr),
        nr(kernels.nr),
        group(weight.scheme.acc_group(weight.k)),
        groups(div_up(weight.k, group)),
        units((weight.scheme.grouped() ? round_up(weight.k, kGroupStep) : round_up(weight.k, kernels.unit)) /
              kernels.unit),
        group_units(weight.scheme.grouped() ? group / kernels.unit : units),
        grouped(weight.scheme.grouped()),
        x_grouped(weight.scheme.act_group_size != 0),
        w_grouped(weight.scheme.group_size != 0) {}

  // A row of k integers as units, zero-padded.
  using Encode = void (*)(const int8_t* q, int64_t k, uint32_t* units);
  void encode(Encode encode_row, const int8_t* q, uint32_t* out) const {
    encode_row(q, w.k, out);
    std::fill(out + div_up(w.k, kernels.unit), out + units, 0u);
  }
};

// Quantized and packed rows of x.
struct PackedA {
  Buffer<uint32_t> panels;     // [panels, units, mr]
  Buffer<float> row_scales;    // [panels, mr]: for the epilogue; 1 where the group scales hold it
  Buffer<float> group_scales;  // [panels, groups, mr], x_grouped only

  PackedA(const Plan& plan, int64_t count)
      : panels(count * plan.units * plan.mr),
        row_scales(count * plan.mr),
        group_scales(plan.x_grouped ? count * plan.groups * plan.mr : 0) {}
};

void pack_a(const Plan& plan, const Matrix& x, int64_t begin, int64_t end, PackedA& packed) {
  const Kernels& kernels = plan.kernels;
  const int64_t k = plan.w.k, act_group = plan.w.scheme.act_group(k);
  Buffer<float> floats(k), scales(plan.w.scheme.act_groups(k));
  Buffer<int8_t> q(k);
  Buffer<uint32_t> encoded(plan.mr * plan.units);
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
      plan.encode(kernels.encode_a, q.get(), &encoded[i * plan.units]);
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
  Buffer<int32_t> start;       // [groups, nr], see NOTE [shift]
  Buffer<float> group_scales;  // [groups, nr], grouped schemes only
  Buffer<float> col_scales;    // [nr]: for the epilogue; 1 where the group scales hold it
  Buffer<float> bias;          // [nr]
  // Scratch of pack_b.
  Buffer<int8_t> integers;   // [k]
  Buffer<uint32_t> encoded;  // [nr, units]
  std::vector<const uint32_t*> rows;

  explicit PackedB(const Plan& plan)
      : panel(plan.units * plan.nr),
        start(plan.groups * plan.nr),
        group_scales(plan.grouped ? plan.groups * plan.nr : 0),
        col_scales(plan.nr),
        bias(plan.nr),
        integers(plan.w.k),
        encoded(plan.nr * plan.units),
        rows(plan.nr) {}
};

void pack_b(const Plan& plan, int64_t n0, const float* bias, PackedB& packed) {
  const Kernels& kernels = plan.kernels;
  const Weight& w = plan.w;
  for (int j = 0; j < plan.nr; ++j) {
    const int64_t n = n0 + j;
    const bool valid = n < w.n;
    uint32_t* encoded = &packed.encoded[j * plan.units];
    packed.rows[j] = encoded;
    packed.bias[j] = valid && bias != nullptr ? bias[n] : 0.0f;
    packed.col_scales[j] = valid && !plan.w_grouped ? w.scales[n] : 1.0f;
    const int8_t* q = nullptr;
    if (valid) {
      q = integer_row(kernels, w, n, 0, w.k, packed.integers.get());
      plan.encode(kernels.encode_b, q, encoded);
    } else {
      std::fill_n(encoded, plan.units, 0u);
    }
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t begin = g * plan.group, count = std::min(plan.group, w.k - begin);
      const bool shifted = valid && kernels.a_shift != 0;
      packed.start[g * plan.nr + j] = shifted ? -kernels.a_shift * kernels.sum(q + begin, count) : 0;
      if (plan.grouped) {
        packed.group_scales[g * plan.nr + j] =
            valid && plan.w_grouped ? w.scales[n * w.groups + begin / w.group] : 1.0f;
      }
    }
  }
  kernels.interleave_int(packed.rows.data(), plan.nr, plan.units, packed.panel.get());
}

}  // namespace

void int_matmul(const Matrix& x, const Weight& w, const float* bias, Output out, const Parallel& parallel) {
  const Plan plan(w);
  const Kernels& kernels = plan.kernels;
  const int64_t panels = div_up(x.rows, plan.mr);
  const Split split(panels, div_up(w.n, plan.nr), parallel.num_threads);

  PackedA a(plan, panels);
  parallel(panels, [&](int64_t begin, int64_t end) { pack_a(plan, x, begin, end, a); });

  parallel(split.tasks(), [&](int64_t begin, int64_t end) {
    PackedB b(plan);
    Buffer<int32_t> int_tile(plan.mr * plan.nr);
    Buffer<float> float_tile(plan.mr * plan.nr);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n0 = split.column(task) * plan.nr;
      if (n0 != packed) pack_b(plan, n0, bias, b);
      packed = n0;
      for (int64_t panel = split.row_begin(task); panel < split.row_end(task); ++panel) {
        const int64_t m0 = panel * plan.mr;
        const uint32_t* a_panel = &a.panels[panel * plan.units * plan.mr];
        const TileOutput output = {
            .row_scales = &a.row_scales[m0],
            .col_scales = b.col_scales.get(),
            .bias = bias != nullptr ? b.bias.get() : nullptr,
            .rows = static_cast<int>(std::min<int64_t>(plan.mr, x.rows - m0)),
            .cols = static_cast<int>(std::min<int64_t>(plan.nr, w.n - n0)),
            .out = static_cast<char*>(out.data) + (m0 * w.n + n0) * size_of(out.dtype),
            .stride = w.n,
            .dtype = out.dtype,
        };
        if (plan.grouped) {
          kernels.int_tile_grouped({
              .units = plan.units,
              .group_units = plan.group_units,
              .a = a_panel,
              .b = b.panel.get(),
              .start = b.start.get(),
              .w_scales = b.group_scales.get(),
              .x_scales = plan.x_grouped ? &a.group_scales[panel * plan.groups * plan.mr] : nullptr,
              .tile = float_tile.get(),
          });
          kernels.store_float(float_tile.get(), output);
        } else {
          kernels.int_tile(plan.units, a_panel, b.panel.get(), b.start.get(), int_tile.get());
          kernels.store_int(int_tile.get(), output);
        }
      }
    }
  });
}

}  // namespace qk
