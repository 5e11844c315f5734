// The blocked float matrix driver: x [M, depth] times the dequantized weight, packed panel by panel, for the a16
// schemes (depth = k) and for the gradient with respect to x (depth = n). The weight is never dequantized as a whole.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/drivers.h"
#include "cpu/rows.h"
#include "cpu/split.h"

namespace qk {
namespace {

// A packed block of the weight is kBlockUnits units deep (a multiple of every group size) and kPanels panels wide: it
// stays in L2, and one panel of it in L1, while the panels of A run against it. Several panels also make the segments
// of a stored row long enough to be encoded at speed when depth runs over the rows.
constexpr int64_t kBlockUnits = 256;
constexpr int64_t kPanels = 4;
// Encoded rows lie this many units apart, so that those transposed together do not compete for the same lines of L1.
constexpr int64_t kRowUnits = kBlockUnits + 16;

// The two formats of panels. Each turns rows of x and of the weight into 32-bit units and multiplies panels of them.

// Float32: the weight is dequantized.
class Float32 {
 public:
  static constexpr int64_t kUnit = 1;  // depth of a unit

  Float32(const Kernels& kernels, const Weight& w, bool)
      : kernels_(kernels), w_(w), integers_(std::max(kBlockUnits, kPanels * kernels.nr)) {}

  // The units of row m of x, in place or in scratch.
  static const uint32_t* x_row(const Kernels& kernels, const Matrix& x, int64_t m, uint32_t* scratch) {
    return reinterpret_cast<const uint32_t*>(float_row(kernels, x, m, reinterpret_cast<float*>(scratch)));
  }

  // Depth along the row: the units of `count` columns from k0 on of weight row n.
  void along(int64_t n, int64_t k0, int64_t count, uint32_t* units) {
    dequantize_row(kernels_, w_, n, k0, count, integers_.get(), reinterpret_cast<float*>(units));
  }

  // Depth across rows: one unit of each of these columns, from kUnit rows from n on.
  void across(int64_t n, int64_t k0, int64_t count, uint32_t* units) { along(n, k0, count, units); }

  void begin_block(int64_t, int64_t, int64_t) {}

  // tile += A * B^T for panel p of the block.
  void multiply(int64_t, int64_t units, const uint32_t* a, const uint32_t* b, float* tile) const {
    kernels_.float_tile(units, reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), tile);
  }

 private:
  const Kernels& kernels_;
  const Weight& w_;
  Buffer<int8_t> integers_;
};

// Bfloat16, see NOTE [bf16].
class Bfloat16 {
 public:
  static constexpr int64_t kUnit = 2;

  Bfloat16(const Kernels& kernels, const Weight& w, bool grad_input)
      : kernels_(kernels),
        w_(w),
        grad_input_(grad_input),
        integers_(2 * std::max(kBlockUnits, kPanels * kernels.nr)),
        scales_(kPanels * kMaxGroups * kernels.nr),
        sources_(kernels.nr) {
    std::fill_n(scales_.get(), kPanels * kMaxGroups * kernels.nr, 1.0f);
  }

  static const uint32_t* x_row(const Kernels&, const Matrix& x, int64_t m, uint32_t* scratch) {
    scratch[x.cols / 2] = 0;  // an odd row ends in half a unit
    std::memcpy(scratch, x.row(m), x.cols * size_of(x.dtype));
    return scratch;
  }

  void along(int64_t n, int64_t k0, int64_t count, uint32_t* units) {
    kernels_.encode_bf16(integer_row(kernels_, w_, n, k0, count, integers_.get()), count, units);
  }

  void across(int64_t n, int64_t k0, int64_t count, uint32_t* units) {
    const bool single = n + 1 == w_.n;  // the last row of an odd number is paired with zeros
    const int8_t* q0 = integer_row(kernels_, w_, n, k0, count, integers_.get());
    const int8_t* q1 = single ? q0 : integer_row(kernels_, w_, n + 1, k0, count, &integers_[count]);
    const float* scales = w_.scales + n * w_.groups;
    for (int64_t k = k0, end; k < k0 + count; k = end) {
      const int64_t g = k / w_.group;
      end = std::min((g + 1) * w_.group, k0 + count);
      const int8_t* q[] = {q0 + (k - k0), q1 + (k - k0)};
      const float pair[] = {scales[g], single ? 0.0f : scales[w_.groups + g]};
      kernels_.encode_bf16_pair(q, pair, end - k, units + (k - k0));
    }
  }

