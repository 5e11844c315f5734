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

// Depth of a packed block: nr * kDepthBlock floats of B and mr * kDepthBlock of A share L1 and L2. A multiple of every
// group size.
constexpr int64_t kDepthBlock = 512;

// Packs `count` steps of depth from d0 on, for the columns from c0 on, into panel[count, nr].
class PackB {
 public:
  PackB(const Kernels& kernels, const Weight& w, bool grad_input)
      : kernels_(kernels),
        w_(w),
        grad_input_(grad_input),
        integers_(std::max<int64_t>(kDepthBlock, kernels.nr)),
        floats_(grad_input ? 0 : kernels.nr * kDepthBlock),
        rows_(kernels.nr) {}

  void operator()(int64_t d0, int64_t count, int64_t c0, float* panel) {
    const int nr = kernels_.nr;
    if (grad_input_) {  // depth runs over the rows of the weight, which lie in the panel as they are stored
      const int64_t cols = std::min<int64_t>(nr, w_.k - c0);
      for (int64_t d = 0; d < count; ++d) {
        dequantize_row(kernels_, w_, d0 + d, c0, cols, integers_.get(), panel + d * nr);
        std::fill(panel + d * nr + cols, panel + (d + 1) * nr, 0.0f);
      }
      return;
    }
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

 private:
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
  const Split split(panels, div_up(cols, nr), parallel.num_threads);

  Buffer<float> a(panels * mr * depth);
  parallel(panels, [&](int64_t begin, int64_t end) { pack_a(kernels, x, begin, end, a.get()); });

  parallel(split.tasks(), [&](int64_t begin, int64_t end) {
    PackB pack_b(kernels, w, grad_input);
    Buffer<float> b(kDepthBlock * nr), tiles(panels * mr * nr), ones(std::max(mr, nr)), bias_panel(nr);
    std::fill_n(ones.get(), std::max(mr, nr), 1.0f);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = split.column(task) * nr, valid = std::min<int64_t>(nr, cols - c0);
      const int64_t first = split.row_begin(task), last = split.row_end(task);
      std::fill_n(tiles.get(), (last - first) * mr * nr, 0.0f);
      for (int64_t d0 = 0; d0 < depth; d0 += kDepthBlock) {
        const int64_t count = std::min(kDepthBlock, depth - d0);
        pack_b(d0, count, c0, b.get());
        for (int64_t panel = first; panel < last; ++panel) {
          kernels.float_tile(count, &a[(panel * depth + d0) * mr], b.get(), &tiles[(panel - first) * mr * nr]);
        }
      }
      if (bias != nullptr) std::copy_n(bias + c0, valid, bias_panel.get());
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t m0 = panel * mr;
        kernels.store_float(&tiles[(panel - first) * mr * nr],
                            {
                                .row_scales = ones.get(),
                                .col_scales = ones.get(),
                                .bias = bias != nullptr ? bias_panel.get() : nullptr,
                                .rows = static_cast<int>(std::min<int64_t>(mr, x.rows - m0)),
                                .cols = static_cast<int>(valid),
                                .out = static_cast<char*>(out.data) + (m0 * cols + c0) * size_of(out.dtype),
                                .stride = cols,
                                .dtype = out.dtype,
                            });
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
