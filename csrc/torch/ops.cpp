// The torch operators: schemas, allocation, and the core on the CPU. Other devices, fake tensors and the
// public wrappers are in qkernels/kernels/ops.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/api.h"
#include "torch/arguments.h"

namespace {

using namespace qk::tensors;

// libtorch's own thread pool. All of it wakes, as for any operator of torch, but only as many threads as there are
// shares get one.
qk::Parallel parallel() {
  const auto run = [](int64_t shares, void (*body)(int64_t, int64_t, void*), void* context) {
    qk::FirstError error;
    torch::stable::parallel_for(0, shares, 1,
                                [&](int64_t begin, int64_t end) { error.guard([&] { body(begin, end, context); }); });
    error.rethrow();
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& x_arg, int64_t scheme_code,
                                               std::optional<Tensor> x_scale_arg) {
  const qk::Scheme scheme = qk::scheme_of(scheme_code);
  require(scheme.int_activations(), "scheme must be an a8 scheme, got ", scheme);
  FloatMatrix x("x", x_arg);
  const ActivationScale x_scale(x_scale_arg, scheme);
  Tensor q = new_tensor(x_arg, {x.rows, x.cols}, ScalarType::Char);
  Tensor scales = new_tensor(x_arg, {x.rows, scheme.act_groups(x.cols)}, ScalarType::Float);
  qk::quantize_activation(x.read(), scheme, x_scale.get(), static_cast<int8_t*>(q.mutable_data_ptr()),
                          static_cast<float*>(scales.mutable_data_ptr()), parallel());
  return {q, scales};
}

Tensor dequantize_weight(const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros, int64_t in_features,
                         int64_t scheme_code) {
  const CanonicalWeight weight(qweight, scales, zeros, in_features, qk::scheme_of(scheme_code));
  Tensor out = new_tensor(scales, {weight.get().n, in_features}, ScalarType::Float);
  qk::dequantize_weight(weight.get(), static_cast<float*>(out.mutable_data_ptr()), parallel());
  return out;
}

Tensor linear(const Tensor& x_arg, const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros,
              std::optional<Tensor> bias_arg, int64_t scheme_code, std::optional<ScalarType> out_dtype,
              std::optional<Tensor> x_scale_arg) {
  FloatMatrix x("x", x_arg);
  const CanonicalWeight weight(qweight, scales, zeros, x.cols, qk::scheme_of(scheme_code));
  const ActivationScale x_scale(x_scale_arg, weight.get().scheme);
  const ScalarType dtype = out_dtype.value_or(x_arg.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  const BiasVector bias(bias_arg, weight.get().n);
  Tensor out = new_tensor(x_arg, {x.rows, weight.get().n}, dtype);
  qk::linear(x.read(), weight.with(x_scale), bias.get(), out.mutable_data_ptr(), out_type, parallel());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_with_saved_input(const Tensor& x_arg, const Tensor& qweight,
                                                           const Tensor& scales, std::optional<Tensor> zeros,
                                                           std::optional<Tensor> bias_arg, int64_t scheme_code,
                                                           std::optional<ScalarType> out_dtype,
                                                           std::optional<Tensor> x_scale_arg) {
  FloatMatrix x("x", x_arg);
  const CanonicalWeight weight(qweight, scales, zeros, x.cols, qk::scheme_of(scheme_code));
  require(weight.get().scheme.int_activations(), "scheme must be an a8 scheme, got ", weight.get().scheme);
  const ActivationScale x_scale(x_scale_arg, weight.get().scheme);
  const ScalarType dtype = out_dtype.value_or(x_arg.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  const BiasVector bias(bias_arg, weight.get().n);
  Tensor out = new_tensor(x_arg, {x.rows, weight.get().n}, dtype);
  Tensor qx = new_tensor(x_arg, {x.rows, x.cols}, ScalarType::Char);
  Tensor x_scales = new_tensor(x_arg, {x.rows}, ScalarType::Float);
  qk::linear_with_saved_input(x.read(), weight.with(x_scale), bias.get(), out.mutable_data_ptr(), out_type,
                              static_cast<int8_t*>(qx.mutable_data_ptr()),
                              static_cast<float*>(x_scales.mutable_data_ptr()), parallel());
  return {out, qx, x_scales};
}

Tensor linear_grad_input(const Tensor& grad_arg, const Tensor& qweight, const Tensor& scales,
                         std::optional<Tensor> zeros, int64_t in_features, int64_t scheme_code,
                         std::optional<ScalarType> out_dtype) {
  const CanonicalWeight weight(qweight, scales, zeros, in_features, qk::scheme_of(scheme_code));
  FloatMatrix grad_out("grad_out", grad_arg, weight.get().n);
  const ScalarType dtype = out_dtype.value_or(grad_arg.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  Tensor out = new_tensor(grad_arg, {grad_out.rows, in_features}, dtype);
  qk::linear_grad_input(grad_out.read(), weight.get(), out.mutable_data_ptr(), out_type, parallel());
  return out;
}

Tensor column_scales(const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros, int64_t in_features,
                     int64_t scheme_code) {
  const CanonicalWeight weight(qweight, scales, zeros, in_features, qk::scheme_of(scheme_code));
  Tensor out = new_tensor(scales, {in_features}, ScalarType::Float);
  qk::column_scales(weight.get(), static_cast<float*>(out.mutable_data_ptr()), parallel());
  return out;
}

Tensor int_grad_input(const Tensor& grad_arg, const Tensor& grad_scales_arg, const Tensor& qweight,
                      const Tensor& scales, std::optional<Tensor> zeros, int64_t in_features, int64_t scheme_code,
                      std::optional<Tensor> column_scales_arg, std::optional<ScalarType> out_dtype) {
  const CanonicalWeight weight(qweight, scales, zeros, in_features, qk::scheme_of(scheme_code));
  const IntGradient args(grad_arg, grad_scales_arg, weight.get(), column_scales_arg);
  const ScalarType dtype = out_dtype.value_or(ScalarType::Float);
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  Tensor out = new_tensor(grad_arg, {args.rows().rows, in_features}, dtype);
  qk::int_grad_input(args.rows(), weight.get(), args.column_scales(), out.mutable_data_ptr(), out_type, parallel());
  return out;
}

// The streams of qkernels/formats/philox.py.
constexpr int64_t kGradInputStream = 0, kGradWeightStream = 1;

Tensor grouped_linear(const Tensor& x_arg, const Tensor& offsets_arg, const Tensor& qweight, const Tensor& scales,
                      std::optional<Tensor> zeros, std::optional<Tensor> bias_arg, int64_t scheme_code,
                      std::optional<ScalarType> out_dtype, std::optional<Tensor> rows_arg,
                      std::optional<Tensor> x_scale_arg) {
  FloatMatrix x("x", x_arg);
  const CanonicalExperts weights(qweight, scales, zeros, x.cols, qk::scheme_of(scheme_code));
  const ActivationScale x_scale(x_scale_arg, weights.get().scheme);
  const qk::ExpertWeights w = weights.with(x_scale);
  const ScalarType dtype = out_dtype.value_or(x_arg.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  const BiasVector bias(bias_arg, w.n, w.experts);
  require(!rows_arg || rows_arg->dim() == 1, "rows must be a vector, got shape ", shape_of(rows_arg.value_or(x_arg)));
  const int64_t rows = rows_arg ? rows_arg->size(0) : x.rows;
  const SourceRows index(rows_arg, x.rows, rows);
  const ExpertOffsets offsets(offsets_arg, w.experts, rows);
  Tensor out = new_tensor(x_arg, {rows, w.n}, dtype);
  qk::grouped_linear({x.read(), index.get(), offsets.get(), bias.get()}, w, out.mutable_data_ptr(), out_type,
                     parallel());
  return out;
}

Tensor grouped_linear_grad_input(const Tensor& grad_arg, const Tensor& offsets_arg, const Tensor& qweight,
                                 const Tensor& scales, std::optional<Tensor> zeros, int64_t in_features,
                                 int64_t scheme_code, std::optional<Tensor> seed, std::optional<Tensor> column_scales,
                                 std::optional<ScalarType> out_dtype) {
  const CanonicalExperts weights(qweight, scales, zeros, in_features, qk::scheme_of(scheme_code));
  const qk::ExpertWeights& w = weights.get();
  FloatMatrix grad_out("grad_out", grad_arg, w.n);
  const ExpertOffsets offsets(offsets_arg, w.experts, grad_out.rows);
  const bool by_column = seed.has_value() && !w.scheme.row_scaled();
  require(column_scales.has_value() == by_column, "column_scales ", by_column ? "is required" : "must be None",
          " for scheme ", w.scheme, seed.has_value() ? " with" : " without", " a seed");
  if (by_column) {
    check("column_scales", *column_scales, ScalarType::Float, w.experts, in_features, w.scheme, in_features);
    column_scales = readable("column_scales", *column_scales);
  }
  const qk::Random random = seed ? random_of(*seed, kGradInputStream) : qk::Random{};
  const ScalarType dtype = out_dtype.value_or(grad_arg.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  Tensor out = new_tensor(grad_arg, {grad_out.rows, in_features}, dtype);
  qk::grouped_linear_grad_input({grad_out.read(), offsets.get(), seed ? &random : nullptr}, w,
                                by_column ? static_cast<const float*>(column_scales->const_data_ptr()) : nullptr,
                                out.mutable_data_ptr(), out_type, parallel());
  return out;
}

Tensor grouped_linear_grad_weight(const Tensor& grad_arg, const Tensor& offsets_arg, const Tensor& qx_arg,
                                  const Tensor& x_scales_arg, std::optional<Tensor> rows_arg,
                                  std::optional<Tensor> seed, std::optional<ScalarType> out_dtype) {
  FloatMatrix grad_out("grad_out", grad_arg, grad_arg.dim() == 2 ? grad_arg.size(1) : 0);
  require(qx_arg.scalar_type() == ScalarType::Char && qx_arg.dim() == 2 && qx_arg.size(1) > 0,
          "qx must be a torch.int8 matrix with at least one column, got ", name_of(qx_arg.scalar_type()), " of shape ",
          shape_of(qx_arg));
  check_vector("x_scales", x_scales_arg, qx_arg.size(0));
  const int64_t sources = qx_arg.size(0), in_features = qx_arg.size(1);
  const SourceRows rows(rows_arg, sources, grad_out.rows);
  require(offsets_arg.dim() == 1, "offsets must be a vector, got shape ", shape_of(offsets_arg));
  const ExpertOffsets offsets(offsets_arg, offsets_arg.size(0), grad_out.rows);
  const qk::Random random = seed ? random_of(*seed, kGradWeightStream) : qk::Random{};
  const ScalarType dtype = out_dtype.value_or(grad_arg.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  const Tensor qx = readable("qx", qx_arg), x_scales = readable("x_scales", x_scales_arg);
  Tensor out = new_tensor(grad_arg, {offsets.get().experts, grad_out.cols, in_features}, dtype);
  const qk::QuantizedRows x = {static_cast<const int8_t*>(qx.const_data_ptr()),
                               static_cast<const float*>(x_scales.const_data_ptr()), sources, in_features};
  qk::grouped_linear_grad_weight({grad_out.read(), offsets.get(), seed ? &random : nullptr}, x, rows.get(),
                                 out.mutable_data_ptr(), out_type, parallel());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& hidden_arg, const Tensor& target_arg,
                                                        const Tensor& qweight, const Tensor& scales,
                                                        std::optional<Tensor> zeros, std::optional<Tensor> bias_arg,
                                                        int64_t scheme_code, std::optional<Tensor> dither_arg,
                                                        std::optional<Tensor> x_scale_arg, double softcap,
                                                        double z_loss, double label_smoothing, int64_t ignore_index) {
  FloatMatrix hidden("hidden", hidden_arg);
  const int64_t rows = hidden.rows;
  const CanonicalWeight weight(qweight, scales, zeros, hidden.cols, qk::scheme_of(scheme_code));
  const ActivationScale x_scale(x_scale_arg, weight.get().scheme);
  const int64_t n = weight.get().n;
  require(softcap == 0 || label_smoothing == 0, "softcap must be 0 with label_smoothing, got ", softcap, " and ",
          label_smoothing);
  require(softcap == 0 || softcap >= 0x1p-126, "softcap must be 0 or at least 2^-126, got ", softcap);
  require(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be in [0, 1], got ", label_smoothing);
  require(std::isfinite(z_loss), "z_loss must be finite, got ", z_loss);
  const float cap = static_cast<float>(softcap);
  const BiasVector bias(bias_arg, n);
  Tensor target = target_arg;
  qk::CrossEntropyArgs args{.hidden = {},
                            .target = int64_vector("target", target, rows),
                            .bias = bias.get(),
                            .dither = dither_arg ? int64_vector("dither", *dither_arg, rows) : nullptr,
                            .softcap = std::isinf(cap) ? 0.0f : cap,
                            .z_loss = z_loss,
                            .label_smoothing = label_smoothing,
                            .ignore_index = ignore_index};
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t t = args.target[m];
    require((t >= 0 && t < n) || t == ignore_index, "target must be in [0, ", n, ") or ", ignore_index,
            " (ignore_index), got ", t, " at position ", m);
  }
  args.hidden = hidden.read();
  const bool gradient = dither_arg.has_value();
  Tensor loss = new_tensor(hidden_arg, {rows}, ScalarType::Float);
  Tensor lse = new_tensor(hidden_arg, {rows}, ScalarType::Float);
  Tensor grad = new_tensor(hidden_arg, {gradient ? rows : 0, hidden.cols}, ScalarType::Float);
  const auto floats = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  qk::linear_cross_entropy(args, weight.with(x_scale), {floats(loss), floats(lse), gradient ? floats(grad) : nullptr},
                           parallel());
  return {loss, lse, grad};
}

// The 11 integers of a convolution's geometry (ConvGeometry in qkernels/kernels/arguments.py), checked against its x.
qk::ConvGeometry geometry_of(const Tensor& x, const std::vector<int64_t>& values) {
  require(values.size() == 11, "geometry must be 11 integers, got ", values.size());
  const qk::ConvGeometry g = {values[0], values[1], values[2], values[3], values[4], values[5],
                              values[6], values[7], values[8], values[9], values[10]};
  const auto from = [](int64_t least, const char* name, int64_t value) {
    require(value >= least && value <= INT32_MAX, name, " must be in [", least, ", 2147483647], got ", value);
  };
  from(1, "kernel_height", g.kernel_height), from(1, "kernel_width", g.kernel_width);
  from(1, "stride_height", g.stride_height), from(1, "stride_width", g.stride_width);
  from(1, "dilation_height", g.dilation_height), from(1, "dilation_width", g.dilation_width);
  from(0, "left", g.left), from(0, "right", g.right), from(0, "top", g.top), from(0, "bottom", g.bottom);
  from(1, "groups", g.groups);
  require(x.size(3) % g.groups == 0, "x must have a multiple of groups = ", g.groups, " channels, got shape ",
          shape_of(x));
  // In floats, which do not overflow; what follows then does not either.
  const auto size = [&](int dim, int64_t zeros) { return std::max(1.0, static_cast<double>(x.size(dim)) + zeros); };
  require(size(0, 0) * size(1, g.top + g.bottom) * size(2, g.left + g.right) * size(3, 0) <= 0x1p60,
          "x must have at most 2^60 values with its padding, got shape ", shape_of(x));
  const bool fits = g.top + x.size(1) + g.bottom > g.dilation_height * (g.kernel_height - 1) &&
                    g.left + x.size(2) + g.right > g.dilation_width * (g.kernel_width - 1);
  require(fits, "the dilated kernel must fit into the padded x, got shape ", shape_of(x));
  return g;
}

// Images [batch, height, width, channels] as they lie in memory: channels last or first. Other strides are copied.
qk::Images images_of(Tensor& x) {
  const qk::DType dtype = dtype_of("x", x.scalar_type());
  const int64_t height = x.size(1), width = x.size(2), channels = x.size(3);
  const auto dense = [&](int64_t dim, int64_t stride) { return x.size(dim) <= 1 || x.stride(dim) == stride; };
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % element_size(x.scalar_type()) == 0;
  const bool channels_first = aligned && dense(2, 1) && dense(1, width) && dense(3, height * width) &&
                              dense(0, channels * height * width) && !x.is_contiguous();
  if (!channels_first) x = readable("x", x);
  return {x.const_data_ptr(), dtype, x.size(0), height, width, channels, channels_first};
}

Tensor conv(const Tensor& x_arg, const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros,
            std::optional<Tensor> bias_arg, int64_t scheme_code, std::vector<int64_t> geometry_arg,
            std::optional<ScalarType> out_dtype, std::optional<Tensor> x_scale_arg) {
  const qk::Scheme scheme = qk::scheme_of(scheme_code);
  dtype_of("x", x_arg.scalar_type());
  require(x_arg.dim() == 4 && x_arg.size(1) > 0 && x_arg.size(2) > 0,
          "x must be images [N, H, W, C] that are not empty, got shape ", shape_of(x_arg));
  const qk::ConvGeometry geometry = geometry_of(x_arg, geometry_arg);
  require(scheme.act_group_size == 0, "scheme must have no activation groups for a convolution, got ", scheme);
  const int64_t patch = geometry.kernel_height * geometry.kernel_width * (x_arg.size(3) / geometry.groups);
  const CanonicalWeight weight(qweight, scales, zeros, patch, scheme);
  const ActivationScale x_scale(x_scale_arg, scheme);
  require(weight.get().n % geometry.groups == 0, "qweight must have a multiple of groups = ", geometry.groups,
          " rows, got shape ", shape_of(qweight));
  const ScalarType dtype = out_dtype.value_or(x_arg.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  const BiasVector bias(bias_arg, weight.get().n);
  Tensor x = x_arg;
  const qk::Images images = images_of(x);
  const int64_t height = geometry.out_height(images.height), width = geometry.out_width(images.width);
  Tensor out = new_tensor(x_arg, {images.batch, height, width, weight.get().n}, dtype);
  qk::conv(images, geometry, weight.with(x_scale), bias.get(), out.mutable_data_ptr(), out_type, parallel());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> quantize_weight(const Tensor& weight_arg, int64_t scheme_code) {
  const qk::Scheme scheme = qk::scheme_of(scheme_code);
  FloatMatrix weight("weight", weight_arg);
  const int64_t n = weight.rows, groups = scheme.weight_groups(weight.cols);
  Tensor qweight = new_tensor(weight_arg, {n, scheme.packed_features(weight.cols)}, storage_type(scheme));
  Tensor scales = new_tensor(weight_arg, {n, groups}, ScalarType::Float);
  Tensor zeros = new_tensor(weight_arg, {n, scheme.symmetric() ? 0 : groups}, zeros_type(scheme));
  void* const zero_data = scheme.symmetric() ? nullptr : zeros.mutable_data_ptr();
  const bool finite = qk::quantize_weight(weight.read(), scheme, qweight.mutable_data_ptr(),
                                          static_cast<float*>(scales.mutable_data_ptr()), zero_data, parallel());
  require(finite, "weight must be finite, and so must be the range of each group, got NaN or Inf");
  return {qweight, scales, zeros};
}

Tensor mask_clipped(const Tensor& grad_arg, const Tensor& weight_arg, int64_t scheme_code) {
  const qk::Scheme scheme = qk::scheme_of(scheme_code);
  require(scheme.weight->bits == 4 && !scheme.has_min(), "scheme must be a w4 scheme without minima, got ", scheme);
  FloatMatrix weight("weight", weight_arg);
  FloatMatrix grad("grad", grad_arg, weight.cols);
  require(grad.rows == weight.rows, "grad must have ", weight.rows, " rows, got shape ", shape_of(grad_arg));
  Tensor out = new_tensor(grad_arg, {weight.rows, weight.cols}, grad_arg.scalar_type());
  qk::mask_clipped(grad.read(), weight.read(), scheme, out.mutable_data_ptr(), parallel());
  return out;
}

// The scales [N, groups] of a symmetric scheme, contiguous; keeps the tensor alive.
class GivenScales {
 public:
  GivenScales(const Tensor& scales, const FloatMatrix& weight, int64_t scheme_code)
      : scheme_(qk::scheme_of(scheme_code)), scales_(scales) {
    require(scheme_.symmetric(), "scheme must be symmetric, got ", scheme_);
    check("scales", scales, ScalarType::Float, weight.rows, scheme_.weight_groups(weight.cols), scheme_, weight.cols);
    scales_ = readable("scales", scales);
  }

  const qk::Scheme& scheme() const { return scheme_; }
  const float* get() const { return static_cast<const float*>(scales_.const_data_ptr()); }

 private:
  qk::Scheme scheme_;
  Tensor scales_;
};

Tensor quantize_weight_scaled(const Tensor& weight_arg, const Tensor& scales_arg, int64_t scheme_code) {
  FloatMatrix weight("weight", weight_arg);
  const GivenScales scales(scales_arg, weight, scheme_code);
  const qk::Scheme& scheme = scales.scheme();
  Tensor qweight = new_tensor(weight_arg, {weight.rows, scheme.packed_features(weight.cols)}, storage_type(scheme));
  require(qk::quantize_weight_scaled(weight.read(), scales.get(), scheme, qweight.mutable_data_ptr(), parallel()),
          "weight and scales must be finite, got NaN or Inf");
  return qweight;
}

std::tuple<Tensor, Tensor> scale_gradient(const Tensor& grad_arg, const Tensor& weight_arg, const Tensor& scales_arg,
                                          int64_t scheme_code) {
  FloatMatrix weight("weight", weight_arg);
  FloatMatrix grad("grad", grad_arg, weight.cols);
  require(grad.rows == weight.rows, "grad must have ", weight.rows, " rows, got shape ", shape_of(grad_arg));
  const GivenScales scales(scales_arg, weight, scheme_code);
  Tensor out = new_tensor(grad_arg, {weight.rows, weight.cols}, grad_arg.scalar_type());
  Tensor grad_scales =
      new_tensor(weight_arg, {weight.rows, scales.scheme().weight_groups(weight.cols)}, ScalarType::Float);
  qk::scale_gradient(grad.read(), weight.read(), scales.get(), scales.scheme(), out.mutable_data_ptr(),
                     static_cast<float*>(grad_scales.mutable_data_ptr()), parallel());
  return {out, grad_scales};
}

std::tuple<Tensor, Tensor> quantize_rows_stochastic(const Tensor& x_arg, std::optional<Tensor> column_factors,
                                                    const Tensor& seed, int64_t rng_stream) {
  FloatMatrix x("x", x_arg);
  const float* const factors = factors_of("column_factors", column_factors, x.cols);
  Tensor q = new_tensor(x_arg, {x.rows, x.cols}, ScalarType::Char);
  Tensor scales = new_tensor(x_arg, {x.rows}, ScalarType::Float);
  qk::quantize_rows_stochastic(x.read(), factors, random_of(seed, rng_stream),
                               static_cast<int8_t*>(q.mutable_data_ptr()),
                               static_cast<float*>(scales.mutable_data_ptr()), parallel());
  return {q, scales};
}

std::tuple<Tensor, Tensor> quantize_columns_stochastic(const Tensor& x_arg, std::optional<Tensor> row_factors,
                                                       const Tensor& seed, int64_t rng_stream) {
  FloatMatrix x("x", x_arg);
  const float* const factors = factors_of("row_factors", row_factors, x.rows);
  Tensor q = new_tensor(x_arg, {x.cols, x.rows}, ScalarType::Char);
  Tensor scales = new_tensor(x_arg, {x.cols}, ScalarType::Float);
  qk::quantize_columns_stochastic(x.read(), factors, random_of(seed, rng_stream),
                                  static_cast<int8_t*>(q.mutable_data_ptr()),
                                  static_cast<float*>(scales.mutable_data_ptr()), parallel());
  return {q, scales};
}

STABLE_TORCH_LIBRARY(qkernels, m) {
  m.def("quantize_activation(Tensor x, int scheme, Tensor? x_scale=None) -> (Tensor, Tensor)");
  m.def("dequantize_weight(Tensor qweight, Tensor scales, Tensor? zeros, int in_features, int scheme) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int scheme, "
      "ScalarType? out_dtype=None, Tensor? x_scale=None) -> Tensor");
  m.def(
      "linear_with_saved_input(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int scheme, "
      "ScalarType? out_dtype=None, Tensor? x_scale=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "grouped_linear(Tensor x, Tensor offsets, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
      "int scheme, ScalarType? out_dtype=None, Tensor? rows=None, Tensor? x_scale=None) -> Tensor");
  m.def(
      "grouped_linear_grad_input(Tensor grad_out, Tensor offsets, Tensor qweight, Tensor scales, Tensor? zeros, "
      "int in_features, int scheme, Tensor? seed=None, Tensor? column_scales=None, *, ScalarType? out_dtype=None) -> "
      "Tensor");
  m.def(
      "grouped_linear_grad_weight(Tensor grad_out, Tensor offsets, Tensor qx, Tensor x_scales, Tensor? rows=None, "
      "Tensor? seed=None, *, ScalarType? out_dtype=None) -> Tensor");
  m.def("grouped_outer(Tensor grad_out, Tensor offsets, Tensor x, Tensor? rows=None) -> Tensor");
  m.def(
      "conv(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int scheme, int[] geometry, "
      "ScalarType? out_dtype=None, Tensor? x_scale=None) -> Tensor");
  m.def("quantize_weight(Tensor weight, int scheme) -> (Tensor, Tensor, Tensor)");
  m.def("mask_clipped(Tensor grad, Tensor weight, int scheme) -> Tensor");
  m.def("quantize_weight_scaled(Tensor weight, Tensor scales, int scheme) -> Tensor");
  m.def("scale_gradient(Tensor grad, Tensor weight, Tensor scales, int scheme) -> (Tensor, Tensor)");
  m.def(
      "linear_grad_input(Tensor grad_out, Tensor qweight, Tensor scales, Tensor? zeros, int in_features, int scheme, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def("quantize_rows_stochastic(Tensor x, Tensor? column_factors, Tensor seed, int rng_stream) -> (Tensor, Tensor)");
  m.def("quantize_columns_stochastic(Tensor x, Tensor? row_factors, Tensor seed, int rng_stream) -> (Tensor, Tensor)");
  m.def("column_scales(Tensor qweight, Tensor scales, Tensor? zeros, int in_features, int scheme) -> Tensor");
  m.def(
      "int_grad_input(Tensor q_grad, Tensor grad_scales, Tensor qweight, Tensor scales, Tensor? zeros, "
      "int in_features, int scheme, Tensor? column_scales=None, *, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor target, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
      "int scheme, Tensor? dither=None, Tensor? x_scale=None, *, float softcap=0.0, float z_loss=0.0, float "
      "label_smoothing=0.0, "
      "int ignore_index=-100) -> (Tensor loss, Tensor lse, Tensor grad_hidden)");
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("dequantize_weight", TORCH_BOX(&dequantize_weight));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
  m.impl("linear_with_saved_input", TORCH_BOX(&linear_with_saved_input));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("grouped_linear_grad_input", TORCH_BOX(&grouped_linear_grad_input));
  m.impl("grouped_linear_grad_weight", TORCH_BOX(&grouped_linear_grad_weight));
  m.impl("conv", TORCH_BOX(&conv));
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("mask_clipped", TORCH_BOX(&mask_clipped));
  m.impl("quantize_weight_scaled", TORCH_BOX(&quantize_weight_scaled));
  m.impl("scale_gradient", TORCH_BOX(&scale_gradient));
  m.impl("quantize_rows_stochastic", TORCH_BOX(&quantize_rows_stochastic));
  m.impl("quantize_columns_stochastic", TORCH_BOX(&quantize_columns_stochastic));
  m.impl("column_scales", TORCH_BOX(&column_scales));
  m.impl("int_grad_input", TORCH_BOX(&int_grad_input));
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
}

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// Importing the module loads the library, whose static initializers register the operators.
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
