// Computes deterministic cases of every scheme with the core alone, so that an instruction set can be checked where
// torch does not run (under qemu, on another architecture).
//
//     core_check [--isa NAME] [--threads N]   one line a case, after the line "isa NAME"; NAME defaults to what the
//     core
//                                             detects, N to 1
//     core_check --list                       the compiled and the supported ISAs
//
// Every case is computed by the scalar kernels too. Results that do not depend on the ISA must have the same bits;
// their line ends with "= <checksum>", which is the same on every machine. Results summed in float must lie within the
// bound of two such sums; their line tells how much of it was used. Exits with 1 if any case fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "core_cases.h"
#include "cpu/api.h"
#include "cpu/isa.h"
#include "guarded.h"
#include "guarded_scratch.h"

namespace {

using qk::DType;

// Threads of one call, a share each.
void run_threads(int64_t shares, void (*body)(int64_t begin, int64_t end, void* context), void* context) {
  std::vector<std::thread> started;
  for (int64_t share = 1; share < shares; ++share) started.emplace_back(body, share, share + 1, context);
  body(0, 1, context);
  for (std::thread& thread : started) thread.join();
}

qk::Parallel threads = {1, run_threads};

std::vector<std::string> scheme_names() {
  std::vector<std::string> names;
  for (const char* format : {"w8a8", "w8a16", "w4a8", "w4a16"}) {
    for (const char* group : {"", "-g16", "-g32", "-g64", "-g128"}) {
      for (const char* zeros : {"", "-asym", "-min"}) {
        for (const char* act_group : {"", "-ag32", "-ag64", "-ag128"}) {
          const std::string name = std::string(format) + group + zeros + act_group;
          const bool four_bits = format[1] == '4', int_activations = name.find("a8") == 2;
          if (four_bits && std::strcmp(group, "-g16") == 0) continue;
          if (!four_bits && std::strcmp(zeros, "-asym") == 0) continue;
          // Minima are added to what the codes give, whatever their groups.
          if (std::strcmp(zeros, "-min") == 0 && std::strcmp(group, "-g32") > 0) continue;
          if (*act_group == 0 || int_activations) names.push_back(name);
        }
      }
    }
  }
  return names;
}

void check_scheme(Checker& checker, const std::string& scheme_name, const Shape& shape) {
  const int64_t m = shape.m, n = shape.n, k = shape.k;
  const DType x_dtype = shape.x, out_dtype = shape.out;
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  const bool exact = scheme.int_activations();
  const std::string sizes = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  const auto label = [&](const char* op, DType out) {
    return scheme_name + " " + op + " " + sizes + " " + name_of(x_dtype) + " -> " + name_of(out);
  };
  Random random(scheme_name + sizes);
  const Input x(m, k, x_dtype, random, exact), grad_out(m, n, x_dtype, random, false),
      bias(1, n, x_dtype, random, false);
  const StoredWeight stored(scheme, n, k, random);
  const qk::Weight weight = stored.weight();

  checker.exact(scheme_name + " dequantize_weight " + sizes, n * k, DType::float32,
                [&](void* out) { qk::dequantize_weight(weight, static_cast<float*>(out), threads); });
  std::vector<float> w(n * k);
  qk::dequantize_weight(weight, w.data(), threads);

  const auto linear = [&](DType dtype) {
    return [&, dtype](void* out) { qk::linear(x.matrix(), weight, {bias.data.get(), x_dtype}, out, dtype, threads); };
  };
  if (exact) {
    checker.exact(label("linear", out_dtype), m * n, out_dtype, linear(out_dtype));
  } else {
    const std::vector<double> x_norms = norms(x.values, m, k, true), w_norms = norms(w, n, k, true);
    std::vector<double> bounds;
    for (int64_t i = 0; i < m * n; ++i) {
      bounds.push_back(float_bound(x_dtype, false, k, x_norms[i / n] * w_norms[i % n] + std::fabs(bias.values[i % n])));
    }
    const bool bf16 = x_dtype == DType::bfloat16 && m > 4;
    checker.within(label("linear", DType::float32), bounds, bf16, linear(DType::float32));
  }

  const std::vector<double> grad_norms = norms(grad_out.values, m, n, true), w_norms = norms(w, n, k, false);
  std::vector<double> bounds;
  for (int64_t i = 0; i < m * k; ++i)
    bounds.push_back(float_bound(x_dtype, true, n, grad_norms[i / k] * w_norms[i % k]));
  checker.within(label("linear_grad_input", DType::float32), bounds, x_dtype == DType::bfloat16,
                 [&](void* out) { qk::linear_grad_input(grad_out.matrix(), weight, out, DType::float32, threads); });
}

// The gradient from integers.
void check_int_gradient(Checker& checker, const std::string& scheme_name, const Shape& shape) {
  const int64_t m = shape.m, n = shape.n, k = shape.k;
  const DType out_dtype = shape.out;
  const std::string sizes = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  Random random("gradient " + scheme_name + sizes);
  const StoredWeight stored(qk::parse_scheme(scheme_name), n, k, random);
  const qk::Weight weight = stored.weight();
  Guarded<int8_t> q(m * n);
  Guarded<float> scales(m), column_scales(k);
  for (int64_t i = 0; i < m * n; ++i) q[i] = static_cast<int8_t>(random.integer(-127, 127));
  for (int64_t i = 0; i < m; ++i) scales[i] = i % 7 == 5 ? NAN : random.unit(DType::float32);

  const auto columns = [&](void* out) { qk::column_scales(weight, static_cast<float*>(out), threads); };
  checker.exact(scheme_name + " column_scales " + sizes, k, DType::float32, columns);
  columns(column_scales.get());
  const float* const used = !stored.scheme.row_scaled() ? column_scales.get() : nullptr;
  checker.exact(scheme_name + " int_grad_input " + sizes + " -> " + name_of(out_dtype), m * k, out_dtype,
                [&, out_dtype = out_dtype](void* out) {
                  qk::int_grad_input({q.get(), scales.get(), m, n}, weight, used, out, out_dtype, threads);
                });
}

// Experts of 0, m, 1 and 3 rows, and a row of none: the forward of integers and the gradients from them. Each row is
// made of another row of x.
void check_experts(Checker& checker, const std::string& scheme_name, const Shape& shape) {
  const int64_t m = shape.m, n = shape.n, k = shape.k;
  const int64_t ends[] = {0, m, m + 1, m + 4}, rows = m + 5, count = std::size(ends);
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  Random random("experts " + scheme_name);
  const Input x(m, k, shape.x, random, true), bias(count, n, shape.x, random, false);
  const Input grad_out(rows, n, shape.x, random, false);
  const StoredWeight stored(scheme, count * n, k, random);
  const qk::Weight all = stored.weight();
  const qk::ExpertWeights weights = {scheme, count, n, k, all.qweight, all.scales, stored.third()};
  Guarded<int64_t> index(rows);
  for (int64_t i = 0; i < rows; ++i) index[i] = m - 1 - i % m;
  const qk::ExpertRows experts = {ends, count, rows};
  const std::string label = scheme_name + " experts " + std::to_string(m) + "x" + std::to_string(n) + "x" +
                            std::to_string(k) + " " + name_of(shape.x) + " -> " + name_of(shape.out);
  if (scheme.int_activations()) {
    checker.exact(label, rows * n, shape.out, [&](void* out) {
      const qk::GroupedLinearArgs args = {x.matrix(), index.get(), experts, {bias.data.get(), shape.x}};
      qk::grouped_linear(args, weights, out, shape.out, threads);
    });
  }
  Guarded<float> columns(count * k), x_scales(m);
  Guarded<int8_t> qx(m * k);
  for (int64_t e = 0; e < count; ++e) qk::column_scales(weights[e], &columns[e * k], threads);
  const qk::Random bits = {0x123456789abcdef0, 0};
  const qk::GroupedGradient gradient = {grad_out.matrix(), experts, &bits};
  checker.exact(label + ", gradient of x", rows * k, shape.out, [&](void* out) {
    const float* const used = !scheme.row_scaled() ? columns.get() : nullptr;
    qk::grouped_linear_grad_input(gradient, weights, used, out, shape.out, threads);
  });
  for (int64_t i = 0; i < m * k; ++i) qx[i] = static_cast<int8_t>(random.integer(-127, 127));
  for (int64_t i = 0; i < m; ++i) x_scales[i] = random.unit(DType::float32);
  checker.exact(label + ", gradient of the weights", count * n * k, shape.out, [&](void* out) {
    const qk::QuantizedRows saved = {qx.get(), x_scales.get(), m, k};
    qk::grouped_linear_grad_weight(gradient, saved, index.get(), out, shape.out, threads);
  });
}

void check_activations(Checker& checker, const std::string& scheme_name, const Shape& shape) {
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  Random random("activations");
  const Input x(shape.m, shape.k, shape.x, random, true);
  const std::string label = scheme_name + " quantize_activation " + std::to_string(shape.m) + "x" +
                            std::to_string(shape.k) + " " + name_of(shape.x);
  const int64_t groups = shape.m * scheme.act_groups(shape.k), integers = shape.m * shape.k;
  // Both outputs as floats: the scales, then the integers.
  checker.exact(label, groups + integers, DType::float32, [&](void* out) {
    Guarded<int8_t> q(integers);
    auto* floats = static_cast<float*>(out);
    const float x_scale = 0.02f;
    qk::quantize_activation(x.matrix(), scheme, scheme.static_activations ? &x_scale : nullptr, q.get(), floats,
                            threads);
    for (int64_t i = 0; i < integers; ++i) floats[groups + i] = q[i];
  });
}

// What training quantizes; integers follow the scales as floats.
void check_stochastic(Checker& checker, const Shape& shape, bool columns) {
  const int64_t rows = shape.m, cols = shape.k, results = columns ? cols : rows;
  Random random("stochastic");
  const Input x(rows, cols, shape.x, random, true);
  Guarded<float> factors(columns ? rows : cols);
  for (int64_t i = 0; i < (columns ? rows : cols); ++i) factors[i] = random.unit(DType::float32);
  const std::string label = std::string(columns ? "quantize_columns_stochastic " : "quantize_rows_stochastic ") +
                            std::to_string(rows) + "x" + std::to_string(cols) + " " + name_of(shape.x);
  checker.exact(label, results + rows * cols, DType::float32, [&](void* out) {
    Guarded<int8_t> q(rows * cols);
    auto* floats = static_cast<float*>(out);
    const auto quantize = columns ? qk::quantize_columns_stochastic : qk::quantize_rows_stochastic;
    quantize(x.matrix(), factors.get(), {0x123456789abcdef0, 7}, q.get(), floats, threads);
    for (int64_t i = 0; i < rows * cols; ++i) floats[results + i] = q[i];
  });
}

// Scales, zero points, bytes, and, of 4 bits, the gradient that is not masked.
void check_quantized_weight(Checker& checker, const std::string& scheme_name, const Shape& shape) {
  const int64_t n = shape.n, k = shape.k;
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  Random random("weight");
  const Input w(n, k, shape.x, random, false);
  const int64_t groups = n * scheme.weight_groups(k), bytes = n * scheme.packed_features(k);
  const bool masked = scheme.weight->bits == 4 && !scheme.has_min();
  const std::string label = scheme_name + " quantize_weight " + std::to_string(n) + "x" + std::to_string(k);
  checker.exact(label, 2 * groups + bytes + (masked ? n * k : 0), DType::float32, [&](void* out) {
    Guarded<uint8_t> q(bytes), zeros(groups);
    auto* floats = static_cast<float*>(out);
    for (int64_t g = 0; g < groups; ++g) zeros[g] = 0;
    void* const points = scheme.symmetric() ? nullptr : zeros.get();
    qk::quantize_weight(w.matrix(), scheme, q.get(), floats, scheme.has_min() ? floats + groups : points, threads);
    for (int64_t g = 0; g < groups && !scheme.has_min(); ++g) floats[groups + g] = zeros[g];
    for (int64_t i = 0; i < bytes; ++i) floats[2 * groups + i] = q[i];
    if (!masked) return;
    Guarded<float> grad(n * k), clipped(n * k);
    for (int64_t i = 0; i < n * k; ++i) grad[i] = 1.0f;
    qk::mask_clipped({grad.get(), DType::float32, n, k}, w.matrix(), scheme, clipped.get(), threads);
    std::memcpy(floats + 2 * groups + bytes, clipped.get(), n * k * sizeof(float));
  });
}

// linear_with_saved_input: its result, the scales and the integers of x.
void check_saving(Checker& checker, const std::string& scheme_name, const Shape& shape) {
  const int64_t m = shape.m, n = shape.n, k = shape.k;
  const DType x_dtype = shape.x;
  Random random("saving " + scheme_name);
  const Input x(m, k, x_dtype, random, true);
  const StoredWeight stored(qk::parse_scheme(scheme_name), n, k, random);
  const qk::Weight weight = stored.weight();
  const std::string label =
      scheme_name + " linear_with_saved_input " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  checker.exact(label, m * n + m + m * k, DType::float32, [&, m = m, n = n, k = k](void* out) {
    Guarded<int8_t> q(m * k);
    auto* floats = static_cast<float*>(out);
    qk::linear_with_saved_input(x.matrix(), weight, {nullptr, DType::float32}, floats, DType::float32, q.get(),
                                floats + m * n, threads);
    for (int64_t i = 0; i < m * k; ++i) floats[m * n + m + i] = q[i];
  });
}

// Scales that clamp some values: the bytes, and the gradients of weight and scales.
void check_given_scales(Checker& checker, const std::string& scheme_name, const Shape& shape) {
  const int64_t n = shape.n, k = shape.k;
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  if (!scheme.symmetric()) return;
  Random random("given scales");
  const Input w(n, k, shape.x, random, false), grad(n, k, DType::float32, random, false);
  const int64_t groups = n * scheme.weight_groups(k), bytes = n * scheme.packed_features(k);
  const std::string label = scheme_name + " given scales " + std::to_string(n) + "x" + std::to_string(k);
  checker.exact(label, n * k + groups + bytes, DType::float32, [&](void* out) {
    Guarded<uint8_t> q(bytes);
    Guarded<float> scales(groups);
    auto* floats = static_cast<float*>(out);
    qk::quantize_weight(w.matrix(), scheme, q.get(), scales.get(), nullptr, threads);
    for (int64_t g = 0; g < groups; ++g) scales[g] *= 0.7f;
    qk::quantize_weight_scaled(w.matrix(), scales.get(), scheme, q.get(), threads);
    qk::scale_gradient(grad.matrix(), w.matrix(), scales.get(), scheme, floats, floats + n * k, threads);
    for (int64_t i = 0; i < bytes; ++i) floats[n * k + groups + i] = q[i];
  });
}

// The longest sum there is, of the largest products: 131072 * 127 * 128 < 2^31, with any shift in between.
void check_longest_sum(Checker& checker, int64_t m) {
  constexpr int64_t n = 3, k = qk::kMaxReduction;
  Random random("longest sum");
  Input x(m, k, DType::float32, random, false);
  for (int64_t i = 0; i < m * k; ++i) x.set(i, i / k % 2 == 0 ? 1.0f : -1.0f);
  StoredWeight stored(qk::parse_scheme("w8a8"), n, k, random);
  for (int64_t i = 0; i < n * k; ++i) stored.qweight[i] = static_cast<uint8_t>(i / k % 2 == 0 ? 127 : -128);
  const qk::Weight weight = stored.weight();
  checker.exact("w8a8 linear, longest sum, " + std::to_string(m) + " rows", m * n, DType::float32, [&](void* out) {
    qk::linear(x.matrix(), weight, {nullptr, DType::float32}, out, DType::float32, threads);
  });
}

// The same for the gradient.
void check_longest_gradient_sum(Checker& checker) {
  constexpr int64_t m = 3, n = qk::kMaxReduction, k = 3;
  Random random("longest gradient sum");
  StoredWeight stored(qk::parse_scheme("w8a8"), n, k, random);
  for (int64_t i = 0; i < n * k; ++i) stored.qweight[i] = static_cast<uint8_t>(i % k == 1 ? -128 : 127);
  Guarded<int8_t> q(m * n);
  Guarded<float> scales(m);
  for (int64_t i = 0; i < m * n; ++i) q[i] = i / n == 1 ? -127 : 127;
  for (int64_t i = 0; i < m; ++i) scales[i] = 1.0f;
  const qk::Weight weight = stored.weight();
  checker.exact("w8a8 int_grad_input, longest sum", m * k, DType::float32, [&](void* out) {
    qk::int_grad_input({q.get(), scales.get(), m, n}, weight, nullptr, out, DType::float32, threads);
  });
}

// Three chunks of the vocabulary, the last one ragged; with and without soft-capping.
void check_cross_entropy(Checker& checker, const std::string& scheme_name) {
  constexpr int64_t m = 5, n = 2100, k = 70;
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  if (!scheme.int_activations()) return;
  Random random("cross entropy " + scheme_name);
  const Input x(m, k, DType::float32, random, false);
  StoredWeight stored(scheme, n, k, random);
  const qk::Weight weight = stored.weight();
  const std::vector<int64_t> target = {0, 1023, -100, 1024, n - 1}, dither = {0, 1, 2, 0xffffffff, 0x12345678};
  for (const float softcap : {0.0f, 3.0f}) {
    const qk::CrossEntropyArgs args{.hidden = x.matrix(),
                                    .target = target.data(),
                                    .bias = {nullptr, DType::float32},
                                    .dither = dither.data(),
                                    .softcap = softcap,
                                    .z_loss = 0.01,
                                    .label_smoothing = softcap == 0.0f ? 0.1 : 0.0,
                                    .ignore_index = -100};
    const std::string label = scheme_name + " linear_cross_entropy" + (softcap == 0.0f ? "" : ", soft-capped");
    checker.exact(label, m * (k + 2), DType::float32, [&](void* out) {
      auto* floats = static_cast<float*>(out);
      qk::linear_cross_entropy(args, weight, {floats, floats + m, floats + 2 * m}, threads);
    });
  }
}

int check() {
  const std::string isa = qk::current_isa();
  std::printf("isa %s\n", isa.c_str());
  Checker checker(isa);
  for (const char* scheme : {"w8a8", "w8a8-ag32", "w8a8-ag64", "w8a8-ag128", "w8a8s"}) {
    for (const Shape& shape : kShapes) check_activations(checker, scheme, shape);
  }
  for (const std::string& scheme : scheme_names()) {
    for (const Shape& shape : kShapes) check_scheme(checker, scheme, shape);
    for (const Shape& shape : kShapes) check_int_gradient(checker, scheme, shape);
    check_cross_entropy(checker, scheme);
  }
  for (const Shape& shape : kShapes) {
    for (const bool columns : {false, true}) check_stochastic(checker, shape, columns);
    for (const char* scheme : {"w8a8", "w8a8-g32", "w4a8", "w4a8-g32-asym", "w4a8-g32-min", "w8a8-min"}) {
      check_quantized_weight(checker, scheme, shape);
      check_given_scales(checker, scheme, shape);
    }
    for (const char* scheme : {"w8a8", "w4a8", "w8a16", "w4a8-g32-asym-ag64", "w4a8-g32-min"})
      check_experts(checker, scheme, shape);
    for (const char* scheme : {"w8a8", "w4a8-asym-ag32", "w4a8-g64"}) check_saving(checker, scheme, shape);
  }
  for (const int64_t rows : {2, 6}) check_longest_sum(checker, rows);
  check_longest_gradient_sum(checker);
  return checker.failed() ? 1 : 0;
}

void print(const char* title, const std::vector<std::string>& names) {
  std::printf("%s", title);
  for (const std::string& name : names) std::printf(" %s", name.c_str());
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) try {
  const std::vector<std::string_view> args(argv + 1, argv + argc);
  if (args.size() == 1 && args[0] == "--list") {
    print("compiled", qk::compiled_isas());
    print("supported", qk::supported_isas());
    return 0;
  }
  for (size_t i = 0; i < args.size(); i += 2) {
    if (i + 1 < args.size() && args[i] == "--isa") {
      qk::force_isa(std::string(args[i + 1]));
    } else if (i + 1 < args.size() && args[i] == "--threads") {
      threads.num_threads = std::stoi(std::string(args[i + 1]));
    } else {
      std::fprintf(stderr, "usage: core_check [--isa NAME] [--threads N] | --list\n");
      return 2;
    }
  }
  return check();
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
