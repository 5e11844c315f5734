// The torch operators: schemas, checks, allocation, and the core on the CPU. Other devices, fake tensors and the
// public wrappers are in qkernels/ops.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/api.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Written only when a message is: formatting the shapes of every call would take longer than a small product.
struct ShapeOf {
  const Tensor& tensor;
};

std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  out << "[";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i != 0 ? ", " : "") << shape.tensor.size(i);
  return out << "]";
}

ShapeOf shape_of(const Tensor& t) { return {t}; }

// Raises a RuntimeError whose text is `parts`, without the source location that STD_TORCH_CHECK would put before it.
template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    default:
      return torch::headeronly::toString(dtype);
  }
}

qk::DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return qk::DType::float32;
    case ScalarType::BFloat16:
      return qk::DType::bfloat16;
    case ScalarType::Half:
      return qk::DType::float16;
    default:
      require(false, name, " must be float32, bfloat16 or float16, got ", name_of(dtype));
      return qk::DType::float32;
  }
}

Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A float matrix argument; `columns` < 0: any number of them.
qk::Matrix matrix(const char* name, const Tensor& t, int64_t columns) {
  const qk::DType dtype = dtype_of(name, t.scalar_type());
  require(t.dim() == 2, name, " must be a matrix, got shape ", shape_of(t));
  require(columns < 0 || t.size(1) == columns, name, " must have ", columns, " columns, got shape ", shape_of(t));
  require(t.size(1) > 0 || columns >= 0, name, " must have at least one column, got shape ", shape_of(t));
  return {t.const_data_ptr(), dtype, t.size(0), t.size(1)};
}

void check(const char* name, const Tensor& t, ScalarType dtype, int64_t rows, int64_t cols, const std::string& scheme,
           int64_t k) {
  const bool ok = t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows && t.size(1) == cols;
  require(ok, name, " must be ", name_of(dtype), " of shape [", rows, ", ", cols, "] for scheme ", scheme, " with ", k,
          " input features, got ", name_of(t.scalar_type()), " of shape ", shape_of(t));
}

void check_vector(const char* name, const Tensor& t, int64_t size) {
  require(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == size, name,
          " must be torch.float32 of shape [", size, "], got ", name_of(t.scalar_type()), " of shape ", shape_of(t));
}

// A contiguous float vector of `size`.
qk::Bias float_vector(const char* name, const Tensor& t, int64_t size) {
  const qk::DType dtype = dtype_of(name, t.scalar_type());
  require(t.dim() == 1 && t.size(0) == size, name, " must be a float vector of ", size, ", got shape ", shape_of(t));
  return {t.const_data_ptr(), dtype};
}

// The canonical storage of a weight, contiguous; keeps the tensors alive.
class CanonicalWeight {
 public:
  CanonicalWeight(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros, int64_t k,
                  const std::string& scheme_name)
      : qweight_(as_contiguous(qweight)), scales_(as_contiguous(scales)) {
    const qk::Scheme scheme = qk::parse_scheme(scheme_name);
    require(k > 0, "in_features must be at least 1, got ", k);
    require(!scheme.int_activations() || k <= qk::kMaxReduction, "in_features must be at most ", qk::kMaxReduction,
            " for exact int32 sums, got ", k);
    const int64_t n = qweight.dim() > 0 ? qweight.size(0) : 0, groups = scheme.weight_groups(k);
    check("qweight", qweight, scheme.weight_bits == 8 ? ScalarType::Char : ScalarType::Byte, n,
          scheme.packed_features(k), scheme_name, k);
    check("scales", scales, ScalarType::Float, n, groups, scheme_name, k);
    require(zeros.has_value() == !scheme.symmetric, "zeros ", scheme.symmetric ? "must be None" : "is required",
            " for scheme ", scheme_name);
    if (zeros.has_value()) {
      check("zeros", *zeros, ScalarType::Byte, n, groups, scheme_name, k);
      zeros_ = as_contiguous(*zeros);
    }
    weight_.emplace(scheme, n, k, qweight_.const_data_ptr(), static_cast<const float*>(scales_.const_data_ptr()),
                    zeros_ ? static_cast<const uint8_t*>(zeros_->const_data_ptr()) : nullptr);
  }

  const qk::Weight& get() const { return *weight_; }

 private:
  Tensor qweight_, scales_;
  std::optional<Tensor> zeros_;
  std::optional<qk::Weight> weight_;
};

