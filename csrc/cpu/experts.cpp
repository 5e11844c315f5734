// Products of fused experts: rows are sorted by their expert, and each expert multiplies its own with its own weight.
#include <algorithm>
#include <cstring>

#include "cpu/api.h"
#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qk {
namespace {

char* row_of(const Output& out, int64_t row, int64_t cols) {
  return static_cast<char*>(out.data) + row * cols * static_cast<int64_t>(size_of(out.dtype));
}

// Zeros in the rows that belong to no expert.
void clear_unused(const ExpertRows& rows, int64_t cols, const Output& out) {
  std::memset(row_of(out, rows.used(), cols), 0, row_of(out, rows.rows, cols) - row_of(out, rows.used(), cols));
}

// x of an a8 scheme, quantized once for all experts.
class QuantizedOnce {
 public:
  QuantizedOnce(const Kernels& kernels, const Matrix& x, const Scheme& scheme, const Parallel& parallel)
      : x_(x), groups_(scheme.act_groups(x.cols)), q_(x.rows * x.cols), scales_(x.rows * groups_) {
    quantize_activation(kernels, x, scheme, q_.get(), scales_.get(), parallel);
  }

  // `count` rows: those of the index, or from row `begin` on.
  LinearInput rows(int64_t begin, int64_t count, const int64_t* index) const {
    const int64_t first = index != nullptr ? 0 : begin;
    const Matrix x = {x_.row(first), x_.dtype, count, x_.cols};
    return {x, q_.get() + first * x_.cols, scales_.get() + first * groups_, index != nullptr ? index + begin : nullptr};
  }

 private:
  const Matrix& x_;
  int64_t groups_;
  Buffer<int8_t> q_;
  Buffer<float> scales_;
};

// Rows of x, one after the other.
class Gathered {
 public:
  Gathered(const Matrix& x, int64_t begin, int64_t count, const int64_t* index)
      : bytes_(index != nullptr ? count * x.cols * static_cast<int64_t>(size_of(x.dtype)) : 0),
        rows_{x.row(index != nullptr ? 0 : begin), x.dtype, count, x.cols} {
    if (index == nullptr) return;
    rows_.data = bytes_.get();
    const int64_t row_bytes = x.cols * static_cast<int64_t>(size_of(x.dtype));
    for (int64_t m = 0; m < count; ++m) std::memcpy(&bytes_[m * row_bytes], x.row(index[begin + m]), row_bytes);
  }

  const Matrix& get() const { return rows_; }

 private:
  Buffer<char> bytes_;
  Matrix rows_;
};

}  // namespace

void grouped_linear(const GroupedLinearArgs& args, const ExpertWeights& w, void* data, DType out_dtype,
                    const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const ExpertRows& rows = args.rows;
  const bool integers = w.scheme.int_activations();
  const Matrix none = {args.x.data, args.x.dtype, 0, args.x.cols};
  const QuantizedOnce quantized(kernels, integers ? args.x : none, w.scheme, parallel);
  const Output out = {data, out_dtype};
  clear_unused(rows, w.n, out);
  for (int64_t e = 0; e < w.experts; ++e) {
    const int64_t begin = rows.begin(e), count = rows.count(e);
    if (count == 0 || w.n == 0) continue;
    const Bias bias = {args.bias.data == nullptr
                           ? nullptr
                           : static_cast<const char*>(args.bias.data) + e * w.n * size_of(args.bias.dtype),
                       args.bias.dtype};
    const Output to = {row_of(out, begin, w.n), out_dtype};
    if (integers) {
      linear(kernels, quantized.rows(begin, count, args.index), w[e], bias, to, parallel);
    } else {
      const Gathered x(args.x, begin, count, args.index);
      linear(kernels, {x.get()}, w[e], bias, to, parallel);
    }
  }
}

void grouped_linear_grad_input(const Matrix& grad_out, const ExpertRows& rows, const ExpertWeights& w, void* data,
                               DType out_dtype, const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const Output out = {data, out_dtype};
  clear_unused(rows, w.k, out);
  for (int64_t e = 0; e < w.experts; ++e) {
    const int64_t begin = rows.begin(e), count = rows.count(e);
    if (count == 0) continue;
    float_matmul_grad_input(kernels, {grad_out.row(begin), grad_out.dtype, count, grad_out.cols}, w[e],
                            {row_of(out, begin, w.k), out_dtype}, limited_to_work(parallel, count * w.n * w.k));
  }
}

}  // namespace qk
