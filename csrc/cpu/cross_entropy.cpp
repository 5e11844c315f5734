// Cross entropy of the logits of a linear layer, chunk by chunk of the vocabulary: the logits of a chunk are made by
// the forward driver, added to the running softmax of their rows, and multiplied back with the weight by the driver of
// the gradient, so that neither logits nor probabilities of more than a chunk exist (Dao et al. 2022, arXiv:2205.14135,
// on attention, of which this is the case where keys and values are both the weight).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/api.h"
#include "cpu/buffer.h"
#include "cpu/drivers/drivers.h"
#include "cpu/drivers/rows.h"
#include "cpu/kernels/kernels.h"

namespace qk {
namespace {

// What one product covers: a tile of logits and its gradient stay in the L2 cache, and the weight is packed for enough
// rows to pay.
constexpr int64_t kProductRows = 512;
// Columns that share a scale of the gradient. Part of the numbers, as is the next.
constexpr int64_t kChunkColumns = 1024;
// The chunks of the vocabulary are summed in this many ranges, which threads share.
constexpr int64_t kRanges = 8;

#include "cpu/kernels/exp.inc"

// The natural logarithm in operations that are each rounded, where that of libm may differ between machines:
// x = 2^e * f, log f = 2 artanh((f - 1) / (f + 1)) as a series, cut off below 2^-50.
double natural_log(double x) {
  if (!(x > 0.0) || std::isinf(x)) return x == 0.0 ? -INFINITY : x > 0.0 ? x : NAN;
  int e;
  double f = std::frexp(x, &e);
  if (f < 0.70710678118654752) {
    f *= 2.0;
    --e;
  }
  const double s = (f - 1.0) / (f + 1.0), s2 = s * s;
  double series = 0.0;
  for (int k = 19; k >= 1; k -= 2) series = series * s2 + 1.0 / k;
  return 2.0 * (s * series) + e * 0.69314718055994531;
}

const Parallel kSerial{1, nullptr};

class CrossEntropy {
 public:
  CrossEntropy(const Kernels& kernels, const CrossEntropyArgs& args, const Weight& w, const CrossEntropyResult& result,
               const Parallel& parallel)
      : kernels_(kernels),
        args_(args),
        w_(w),
        result_(result),
        parallel_(parallel),
        chunks_(div_up(w.n, kChunkColumns)) {
    for (int64_t m = 0; m < args.hidden.rows; ++m) {
      if (args.target[m] != args.ignore_index) valid_.push_back(m);
    }
    if (args.bias.data != nullptr) {
      bias_ = Buffer<float>(w.n);
      kernels_.elementwise.to_float(args.bias.data, args.bias.dtype, w.n, bias_.get());
    }
  }

  void run() {
    clear_ignored();
    if (valid_.empty()) return;
    const bool gradient = result_.grad_hidden != nullptr;
    if (gradient && !w_.scheme.row_scaled()) column_scales_of_chunks();
    if (gradient && w_.scheme.row_scaled()) scales_of_rows();
    if (gradient && args_.label_smoothing != 0.0) sum_columns();
    const int64_t blocks = div_up(parallel_.num_threads, kRanges), step = blocks * kProductRows;
    const int64_t most = std::min<int64_t>(step, valid_.size());
    states_.resize(most * kRanges);
    rows_ = Buffer<char>(most * w_.k * size_of(args_.hidden.dtype));
    sums_ = Buffer<float>(gradient ? most * kRanges * w_.k : 0);
    for (int64_t first = 0; first < static_cast<int64_t>(valid_.size()); first += step) {
      first_ = first;
      count_ = std::min<int64_t>(step, valid_.size() - first);
      for (int64_t i = 0; i < count_; ++i) {
        const size_t bytes = w_.k * size_of(args_.hidden.dtype);
        std::memcpy(&rows_[i * bytes], args_.hidden.row(valid_[first + i]), bytes);
      }
      parallel_(div_up(count_, kProductRows) * kRanges, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) sum_range(task / kRanges * kProductRows, task % kRanges);
      });
      parallel_(count_, [&](int64_t begin, int64_t end) {
        Buffer<int8_t> integers(w_.k);
        Buffer<float> target(w_.k);
        for (int64_t i = begin; i < end; ++i) finish(i, integers.get(), target.get());
      });
    }
  }

 private:
  SoftmaxState& state(int64_t i, int64_t range) { return states_[i * kRanges + range]; }
  float* sums(int64_t i, int64_t range) { return &sums_[(range * count_ + i) * w_.k]; }

