// The blocked float matrix driver: x [M, depth] times a panel-by-panel dequantized weight, for the a16 schemes
// (depth = k) and for the gradient with respect to x (depth = n). The weight is never dequantized as a whole.
#include <algorithm>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/drivers.h"
#include "cpu/rows.h"
#include "cpu/split.h"

namespace qk {
namespace {

// A packed block of the weight is kDepthBlock steps deep (a multiple of every group size) and kPanels panels wide: it
// stays in L2 while a panel of A, in L1, runs against all of it. Several panels also make the segments of a stored
// row long enough to dequantize at speed when depth runs over the rows.
constexpr int64_t kDepthBlock = 512;
constexpr int64_t kPanels = 4;

// Packs `count` steps of depth from d0 on, for the columns from c0 on, into panels[kPanels, kDepthBlock, nr].
class PackB {
 public:
  PackB(const Kernels& kernels, const Weight& w, bool grad_input)
      : kernels_(kernels),
        w_(w),
        grad_input_(grad_input),
        integers_(std::max<int64_t>(kDepthBlock, kernels.nr * kPanels)),
        floats_(std::max<int64_t>(kDepthBlock, kPanels) * kernels.nr),
        rows_(kernels.nr) {}

  void operator()(int64_t d0, int64_t count, int64_t c0, float* panels) {
    if (grad_input_) {
      pack_stored_rows(d0, count, c0, panels);
    } else {
      for (int64_t p = 0; p < kPanels; ++p) {
        pack_transposed(d0, count, c0 + p * kernels_.nr, panels + p * kDepthBlock * kernels_.nr);
      }
    }
  }

 private:
  // Depth runs over the rows of the weight: a segment of a stored row is a row of the panels.
  void pack_stored_rows(int64_t d0, int64_t count, int64_t c0, float* panels) {
    const int nr = kernels_.nr;
    const int64_t width = kPanels * nr, cols = std::min(width, w_.k - c0);
    std::fill(&floats_[cols], &floats_[width], 0.0f);
    for (int64_t d = 0; d < count; ++d) {
      dequantize_row(kernels_, w_, d0 + d, c0, cols, integers_.get(), floats_.get());
      for (int64_t p = 0; p < kPanels; ++p) {
        std::copy_n(&floats_[p * nr], nr, panels + (p * kDepthBlock + d) * nr);
      }
    }
  }

  // Depth runs along the rows of the weight.
  void pack_transposed(int64_t d0, int64_t count, int64_t c0, float* panel) {
    const int nr = kernels_.nr;
    for (int j = 0; j < nr; ++j) {
      float* row = &floats_[j * kDepthBlock];
      rows_[j] = reinterpret_cast<const uint32_t*>(row);
      if (c0 + j < w_.n) {
        dequantize_row(kernels_, w_, c0 + j, d0, count, integers_.get(), row);
      } else {
        std::fill_n(row, count, 0.0f);
      }
    }
    kernels_.interleave(rows_.data(), nr, count, reinterpret_cast<uint32_t*>(panel));
  }

  const Kernels& kernels_;
  const Weight& w_;
  bool grad_input_;
  Buffer<int8_t> integers_;
  Buffer<float> floats_;
  std::vector<const uint32_t*> rows_;
};

void pack_a(const Kernels& kernels, const Matrix& x, int64_t begin, int64_t end, float* panels) {
  const int mr = kernels.mr;
  Buffer<float> floats(mr * x.cols);
  std::vector<const uint32_t*> rows(mr);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int i = 0; i < mr; ++i) {
      float* scratch = &floats[i * x.cols];
      const int64_t m = panel * mr + i;
      if (m >= x.rows) std::fill_n(scratch, x.cols, 0.0f);
      const float* row = m < x.rows ? float_row(kernels, x, m, scratch) : scratch;
      rows[i] = reinterpret_cast<const uint32_t*>(row);
    }
    kernels.interleave(rows.data(), mr, x.cols, reinterpret_cast<uint32_t*>(panels + panel * mr * x.cols));
  }
}

void matmul(const Matrix& x, const Weight& w, bool grad_input, const float* bias, Output out,
            const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const int mr = kernels.mr, nr = kernels.nr;
  const int64_t depth = x.cols, cols = grad_input ? w.k : w.n, panels = div_up(x.rows, mr);
  const int64_t width = kPanels * nr;
  const Split split(panels, div_up(cols, width), parallel.num_threads);

  Buffer<float> a(panels * mr * depth);
  parallel(panels, [&](int64_t begin, int64_t end) { pack_a(kernels, x, begin, end, a.get()); });

  parallel(split.tasks(), [&](int64_t begin, int64_t end) {
    PackB pack_b(kernels, w, grad_input);
    Buffer<float> b(kDepthBlock * width), tiles(panels * mr * width), ones(std::max(mr, nr)), bias_panel(nr);
    std::fill_n(ones.get(), std::max(mr, nr), 1.0f);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = split.column(task) * width;
      const int64_t first = split.row_begin(task), last = split.row_end(task);
      const int64_t used = std::min(kPanels, div_up(cols - c0, nr));
      const auto tile = [&](int64_t panel, int64_t p) { return &tiles[((panel - first) * kPanels + p) * mr * nr]; };

      std::fill_n(tiles.get(), (last - first) * mr * width, 0.0f);
      for (int64_t d0 = 0; d0 < depth; d0 += kDepthBlock) {
        const int64_t count = std::min(kDepthBlock, depth - d0);
        pack_b(d0, count, c0, b.get());
        for (int64_t panel = first; panel < last; ++panel) {
          for (int64_t p = 0; p < used; ++p) {
            kernels.float_tile(count, &a[(panel * depth + d0) * mr], &b[p * kDepthBlock * nr], tile(panel, p));
          }
        }
      }
      for (int64_t p = 0; p < used; ++p) {
        const int64_t column = c0 + p * nr, valid = std::min<int64_t>(nr, cols - column);
        if (bias != nullptr) std::copy_n(bias + column, valid, bias_panel.get());
        for (int64_t panel = first; panel < last; ++panel) {
          const int64_t m0 = panel * mr;
          kernels.store_float(tile(panel, p),
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

}  // namespace

void float_matmul(const Matrix& x, const Weight& w, const float* bias, Output out, const Parallel& parallel) {
  matmul(x, w, false, bias, out, parallel);
}

void float_matmul_grad_input(const Matrix& grad_out, const Weight& w, Output out, const Parallel& parallel) {
  matmul(grad_out, w, true, nullptr, out, parallel);
}

}  // namespace qk