// libtorch's own thread pool.
qk::Parallel parallel() {
  const auto run = [](int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& x_arg, std::string scheme_name) {
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  require(scheme.int_activations(), "scheme must be an a8 scheme, got ", scheme_name);
  const Tensor x = as_contiguous(x_arg);
  const qk::Matrix view = matrix("x", x, -1);
  Tensor q = torch::stable::new_empty(x, {view.rows, view.cols}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {view.rows, scheme.act_groups(view.cols)}, ScalarType::Float);
  qk::quantize_activation(view, scheme, static_cast<int8_t*>(q.mutable_data_ptr()),
                          static_cast<float*>(scales.mutable_data_ptr()), parallel());
  return {q, scales};
}

Tensor dequantize_weight(const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros, int64_t in_features,
                         std::string scheme) {
  const CanonicalWeight weight(qweight, scales, zeros, in_features, scheme);
  Tensor out = torch::stable::new_empty(scales, {weight.get().n, in_features}, ScalarType::Float);
  qk::dequantize_weight(weight.get(), static_cast<float*>(out.mutable_data_ptr()), parallel());
  return out;
}

// A bias argument of `n` values, contiguous; keeps the tensor alive.
class BiasVector {
 public:
  BiasVector(const std::optional<Tensor>& bias, int64_t n) {
    if (!bias.has_value()) return;
    tensor_ = as_contiguous(*bias);
    bias_ = {tensor_->const_data_ptr(), dtype_of("bias", tensor_->scalar_type())};
    require(tensor_->dim() == 1 && tensor_->size(0) == n, "bias must be a float vector of ", n, ", got shape ",
            shape_of(*tensor_));
  }

  const qk::Bias& get() const { return bias_; }

 private:
  std::optional<Tensor> tensor_;
  qk::Bias bias_{nullptr, qk::DType::float32};
};

Tensor linear(const Tensor& x_arg, const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros,
              std::optional<Tensor> bias_arg, std::string scheme, std::optional<ScalarType> out_dtype) {
  const Tensor x = as_contiguous(x_arg);
  const qk::Matrix view = matrix("x", x, -1);
  const CanonicalWeight weight(qweight, scales, zeros, view.cols, scheme);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  const BiasVector bias(bias_arg, weight.get().n);
  Tensor out = torch::stable::new_empty(x, {view.rows, weight.get().n}, dtype);
  qk::linear(view, weight.get(), bias.get(), out.mutable_data_ptr(), out_type, parallel());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_saving(const Tensor& x_arg, const Tensor& qweight, const Tensor& scales,
                                                 std::optional<Tensor> zeros, std::optional<Tensor> bias_arg,
                                                 std::string scheme, std::optional<ScalarType> out_dtype) {
  const Tensor x = as_contiguous(x_arg);
  const qk::Matrix view = matrix("x", x, -1);
  const CanonicalWeight weight(qweight, scales, zeros, view.cols, scheme);
  require(weight.get().scheme.int_activations(), "scheme must be an a8 scheme, got ", scheme);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  const BiasVector bias(bias_arg, weight.get().n);
  Tensor out = torch::stable::new_empty(x, {view.rows, weight.get().n}, dtype);
  Tensor qx = torch::stable::new_empty(x, {view.rows, view.cols}, ScalarType::Char);
  Tensor x_scales = torch::stable::new_empty(x, {view.rows}, ScalarType::Float);
  qk::linear_saving(view, weight.get(), bias.get(), out.mutable_data_ptr(), out_type,
                    static_cast<int8_t*>(qx.mutable_data_ptr()), static_cast<float*>(x_scales.mutable_data_ptr()),
                    parallel());
  return {out, qx, x_scales};
}

Tensor linear_grad_input(const Tensor& grad_arg, const Tensor& qweight, const Tensor& scales,
                         std::optional<Tensor> zeros, int64_t in_features, std::string scheme,
                         std::optional<ScalarType> out_dtype) {
  const Tensor grad_out = as_contiguous(grad_arg);
  const CanonicalWeight weight(qweight, scales, zeros, in_features, scheme);
  const qk::Matrix view = matrix("grad_out", grad_out, weight.get().n);
  const ScalarType dtype = out_dtype.value_or(grad_out.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  Tensor out = torch::stable::new_empty(grad_out, {view.rows, in_features}, dtype);
  qk::linear_grad_input(view, weight.get(), out.mutable_data_ptr(), out_type, parallel());
  return out;
}

Tensor column_scales(const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros, int64_t in_features,
                     std::string scheme) {
  const CanonicalWeight weight(qweight, scales, zeros, in_features, scheme);
  Tensor out = torch::stable::new_empty(scales, {in_features}, ScalarType::Float);
  qk::column_scales(weight.get(), static_cast<float*>(out.mutable_data_ptr()), parallel());
  return out;
}

Tensor int_grad_input(const Tensor& grad_arg, const Tensor& grad_scales_arg, const Tensor& qweight,
                      const Tensor& scales, std::optional<Tensor> zeros, int64_t in_features, std::string scheme,
                      std::optional<Tensor> column_scales_arg, std::optional<ScalarType> out_dtype) {
  const CanonicalWeight weight(qweight, scales, zeros, in_features, scheme);
  const int64_t n = weight.get().n;
  require(n <= qk::kMaxReduction, "qweight must have at most ", qk::kMaxReduction,
          " rows for exact int32 sums, got shape ", shape_of(qweight));
  const Tensor q_grad = as_contiguous(grad_arg), grad_scales = as_contiguous(grad_scales_arg);
  require(q_grad.scalar_type() == ScalarType::Char && q_grad.dim() == 2 && q_grad.size(1) == n,
          "q_grad must be torch.int8 with ", n, " columns, got ", name_of(q_grad.scalar_type()), " of shape ",
          shape_of(q_grad));
  check_vector("grad_scales", grad_scales, q_grad.size(0));
  const bool grouped = weight.get().scheme.group_size != 0;
  require(column_scales_arg.has_value() == grouped, "column_scales ", grouped ? "is required" : "must be None",
          " for scheme ", scheme);
  std::optional<Tensor> column_scales;
  if (grouped) {
    column_scales = as_contiguous(*column_scales_arg);
    check_vector("column_scales", *column_scales, in_features);
  }
  const ScalarType dtype = out_dtype.value_or(ScalarType::Float);
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  Tensor out = torch::stable::new_empty(q_grad, {q_grad.size(0), in_features}, dtype);
  qk::int_grad_input({static_cast<const int8_t*>(q_grad.const_data_ptr()),
                      static_cast<const float*>(grad_scales.const_data_ptr()), q_grad.size(0), n},
                     weight.get(), grouped ? static_cast<const float*>(column_scales->const_data_ptr()) : nullptr,
                     out.mutable_data_ptr(), out_type, parallel());
  return out;
}

// The int64 data of a contiguous vector of `size`.
const int64_t* int64_vector(const char* name, const Tensor& t, int64_t size) {
  require(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == size, name,
          " must be torch.int64 of shape [", size, "], got ", name_of(t.scalar_type()), " of shape ", shape_of(t));
  return static_cast<const int64_t*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& hidden_arg, const Tensor& target_arg,
                                                        const Tensor& qweight, const Tensor& scales,
                                                        std::optional<Tensor> zeros, std::optional<Tensor> bias_arg,
                                                        std::string scheme, std::optional<Tensor> dither_arg,
                                                        double softcap, double z_loss, double label_smoothing,
                                                        int64_t ignore_index) {
  const Tensor hidden = as_contiguous(hidden_arg), target = as_contiguous(target_arg);
  const qk::Matrix view = matrix("hidden", hidden, -1);
  const CanonicalWeight weight(qweight, scales, zeros, view.cols, scheme);
  const int64_t n = weight.get().n;
  require(softcap == 0 || label_smoothing == 0, "softcap must be 0 with label_smoothing, got ", softcap, " and ",
          label_smoothing);
  qk::CrossEntropyArgs args{.hidden = view,
                            .target = int64_vector("target", target, view.rows),
                            .bias = {nullptr, qk::DType::float32},
                            .dither = nullptr,
                            .softcap = static_cast<float>(softcap),
                            .z_loss = z_loss,
                            .label_smoothing = label_smoothing,
                            .ignore_index = ignore_index};
  for (int64_t m = 0; m < view.rows; ++m) {
    const int64_t t = args.target[m];
    require((t >= 0 && t < n) || t == ignore_index, "target must be in [0, ", n, ") or ", ignore_index,
            " (ignore_index), got ", t, " at position ", m);
  }
  std::optional<Tensor> bias, dither;
  if (bias_arg.has_value()) {
    bias = as_contiguous(*bias_arg);
    args.bias = float_vector("bias", *bias, n);
  }
  if (dither_arg.has_value()) {
    dither = as_contiguous(*dither_arg);
    args.dither = int64_vector("dither", *dither, view.rows);
  }
  Tensor loss = torch::stable::new_empty(hidden, {view.rows}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(hidden, {view.rows}, ScalarType::Float);
  Tensor grad = torch::stable::new_empty(hidden, {dither ? view.rows : 0, view.cols}, ScalarType::Float);
  const auto floats = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  qk::linear_cross_entropy(args, weight.get(), {floats(loss), floats(lse), dither ? floats(grad) : nullptr},
                           parallel());
  return {loss, lse, grad};
}

std::tuple<Tensor, Tensor, Tensor> quantize_weight(const Tensor& weight_arg, std::string scheme_name) {
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  const Tensor weight = as_contiguous(weight_arg);
  const qk::Matrix view = matrix("weight", weight, -1);
  const int64_t n = view.rows, groups = scheme.weight_groups(view.cols);
  Tensor qweight = torch::stable::new_empty(weight, {n, scheme.packed_features(view.cols)},
                                            scheme.weight_bits == 8 ? ScalarType::Char : ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(weight, {n, groups}, ScalarType::Float);
  Tensor zeros = torch::stable::new_empty(weight, {n, scheme.symmetric ? 0 : groups}, ScalarType::Byte);
  auto* zero_data = scheme.symmetric ? nullptr : static_cast<uint8_t*>(zeros.mutable_data_ptr());
  const bool finite = qk::quantize_weight(view, scheme, qweight.mutable_data_ptr(),
                                          static_cast<float*>(scales.mutable_data_ptr()), zero_data, parallel());
  require(finite, "weight must be finite, and so must be the range of each group, got NaN or Inf");
  return {qweight, scales, zeros};
}

Tensor mask_clipped(const Tensor& grad_arg, const Tensor& weight_arg, std::string scheme_name) {
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  require(scheme.weight_bits == 4, "scheme must be a w4 scheme, got ", scheme_name);
  const Tensor grad = as_contiguous(grad_arg), weight = as_contiguous(weight_arg);
  const qk::Matrix view = matrix("weight", weight, -1), grad_view = matrix("grad", grad, view.cols);
  require(grad_view.rows == view.rows, "grad must have ", view.rows, " rows, got shape ", shape_of(grad));
  Tensor out = torch::stable::new_empty(grad, {view.rows, view.cols}, grad.scalar_type());
  qk::mask_clipped(grad_view, view, scheme, out.mutable_data_ptr(), parallel());
  return out;
}

// The scales [N, groups] of a symmetric scheme, contiguous; keeps the tensor alive.
class GivenScales {
 public:
  GivenScales(const Tensor& scales, const qk::Matrix& weight, const std::string& scheme_name)
      : scheme_(qk::parse_scheme(scheme_name)), scales_(as_contiguous(scales)) {
    require(scheme_.symmetric, "scheme must be symmetric, got ", scheme_name);
    check("scales", scales, ScalarType::Float, weight.rows, scheme_.weight_groups(weight.cols), scheme_name,
          weight.cols);
  }

  const qk::Scheme& scheme() const { return scheme_; }
  const float* get() const { return static_cast<const float*>(scales_.const_data_ptr()); }

 private:
  qk::Scheme scheme_;
  Tensor scales_;
};

Tensor quantize_weight_scaled(const Tensor& weight_arg, const Tensor& scales_arg, std::string scheme_name) {
  const Tensor weight = as_contiguous(weight_arg);
  const qk::Matrix view = matrix("weight", weight, -1);
  const GivenScales scales(scales_arg, view, scheme_name);
  const qk::Scheme& scheme = scales.scheme();
  Tensor qweight = torch::stable::new_empty(weight, {view.rows, scheme.packed_features(view.cols)},
                                            scheme.weight_bits == 8 ? ScalarType::Char : ScalarType::Byte);
  require(qk::quantize_weight_scaled(view, scales.get(), scheme, qweight.mutable_data_ptr(), parallel()),
          "weight and scales must be finite, got NaN or Inf");
  return qweight;
}

std::tuple<Tensor, Tensor> scale_gradient(const Tensor& grad_arg, const Tensor& weight_arg, const Tensor& scales_arg,
                                          std::string scheme_name) {
  const Tensor grad = as_contiguous(grad_arg), weight = as_contiguous(weight_arg);
  const qk::Matrix view = matrix("weight", weight, -1), grad_view = matrix("grad", grad, view.cols);
  require(grad_view.rows == view.rows, "grad must have ", view.rows, " rows, got shape ", shape_of(grad));
  const GivenScales scales(scales_arg, view, scheme_name);
  Tensor out = torch::stable::new_empty(grad, {view.rows, view.cols}, grad.scalar_type());
  Tensor grad_scales =
      torch::stable::new_empty(weight, {view.rows, scales.scheme().weight_groups(view.cols)}, ScalarType::Float);
  qk::scale_gradient(grad_view, view, scales.get(), scales.scheme(), out.mutable_data_ptr(),
                     static_cast<float*>(grad_scales.mutable_data_ptr()), parallel());
  return {out, grad_scales};
}

qk::Random random_of(const Tensor& seed, int64_t stream) {
  require(seed.scalar_type() == ScalarType::Long && seed.dim() == 0, "seed must be torch.int64 of shape [], got ",
          name_of(seed.scalar_type()), " of shape ", shape_of(seed));
  require(stream >= 0 && stream <= UINT32_MAX, "stream must be between 0 and 2^32 - 1, got ", stream);
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())), static_cast<uint32_t>(stream)};
}

const float* factors_of(const char* name, std::optional<Tensor>& factors, int64_t size) {
  if (!factors.has_value()) return nullptr;
  check_vector(name, *factors, size);
  factors = as_contiguous(*factors);
  return static_cast<const float*>(factors->const_data_ptr());
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_arg, std::optional<Tensor> column_factors, const Tensor& seed,
                                         int64_t stream) {
  const Tensor x = as_contiguous(x_arg);
  const qk::Matrix view = matrix("x", x, -1);
  const float* const factors = factors_of("column_factors", column_factors, view.cols);
  Tensor q = torch::stable::new_empty(x, {view.rows, view.cols}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {view.rows}, ScalarType::Float);
  qk::quantize_rows(view, factors, random_of(seed, stream), static_cast<int8_t*>(q.mutable_data_ptr()),
                    static_cast<float*>(scales.mutable_data_ptr()), parallel());
  return {q, scales};
}

std::tuple<Tensor, Tensor> quantize_columns(const Tensor& x_arg, std::optional<Tensor> row_factors, const Tensor& seed,
                                            int64_t stream) {
  const Tensor x = as_contiguous(x_arg);
  const qk::Matrix view = matrix("x", x, -1);
  const float* const factors = factors_of("row_factors", row_factors, view.rows);
  Tensor q = torch::stable::new_empty(x, {view.cols, view.rows}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {view.cols}, ScalarType::Float);
  qk::quantize_columns(view, factors, random_of(seed, stream), static_cast<int8_t*>(q.mutable_data_ptr()),
                       static_cast<float*>(scales.mutable_data_ptr()), parallel());
  return {q, scales};
}

STABLE_TORCH_LIBRARY(qkernels, m) {
  m.def("quantize_activation(Tensor x, str scheme) -> (Tensor, Tensor)");
  m.def("dequantize_weight(Tensor qweight, Tensor scales, Tensor? zeros, int in_features, str scheme) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, str scheme, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "linear_saving(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, str scheme, "
      "ScalarType? out_dtype=None) -> (Tensor, Tensor, Tensor)");
  m.def("quantize_weight(Tensor weight, str scheme) -> (Tensor, Tensor, Tensor)");
  m.def("mask_clipped(Tensor grad, Tensor weight, str scheme) -> Tensor");
  m.def("quantize_weight_scaled(Tensor weight, Tensor scales, str scheme) -> Tensor");
  m.def("scale_gradient(Tensor grad, Tensor weight, Tensor scales, str scheme) -> (Tensor, Tensor)");
  m.def(
      "linear_grad_input(Tensor grad_out, Tensor qweight, Tensor scales, Tensor? zeros, int in_features, str scheme, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def("quantize_rows(Tensor x, Tensor? column_factors, Tensor seed, int stream) -> (Tensor, Tensor)");
  m.def("quantize_columns(Tensor x, Tensor? row_factors, Tensor seed, int stream) -> (Tensor, Tensor)");
  m.def("column_scales(Tensor qweight, Tensor scales, Tensor? zeros, int in_features, str scheme) -> Tensor");
  m.def(
      "int_grad_input(Tensor q_grad, Tensor grad_scales, Tensor qweight, Tensor scales, Tensor? zeros, "
      "int in_features, str scheme, Tensor? column_scales=None, *, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor target, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
      "str scheme, Tensor? dither=None, *, float softcap=0.0, float z_loss=0.0, float label_smoothing=0.0, "
      "int ignore_index=-100) -> (Tensor loss, Tensor lse, Tensor grad_hidden)");
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("dequantize_weight", TORCH_BOX(&dequantize_weight));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
  m.impl("linear_saving", TORCH_BOX(&linear_saving));
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("mask_clipped", TORCH_BOX(&mask_clipped));
  m.impl("quantize_weight_scaled", TORCH_BOX(&quantize_weight_scaled));
  m.impl("scale_gradient", TORCH_BOX(&scale_gradient));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("quantize_columns", TORCH_BOX(&quantize_columns));
  m.impl("column_scales", TORCH_BOX(&column_scales));
  m.impl("int_grad_input", TORCH_BOX(&int_grad_input));
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
}

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// Importing the module loads the library, whose static initializers register the operators.
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
