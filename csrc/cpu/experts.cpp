// Products of fused experts: rows are sorted by their expert, and each expert multiplies its own with its own weight.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/api.h"
#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/rows.h"
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

// Calls f(e, inner) for each expert that has rows, which multiplies with a weight of `values` values, so that all
// threads are busy: experts are shared among them, except those that hold more of the work than a part of a thread's
// share, which one after the other have all threads (`inner`).
template <class F>
void for_each_expert(const ExpertRows& rows, int64_t values, const Parallel& parallel, const F& f) {
  constexpr int64_t kRowsToRead = 8;  // reading a weight takes about as long as multiplying so many rows with it
  constexpr int64_t kPerThread = 4;
  const auto work = [&](int64_t e) { return rows.count(e) == 0 ? 0 : (rows.count(e) + kRowsToRead) * values; };
  std::vector<int64_t> shared;
  int64_t total = 0;
  for (int64_t e = 0; e < rows.experts; ++e) total += work(e);
  const Parallel limited = limited_to_work(parallel, total);
  for (int64_t e = 0; e < rows.experts; ++e) {
    if (rows.count(e) == 0) continue;
    if (limited.num_threads > 1 && work(e) * kPerThread * limited.num_threads > total) {
      f(e, parallel);
    } else {
      shared.push_back(e);
    }
  }
  const auto count = static_cast<int64_t>(shared.size());
  const Parallel among = {limited.num_threads, parallel.run, std::max<int64_t>(count, 1)};
  const Parallel alone = {1, parallel.run};
  among(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(shared[i], alone);
  });
}