  // The scales of the groups in this block; those of the gradient stand in the panels and stay 1 here.
  void begin_block(int64_t d0, int64_t count, int64_t c0) {
    if (grad_input_) return;
    const int64_t first = d0 / w_.group, groups = div_up(d0 + count, w_.group) - first;
    for (int64_t p = 0; p < kPanels; ++p) {
      for (int64_t j = 0; j < kernels_.nr; ++j) {
        const int64_t n = std::min(c0 + p * kernels_.nr + j, w_.n - 1);
        sources_[j] = reinterpret_cast<const uint32_t*>(w_.scales + n * w_.groups + first);
      }
      kernels_.interleave(sources_.data(), kernels_.nr, groups, reinterpret_cast<uint32_t*>(scales_of(p)));
    }
  }

  void multiply(int64_t p, int64_t units, const uint32_t* a, const uint32_t* b, float* tile) const {
    const int64_t group = grad_input_ ? units : std::min(div_up(w_.group, kUnit), units);
    const float* scales = scales_of(p);
    for (int64_t u = 0; u < units; u += group, scales += kernels_.nr) {
      kernels_.bf16_tile(std::min(group, units - u), a + u * kernels_.mr, b + u * kernels_.nr, scales, tile);
    }
  }

 private:
  static constexpr int64_t kMaxGroups = kBlockUnits * kUnit / kGroupStep;

  const float* scales_of(int64_t p) const { return &scales_[p * kMaxGroups * kernels_.nr]; }
  float* scales_of(int64_t p) { return &scales_[p * kMaxGroups * kernels_.nr]; }

  const Kernels& kernels_;
  const Weight& w_;
  bool grad_input_;
  Buffer<int8_t> integers_;
  Buffer<float> scales_;  // [kPanels, kMaxGroups, nr]
  std::vector<const uint32_t*> sources_;
};

// A packed block of the weight: panels [kPanels, kBlockUnits, nr], and scratch to make them.
template <class Format>
class PackedB {
 public:
  PackedB(const Kernels& kernels, const Weight& w, bool grad_input)
      : kernels_(kernels),
        w_(w),
        grad_input_(grad_input),
        format_(kernels, w, grad_input),
        panels_(kPanels * kBlockUnits * kernels.nr),
        encoded_(std::max(kRowUnits, kPanels) * kernels.nr),
        rows_(kernels.nr) {}

  // Packs `count` steps of depth from d0 on, for the columns from c0 on; columns past the end are zero.
  void pack(int64_t d0, int64_t count, int64_t c0) {
    format_.begin_block(d0, count, c0);
    if (grad_input_) {
      pack_across(d0, count, c0);
    } else {
      for (int64_t p = 0; p < kPanels; ++p) pack_along(d0, count, c0 + p * kernels_.nr, panel(p));
    }
  }

  void multiply(int64_t p, int64_t units, const uint32_t* a, float* tile) {
    format_.multiply(p, units, a, panel(p), tile);
  }

 private:
  uint32_t* panel(int64_t p) { return &panels_[p * kBlockUnits * kernels_.nr]; }

  void pack_along(int64_t d0, int64_t count, int64_t n0, uint32_t* panel) {
    const int64_t units = div_up(count, Format::kUnit);
    for (int64_t j = 0; j < kernels_.nr; ++j) {
      uint32_t* row = &encoded_[j * kRowUnits];
      rows_[j] = row;
      if (n0 + j < w_.n) {
        format_.along(n0 + j, d0, count, row);
      } else {
        std::fill_n(row, units, 0u);
      }
    }
    kernels_.interleave(rows_.data(), kernels_.nr, units, panel);
  }

  void pack_across(int64_t d0, int64_t count, int64_t k0) {
    const int64_t nr = kernels_.nr, width = kPanels * nr, cols = std::min(width, w_.k - k0);
    std::fill(&encoded_[cols], &encoded_[width], 0u);
    for (int64_t d = 0; d < count; d += Format::kUnit) {
      format_.across(d0 + d, k0, cols, encoded_.get());
      for (int64_t p = 0; p < kPanels; ++p) std::copy_n(&encoded_[p * nr], nr, panel(p) + d / Format::kUnit * nr);
    }
  }