  void clear_ignored() {
    for (int64_t m = 0; m < args_.hidden.rows; ++m) {
      if (args_.target[m] != args_.ignore_index) continue;
      result_.loss[m] = result_.lse[m] = 0.0f;
      if (result_.grad_hidden != nullptr) std::fill_n(result_.grad_hidden + m * w_.k, w_.k, 0.0f);
    }
  }

  void column_scales_of_chunks() {
    column_scales_ = Buffer<float>(chunks_ * w_.k);
    parallel_(chunks_, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) column_scales(kernels_, chunk(c), &column_scales_[c * w_.k], kSerial);
    });
  }

  // The scales to fold into the gradient. A row of zeros has a scale of 1, which would make its class, whose gradient
  // meets zeros only, set the scale for all others.
  void scales_of_rows() {
    constexpr int64_t kWidth = 64;
    row_scales_ = Buffer<float>(w_.n);
    parallel_(w_.n, [&](int64_t begin, int64_t end) {
      int8_t scratch[kWidth];
      for (int64_t n = begin; n < end; ++n) {
        row_scales_[n] = 0.0f;
        for (int64_t k0 = 0; k0 < w_.k && row_scales_[n] == 0.0f; k0 += kWidth) {
          const int64_t count = std::min(kWidth, w_.k - k0);
          const int8_t* q = integer_row(kernels_, w_, n, k0, count, scratch);
          if (std::any_of(q, q + count, [](int8_t value) { return value != 0; })) row_scales_[n] = w_.scales[n];
        }
      }
    });
  }

  // The sum of the rows of the dequantized weight: of each chunk in order, and then of the chunks.
  void sum_columns() {
    constexpr int64_t kWidth = 256;
    column_sums_ = Buffer<double>(w_.k);
    parallel_(div_up(w_.k, kWidth), [&](int64_t begin, int64_t end) {
      Buffer<int8_t> integers(kWidth);
      Buffer<float> row(kWidth);
      Buffer<double> part(kWidth);
      for (int64_t k0 = begin * kWidth; k0 < std::min(end * kWidth, w_.k); k0 += kWidth) {
        const int64_t count = std::min(kWidth, w_.k - k0);
        double* total = &column_sums_[k0];
        std::fill_n(total, count, 0.0);
        for (int64_t c = 0; c < chunks_; ++c) {
          std::fill_n(part.get(), count, 0.0);
          for (int64_t n = c * kChunkColumns; n < std::min(w_.n, (c + 1) * kChunkColumns); ++n) {
            dequantize_row(kernels_, w_, n, k0, count, integers.get(), row.get());
            for (int64_t i = 0; i < count; ++i) part[i] += row[i];
          }
          for (int64_t i = 0; i < count; ++i) total[i] += part[i];
        }
      }
    });
  }

  Weight chunk(int64_t c) const {
    return w_.rows(c * kChunkColumns, std::min(kChunkColumns, w_.n - c * kChunkColumns));
  }

  // The softmax of up to kProductRows rows over a range of chunks, and the sum of the weight's rows by it.
  void sum_range(int64_t row0, int64_t range) {
    const int64_t rows = std::min(kProductRows, count_ - row0), k = w_.k;
    const int64_t width = std::min(w_.n, kChunkColumns);
    const bool gradient = result_.grad_hidden != nullptr;
    Buffer<float> logits(rows * width), scratch(round_up(width, 16)), scales(rows), before(rows);
    Buffer<int8_t> q(gradient ? rows * width : 0);
    Buffer<float> product(gradient ? rows * k : 0);
    for (int64_t i = 0; i < rows; ++i) {
      state(row0 + i, range) = {};
      if (gradient) std::fill_n(sums(row0 + i, range), k, 0.0f);
    }
    const Matrix x{&rows_[row0 * k * size_of(args_.hidden.dtype)], args_.hidden.dtype, rows, k};
    const int64_t first = range * chunks_ / kRanges, last = (range + 1) * chunks_ / kRanges;
    if (first == last) return;
    const LinearDriver& driver = choose_driver(kernels_, w_.scheme, rows);
    const auto operand =
        driver.prepare(kernels_, {.x = x, .x_scale = w_.x_scale}, chunk(first), kSerial);  // for all chunks
    for (int64_t c = first; c < last; ++c) {
      const Weight w = chunk(c);
      const int64_t n0 = c * kChunkColumns;
      const float* bias = args_.bias.data != nullptr ? &bias_[n0] : nullptr;
      operand->multiply(w, bias, {logits.get(), DType::float32}, kSerial);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t m = valid_[first_ + row0 + i];
        const LogitRow row = {
            .logits = &logits[i * w.n],
            .n = w.n,
            .w_scales = gradient && w_.scheme.row_scaled() ? &row_scales_[n0] : nullptr,
            .softcap = args_.softcap,
            .target = args_.target[m] - n0,
            .dither = gradient ? static_cast<uint32_t>(args_.dither[m]) + static_cast<uint32_t>(n0) * kDitherStep : 0,
            .q = gradient ? &q[i * w.n] : nullptr,
        };
        SoftmaxFactors factors;
        kernels_.softmax.softmax_row(row, scratch.get(), state(row0 + i, range), factors);
        before[i] = factors.before;
        scales[i] = gradient ? int8_scale(factors.absmax_bits) * factors.own : 0.0f;
      }
      if (!gradient) continue;
      const float* columns = !w_.scheme.row_scaled() ? &column_scales_[c * k] : nullptr;
      int_matmul_grad_input(kernels_, {q.get(), scales.get(), rows, w.n}, w, columns, {product.get(), DType::float32},
                            kSerial);
      for (int64_t i = 0; i < rows; ++i) {
        kernels_.softmax.scale_and_add(sums(row0 + i, range), k, before[i], &product[i * k]);
      }
    }
  }

  // Puts the ranges of row i together, and makes the loss and its gradient.
  void finish(int64_t i, int8_t* integers, float* target_row) {
    const int64_t m = valid_[first_ + i], target = args_.target[m], k = w_.k;
    SoftmaxState total;
    float* grad = result_.grad_hidden != nullptr ? result_.grad_hidden + m * k : nullptr;
    if (grad != nullptr) std::fill_n(grad, k, 0.0f);
    for (int64_t range = 0; range < kRanges; ++range) {
      const SoftmaxState& part = state(i, range);
      const SoftmaxFactors factors = merge_softmax(total, part);
      // A range holds the target's logit or 0.
      total.target = total.target + part.target;
      if (grad == nullptr) continue;
      const float* sum = sums(i, range);
      for (int64_t j = 0; j < k; ++j) grad[j] = grad[j] * factors.before + sum[j] * factors.own;
    }
    const double smoothing = args_.label_smoothing, z_loss = args_.z_loss, classes = static_cast<double>(w_.n);
    const double lse = total.max + natural_log(total.sum);
    double picked = (1.0 - smoothing) * total.target;
    if (smoothing != 0.0) picked += smoothing * (total.total / classes);  // which a logit of -Inf makes infinite
    result_.lse[m] = static_cast<float>(lse);
    result_.loss[m] = static_cast<float>((lse - picked) + z_loss * (lse * lse));
    if (grad == nullptr) return;
    const float probability = exp_nonpositive<float, uint32_t>(total.target - total.max);
    const double slope = 1.0 + 2.0 * z_loss * lse;  // of the loss by lse
    const float factor = static_cast<float>(slope / total.sum);
    double at_target = slope * (probability / static_cast<double>(total.sum)) - (1.0 - smoothing);
    if (args_.softcap != 0.0f) {
      const double t = total.target / static_cast<double>(args_.softcap);
      at_target *= 1.0 - t * t;
    }
    const float coefficient = static_cast<float>(at_target);
    dequantize_row(kernels_, w_, target, 0, k, integers, target_row);
    for (int64_t j = 0; j < k; ++j) grad[j] = grad[j] * factor + target_row[j] * coefficient;
    if (smoothing == 0.0) return;
    for (int64_t j = 0; j < k; ++j) grad[j] = static_cast<float>(grad[j] - smoothing / classes * column_sums_[j]);
  }

  const Kernels& kernels_;
  const CrossEntropyArgs& args_;
  const Weight& w_;
  const CrossEntropyResult& result_;
  const Parallel& parallel_;
  int64_t chunks_;
  std::vector<int64_t> valid_;        // rows that are not ignored
  int64_t first_ = 0, count_ = 0;     // those in work: valid_[first, first + count)
  Buffer<float> bias_{0};             // [n], or empty
  Buffer<char> rows_{0};              // [count, k] of hidden
  std::vector<SoftmaxState> states_;  // [count, kRanges]
  Buffer<float> sums_{0};             // [kRanges, count, k]
  Buffer<float> row_scales_{0};       // [n], for ungrouped weights
  Buffer<float> column_scales_{0};    // [chunks, k], grouped weights only
  Buffer<double> column_sums_{0};     // [k], with label smoothing only
};

}  // namespace

void linear_cross_entropy(const Kernels& kernels, const CrossEntropyArgs& args, const Weight& w,
                          const CrossEntropyResult& result, const Parallel& parallel) {
  CrossEntropy(kernels, args, w, result, parallel).run();
}

void linear_cross_entropy(const CrossEntropyArgs& args, const Weight& w, const CrossEntropyResult& result,
                          const Parallel& parallel) {
  linear_cross_entropy(kernels(), args, w, result, parallel);
}

}  // namespace qk