// x of an a8 scheme, quantized once for all experts.
class QuantizedOnce {
 public:
  QuantizedOnce(const Kernels& kernels, const Matrix& x, const Scheme& scheme, const float* x_scale,
                const Parallel& parallel)
      : x_(x), groups_(scheme.act_groups(x.cols)), q_(x.rows * x.cols), scales_(x.rows * groups_) {
    quantize_activation(kernels, x, scheme, x_scale, q_.get(), scales_.get(), parallel);
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

// The scales to fold into a gradient [n] before it is rounded. A row of zeros has a scale of 1 by convention; it counts
// as 0, so that it does not set the range of all rows.
void row_factors(const Kernels& kernels, const Weight& w, float* factors) {
  Buffer<int8_t> integers(w.k);
  for (int64_t n = 0; n < w.n; ++n) {
    factors[n] = w.scales[n];
    if (factors[n] != 1.0f) continue;
    const int8_t* q = integer_row(kernels, w, n, 0, w.k, integers.get());
    if (std::all_of(q, q + w.k, [](int8_t value) { return value == 0; })) factors[n] = 0.0f;
  }
}

// int_matmul_grad_input for any depth: rule 10.
void int_product(const Kernels& kernels, const QuantizedRows& grad, const Weight& w, const float* column_scales,
                 const Output& out, const Parallel& parallel) {
  constexpr int64_t kBlock = 65536;
  const Parallel limited = limited_to_work(parallel, grad.rows * w.n * w.k);
  if (w.n <= kBlock) {
    int_matmul_grad_input(kernels, grad, w, column_scales, out, limited);
    return;
  }
  const int64_t values = grad.rows * w.k;
  Buffer<int8_t> q(grad.rows * kBlock);
  Buffer<float> ones(grad.rows), part(values), total(values);
  std::fill_n(ones.get(), grad.rows, 1.0f);
  for (int64_t n0 = 0; n0 < w.n; n0 += kBlock) {
    const int64_t count = std::min(kBlock, w.n - n0);
    for (int64_t m = 0; m < grad.rows; ++m) std::memcpy(&q[m * count], grad.data + m * w.n + n0, count);
    float* const sums = n0 == 0 ? total.get() : part.get();
    int_matmul_grad_input(kernels, {q.get(), ones.get(), grad.rows, count}, w.rows(n0, count), column_scales,
                          {sums, DType::float32}, limited);
    for (int64_t i = 0; i < values && n0 != 0; ++i) total[i] = total[i] + part[i];
  }
  for (int64_t m = 0; m < grad.rows; ++m) {
    kernels.elementwise.scale(&total[m * w.k], w.k, grad.scales[m], &total[m * w.k]);
    kernels.elementwise.from_float(&total[m * w.k], w.k, out.dtype, row_of(out, m, w.k));
  }
}

template <class T>
void transpose_values(const Matrix& x, T* out, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 16;  // a cache line of floats
  const T* data = static_cast<const T*>(x.data);
  for (int64_t c0 = begin * kBlock; c0 < std::min(end * kBlock, x.cols); c0 += kBlock) {
    const int64_t last = std::min(c0 + kBlock, x.cols);
    for (int64_t r0 = 0; r0 < x.rows; r0 += kBlock) {
      for (int64_t c = c0; c < last; ++c) {
        for (int64_t r = r0; r < std::min(r0 + kBlock, x.rows); ++r) out[c * x.rows + r] = data[r * x.cols + c];
      }
    }
  }
}

// out [cols, rows] of the dtype of x.
void transpose(const Matrix& x, void* out, const Parallel& parallel) {
  parallel(div_up(x.cols, 16), [&](int64_t begin, int64_t end) {
    x.dtype == DType::float32 ? transpose_values(x, static_cast<float*>(out), begin, end)
                              : transpose_values(x, static_cast<uint16_t*>(out), begin, end);
  });
}

}  // namespace

void grouped_linear(const GroupedLinearArgs& args, const ExpertWeights& w, void* data, DType out_dtype,
                    const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const ExpertRows& rows = args.rows;
  const bool integers = w.scheme.int_activations();
  const Matrix none = {args.x.data, args.x.dtype, 0, args.x.cols};
  const QuantizedOnce quantized(kernels, integers ? args.x : none, w.scheme, w.x_scale, parallel);
  const Output out = {data, out_dtype};
  clear_unused(rows, w.n, out);
  for_each_expert(rows, w.n * w.k, parallel, [&](int64_t e, const Parallel& inner) {
    const int64_t begin = rows.begin(e), count = rows.count(e);
    const Bias bias = {args.bias.data == nullptr
                           ? nullptr
                           : static_cast<const char*>(args.bias.data) + e * w.n * size_of(args.bias.dtype),
                       args.bias.dtype};
    const Output to = {row_of(out, begin, w.n), out_dtype};
    if (integers) {
      linear(kernels, quantized.rows(begin, count, args.index), w[e], bias, to, inner);
    } else {
      const Gathered x(args.x, begin, count, args.index);
      linear(kernels, {x.get()}, w[e], bias, to, inner);
    }
  });
}

void grouped_linear_grad_input(const GroupedGradient& grad, const ExpertWeights& w, const float* column_scales,
                               void* data, DType out_dtype, const Parallel& parallel) {
  const Kernels& kernels = qk::kernels();
  const Output out = {data, out_dtype};
  clear_unused(grad.rows, w.k, out);
  for_each_expert(grad.rows, w.n * w.k, parallel, [&](int64_t e, const Parallel& inner) {
    const int64_t begin = grad.rows.begin(e), count = grad.rows.count(e);
    const Matrix grad_out = {grad.grad_out.row(begin), grad.grad_out.dtype, count, w.n};
    const Output to = {row_of(out, begin, w.k), out_dtype};
    if (grad.random == nullptr) {
      float_matmul_grad_input(kernels, grad_out, w[e], to, limited_to_work(inner, count * w.n * w.k));
      return;
    }
    Buffer<int8_t> q(count * w.n);
    Buffer<float> scales(count), factors(w.n);
    const bool folded = column_scales == nullptr;
    if (folded) row_factors(kernels, w[e], factors.get());
    const Random random = {grad.random->seed, grad.random->rng_stream, begin};
    quantize_rows_stochastic(kernels, grad_out, folded ? factors.get() : nullptr, random, q.get(), scales.get(), inner);
    const float* columns = folded ? nullptr : column_scales + e * w.k;
    int_product(kernels, {q.get(), scales.get(), count, w.n}, w[e], columns, to, inner);
  });
}

void grouped_linear_grad_weight(const GroupedGradient& grad, const QuantizedRows& x, const int64_t* index, void* data,
                                DType out_dtype, const Parallel& parallel) {
  static const Scheme scheme = parse_scheme("w8a8");
  const Kernels& kernels = qk::kernels();
  const Output out = {data, out_dtype};
  const int64_t n = grad.grad_out.cols, k = x.cols;
  if (n == 0) return;
  const DType dtype = grad.grad_out.dtype;
  for (int64_t e = 0; e < grad.rows.experts; ++e) {
    if (grad.rows.count(e) == 0) std::memset(row_of(out, e * n, k), 0, n * k * size_of(out_dtype));
  }
  for_each_expert(grad.rows, n * k, parallel, [&](int64_t e, const Parallel& inner) {
    const int64_t begin = grad.rows.begin(e), count = grad.rows.count(e);
    const Output to = {row_of(out, e * n, k), out_dtype};
    const Matrix grad_out = {grad.grad_out.row(begin), dtype, count, n};
    const bool gathers = index != nullptr;
    Buffer<int8_t> picked(gathers ? count * k : 0);
    Buffer<float> scales(count);
    for (int64_t m = 0; m < count; ++m) {
      const int64_t row = gathers ? index[begin + m] : begin + m;
      scales[m] = x.scales[row];
      if (gathers) std::memcpy(&picked[m * k], x.data + row * k, k);
    }
    const int8_t* const integers = gathers ? picked.get() : x.data + begin * k;
    if (grad.random == nullptr) {
      Buffer<char> transposed(n * count * static_cast<int64_t>(size_of(dtype)));
      transpose(grad_out, transposed.get(), limited_to_work(inner, n * count));
      const Weight w(scheme, count, k, integers, scales.get(), nullptr);
      float_matmul_grad_input(kernels, {transposed.get(), dtype, n, count}, w, to,
                              limited_to_work(inner, count * n * k));
      return;
    }
    Buffer<int8_t> q(n * count);
    Buffer<float> q_scales(n), ones(count);
    std::fill_n(ones.get(), count, 1.0f);
    const Random random = {grad.random->seed, grad.random->rng_stream, begin};
    quantize_columns_stochastic(kernels, grad_out, scales.get(), random, q.get(), q_scales.get(), inner);
    const Weight w(scheme, count, k, integers, ones.get(), nullptr);
    int_product(kernels, {q.get(), q_scales.get(), n, count}, w, nullptr, to, inner);
  });
}

}  // namespace qk