  const Kernels& kernels_;
  const Weight& w_;
  bool grad_input_;
  Format format_;
  Buffer<uint32_t> panels_;
  Buffer<uint32_t> encoded_;  // rows to be transposed, or one row of all panels
  std::vector<const uint32_t*> rows_;
};

template <class Format>
void pack_a(const Kernels& kernels, const Matrix& x, int64_t begin, int64_t end, uint32_t* panels) {
  const int64_t mr = kernels.mr, units = div_up(x.cols, Format::kUnit), stride = units + 16;
  Buffer<uint32_t> encoded(mr * stride);
  std::vector<const uint32_t*> rows(mr);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t i = 0; i < mr; ++i) {
      uint32_t* scratch = &encoded[i * stride];
      const int64_t m = panel * mr + i;
      if (m >= x.rows) std::fill_n(scratch, units, 0u);
      rows[i] = m < x.rows ? Format::x_row(kernels, x, m, scratch) : scratch;
    }
    kernels.interleave(rows.data(), kernels.mr, units, panels + panel * mr * units);
  }
}

template <class Format>
void matmul(const Kernels& kernels, const Matrix& x, const Weight& w, bool grad_input, const float* bias, Output out,
            const Parallel& parallel) {
  const int mr = kernels.mr, nr = kernels.nr;
  const int64_t units = div_up(x.cols, Format::kUnit), panels = div_up(x.rows, mr);
  const int64_t cols = grad_input ? w.k : w.n, width = kPanels * nr;
  const Split split(panels, div_up(cols, width), parallel.num_threads);

  Buffer<uint32_t> a(panels * mr * units);
  parallel(panels, [&](int64_t begin, int64_t end) { pack_a<Format>(kernels, x, begin, end, a.get()); });

  parallel(split.tasks(), [&](int64_t begin, int64_t end) {
    PackedB<Format> b(kernels, w, grad_input);
    Buffer<float> tiles(panels * mr * width), ones(std::max(mr, nr)), bias_panel(nr);
    std::fill_n(ones.get(), std::max(mr, nr), 1.0f);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = split.column(task) * width;
      const int64_t first = split.row_begin(task), last = split.row_end(task);
      const int64_t used = std::min(kPanels, div_up(cols - c0, nr));
      const auto tile = [&](int64_t p, int64_t panel) { return &tiles[(p * panels + panel) * mr * nr]; };

      for (int64_t p = 0; p < used; ++p) std::fill(tile(p, first), tile(p, last), 0.0f);
      for (int64_t u0 = 0; u0 < units; u0 += kBlockUnits) {
        const int64_t d0 = u0 * Format::kUnit;
        b.pack(d0, std::min(kBlockUnits * Format::kUnit, x.cols - d0), c0);
        for (int64_t p = 0; p < used; ++p) {
          for (int64_t panel = first; panel < last; ++panel) {
            b.multiply(p, std::min(kBlockUnits, units - u0), &a[(panel * units + u0) * mr], tile(p, panel));
          }
        }
      }
      for (int64_t p = 0; p < used; ++p) {
        const int64_t column = c0 + p * nr, valid = std::min<int64_t>(nr, cols - column);
        if (bias != nullptr) std::copy_n(bias + column, valid, bias_panel.get());
        for (int64_t panel = first; panel < last; ++panel) {
          const int64_t m0 = panel * mr;
          kernels.store_float(tile(p, panel),
                              {
                                  .row_scales = ones.get(),
                                  .col_scales = ones.get(),
                                  .bias = bias != nullptr ? bias_panel.get() : nullptr,
                                  .rows = static_cast<int>(std::min<int64_t>(mr, x.rows - m0)),
                                  .cols = static_cast<int>(valid),
                                  .out = static_cast<char*>(out.data) + (m0 * cols + column) * size_of(out.dtype),
                                  .stride = cols,
                                  .dtype = out.dtype,
                              });
        }
      }
    }
  });
}

void matmul(const Matrix& x, const Weight& w, bool grad_input, const float* bias, Output out,
            const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const bool bf16 = x.dtype == DType::bfloat16 && kernels.bf16_tile != nullptr;
  (bf16 ? matmul<Bfloat16> : matmul<Float32>)(kernels, x, w, grad_input, bias, out, parallel);
}

}  // namespace

void float_matmul(const Matrix& x, const Weight& w, const float* bias, Output out, const Parallel& parallel) {
  matmul(x, w, false, bias, out, parallel);
}

void float_matmul_grad_input(const Matrix& grad_out, const Weight& w, Output out, const Parallel& parallel) {
  matmul(grad_out, w, true, nullptr, out, parallel);
}

}  // namespace qk
