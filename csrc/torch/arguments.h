// Arguments of torch operators as the plain data of types.h, checked: an error names the argument, what was expected
// and what came. For both libraries of operators, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/out_of_memory.h"
#include "common/types.h"

namespace qk::tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Written only when a message is: formatting the shapes of every call would take longer than a small product.
struct ShapeOf {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  out << "[";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i != 0 ? ", " : "") << shape.tensor.size(i);
  return out << "]";
}

// The same for the name of a scheme.
inline std::ostream& operator<<(std::ostream& out, const Scheme& scheme) { return out << qk::name_of(scheme); }

inline ShapeOf shape_of(const Tensor& t) { return {t}; }

// Raises a RuntimeError whose text is `parts`, without the source location that STD_TORCH_CHECK would put before it.
template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* name_of(ScalarType dtype) {
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

inline DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      require(false, name, " must be float32, bfloat16 or float16, got ", name_of(dtype));
      return DType::float32;
  }
}

inline int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Long:
      return 8;
    default:
      return 1;
  }
}

// A tensor without values on the device of `like`. Torch's own message is lost on the way through its stable ABI.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
  } catch (const std::exception&) {
    int64_t bytes = element_size(dtype);
    std::string shape;
    for (const int64_t size : sizes) {
      bytes *= size;
      shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    }
    throw OutOfMemory(bytes, std::string("a result of ") + name_of(dtype) + " [" + shape + "]");
  }
}

// The argument itself, or a copy of it that is contiguous and aligned to its elements. Checked before: what does not
// fit is not copied.
inline Tensor readable(const char* name, const Tensor& t) {
  const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % element_size(t.scalar_type()) == 0;
  if (t.is_contiguous() && aligned) return t;
  try {
    return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
  } catch (const std::exception&) {
    throw OutOfMemory(t.numel() * element_size(t.scalar_type()), std::string("a contiguous copy of ") + name);
  }
}

// A float matrix argument, checked; keeps the tensor alive. `columns` < 0: any number of them but 0.
class FloatMatrix {
 public:
  FloatMatrix(const char* name, const Tensor& t, int64_t columns = -1) : name_(name), tensor_(t) {
    dtype_of(name, t.scalar_type());
    require(t.dim() == 2, name, " must be a matrix, got shape ", shape_of(t));
    require(columns < 0 || t.size(1) == columns, name, " must have ", columns, " columns, got shape ", shape_of(t));
    require(t.size(1) > 0 || columns >= 0, name, " must have at least one column, got shape ", shape_of(t));
    rows = t.size(0), cols = t.size(1);
  }

  // Once all arguments are checked: what the core reads.
  Matrix read() {
    tensor_ = readable(name_, tensor_);
    return {tensor_.const_data_ptr(), dtype_of(name_, tensor_.scalar_type()), rows, cols};
  }

  int64_t rows, cols;

 private:
  const char* name_;
  Tensor tensor_;
};

// A stored tensor of a weight, or with `experts` >= 0 of as many weights.
inline void check(const char* name, const Tensor& t, ScalarType dtype, int64_t rows, int64_t cols, const Scheme& scheme,
                  int64_t k, int64_t experts = -1) {
  const int64_t first = experts >= 0 ? 1 : 0;
  const bool ok = t.scalar_type() == dtype && t.dim() == first + 2 && (experts < 0 || t.size(0) == experts) &&
                  t.size(first) == rows && t.size(first + 1) == cols;
  if (ok) return;
  const std::string leading = experts >= 0 ? std::to_string(experts) + ", " : "";
  require(false, name, " must be ", name_of(dtype), " of shape [", leading, rows, ", ", cols, "] for scheme ", scheme,
          " with ", k, " input features, got ", name_of(t.scalar_type()), " of shape ", shape_of(t));
}

inline void check_vector(const char* name, const Tensor& t, int64_t size) {
  require(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == size, name,
          " must be torch.float32 of shape [", size, "], got ", name_of(t.scalar_type()), " of shape ", shape_of(t));
}

// Of qweight.
inline ScalarType storage_type(const qk::Scheme& scheme) {
  return scheme.weight->in_place() ? ScalarType::Char : ScalarType::Byte;
}

// Of zeros.
inline ScalarType zeros_type(const qk::Scheme& scheme) {
  return scheme.has_min() ? ScalarType::Float : ScalarType::Byte;
}

// The scale of static activations: float32 [1] for a8s schemes, else none; keeps the tensor alive.
class ActivationScale {
 public:
  ActivationScale(const std::optional<Tensor>& x_scale, const Scheme& scheme) {
    require(x_scale.has_value() == scheme.static_activations, "x_scale ",
            scheme.static_activations ? "is required" : "must be None", " for scheme ", scheme);
    if (!x_scale.has_value()) return;
    check_vector("x_scale", *x_scale, 1);
    tensor_ = readable("x_scale", *x_scale);
  }

  const float* get() const { return tensor_ ? static_cast<const float*>(tensor_->const_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

// The stored tensors of a weight, or of experts' weights, checked and contiguous; keeps them alive.
class CanonicalStorage {
 public:
  CanonicalStorage(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros, int64_t k,
                   const Scheme& scheme, bool of_experts)
      : qweight_(qweight), scales_(scales) {
    require(k > 0, "in_features must be at least 1, got ", k);
    require(!scheme.int_activations() || k <= kMaxReduction, "in_features must be at most ", kMaxReduction,
            " for exact int32 sums, got ", k);
    const int64_t first = of_experts ? 1 : 0, groups = scheme.weight_groups(k);
    if (of_experts) experts = qweight.dim() > 0 ? qweight.size(0) : 0;
    n = qweight.dim() > first ? qweight.size(first) : 0;
    check("qweight", qweight, storage_type(scheme), n, scheme.packed_features(k), scheme, k, experts);
    check("scales", scales, ScalarType::Float, n, groups, scheme, k, experts);
    require(zeros.has_value() == !scheme.symmetric(), "zeros ", scheme.symmetric() ? "must be None" : "is required",
            " for scheme ", scheme);
    if (zeros.has_value()) {
      check("zeros", *zeros, zeros_type(scheme), n, groups, scheme, k, experts);
      zeros_ = readable("zeros", *zeros);
    }
    qweight_ = readable("qweight", qweight);
    scales_ = readable("scales", scales);
  }

  const uint8_t* qweight() const { return static_cast<const uint8_t*>(qweight_.const_data_ptr()); }
  const float* scales() const { return static_cast<const float*>(scales_.const_data_ptr()); }
  const void* zeros() const { return zeros_ ? zeros_->const_data_ptr() : nullptr; }

  int64_t experts = -1, n;  // -1: one weight

 private:
  Tensor qweight_, scales_;
  std::optional<Tensor> zeros_;
};

// The canonical storage of a weight.
class CanonicalWeight {
 public:
  CanonicalWeight(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros, int64_t k,
                  const Scheme& scheme)
      : storage_(qweight, scales, zeros, k, scheme, false),
        weight_(scheme, storage_.n, k, storage_.qweight(), storage_.scales(), storage_.zeros()) {}

  const Weight& get() const { return weight_; }

  // The weight together with the scale of the activations that are multiplied with it.
  Weight with(const ActivationScale& x_scale) const {
    Weight weight = weight_;
    weight.x_scale = x_scale.get();
    return weight;
  }

 private:
  CanonicalStorage storage_;
  Weight weight_;
};

// The canonical storage of experts' weights [experts, n, k].
class CanonicalExperts {
 public:
  CanonicalExperts(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros, int64_t k,
                   const Scheme& scheme)
      : storage_(qweight, scales, zeros, k, scheme, true),
        weights_{scheme,           storage_.experts, storage_.n, k, storage_.qweight(), storage_.scales(),
                 storage_.zeros(), nullptr} {}

  const ExpertWeights& get() const { return weights_; }

  // The weights together with the scale of the activations that are multiplied with them.
  ExpertWeights with(const ActivationScale& x_scale) const {
    ExpertWeights weights = weights_;
    weights.x_scale = x_scale.get();
    return weights;
  }

 private:
  CanonicalStorage storage_;
  ExpertWeights weights_;
};

// The data of an int64 vector of `size`, which `t` then keeps.
inline const int64_t* int64_vector(const char* name, Tensor& t, int64_t size) {
  require(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == size, name,
          " must be torch.int64 of shape [", size, "], got ", name_of(t.scalar_type()), " of shape ", shape_of(t));
  t = readable(name, t);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// Which of `rows` rows belong to which expert; keeps the tensor alive.
class ExpertOffsets {
 public:
  ExpertOffsets(const Tensor& offsets, int64_t experts, int64_t rows) : tensor_(offsets) {
    rows_ = {int64_vector("offsets", tensor_, experts), experts, rows};
    for (int64_t e = 0; e < experts; ++e) {
      require(rows_.ends[e] >= rows_.begin(e) && rows_.ends[e] <= rows, "offsets must ascend from 0 to at most ", rows,
              ", got ", rows_.ends[e], " at position ", e);
    }
  }

  const ExpertRows& get() const { return rows_; }

 private:
  Tensor tensor_;
  ExpertRows rows_;
};

// The row of x, of `sources` rows, that each of `rows` rows is made of, or null: its own; keeps the tensor alive.
class SourceRows {
 public:
  SourceRows(const std::optional<Tensor>& index, int64_t sources, int64_t rows) : tensor_(index) {
    if (!index.has_value()) {
      require(rows == sources, "rows is required where x has ", sources, " rows for ", rows);
      return;
    }
    index_ = int64_vector("rows", *tensor_, rows);
    for (int64_t m = 0; m < rows; ++m) {
      require(index_[m] >= 0 && index_[m] < sources, "rows must be in [0, ", sources, "), got ", index_[m],
              " at position ", m);
    }
  }

  const int64_t* get() const { return index_; }

 private:
  std::optional<Tensor> tensor_;
  const int64_t* index_ = nullptr;
};

// A bias argument of `n` values, or with `experts` >= 0 of as many for each expert, contiguous; keeps the tensor alive.
class BiasVector {
 public:
  BiasVector(const std::optional<Tensor>& bias, int64_t n, int64_t experts = -1) {
    if (!bias.has_value()) return;
    const DType dtype = dtype_of("bias", bias->scalar_type());
    if (experts < 0) {
      require(bias->dim() == 1 && bias->size(0) == n, "bias must be a float vector of ", n, ", got shape ",
              shape_of(*bias));
    } else {
      require(bias->dim() == 2 && bias->size(0) == experts && bias->size(1) == n, "bias must be a float matrix of [",
              experts, ", ", n, "], got shape ", shape_of(*bias));
    }
    tensor_ = readable("bias", *bias);
    bias_ = {tensor_->const_data_ptr(), dtype};
  }

  const Bias& get() const { return bias_; }

 private:
  std::optional<Tensor> tensor_;
  Bias bias_{nullptr, DType::float32};
};

// The quantized gradient of int_grad_input and the scales of the columns of its weight; keeps the tensors alive.
class IntGradient {
 public:
  IntGradient(const Tensor& q_grad, const Tensor& grad_scales, const Weight& weight,
              const std::optional<Tensor>& column_scales)
      : q_grad_(q_grad), grad_scales_(grad_scales), n_(weight.n) {
    require(n_ <= kMaxReduction, "qweight must have at most ", kMaxReduction, " rows for exact int32 sums, got ", n_);
    require(q_grad.scalar_type() == ScalarType::Char && q_grad.dim() == 2 && q_grad.size(1) == n_,
            "q_grad must be torch.int8 with ", n_, " columns, got ", name_of(q_grad.scalar_type()), " of shape ",
            shape_of(q_grad));
    check_vector("grad_scales", grad_scales, q_grad.size(0));
    const bool by_column = !weight.scheme.row_scaled();
    require(column_scales.has_value() == by_column, "column_scales ", by_column ? "is required" : "must be None",
            " for scheme ", weight.scheme);
    if (by_column) {
      check_vector("column_scales", *column_scales, weight.k);
      column_scales_ = readable("column_scales", *column_scales);
    }
    q_grad_ = readable("q_grad", q_grad);
    grad_scales_ = readable("grad_scales", grad_scales);
  }

  QuantizedRows rows() const {
    return {static_cast<const int8_t*>(q_grad_.const_data_ptr()),
            static_cast<const float*>(grad_scales_.const_data_ptr()), q_grad_.size(0), n_};
  }

  // [weight.k], or null for a weight with one scale a row.
  const float* column_scales() const {
    return column_scales_ ? static_cast<const float*>(column_scales_->const_data_ptr()) : nullptr;
  }

 private:
  Tensor q_grad_, grad_scales_;
  std::optional<Tensor> column_scales_;
  int64_t n_;
};

inline Random random_of(const Tensor& seed, int64_t rng_stream) {
  require(seed.scalar_type() == ScalarType::Long && seed.dim() == 0, "seed must be torch.int64 of shape [], got ",
          name_of(seed.scalar_type()), " of shape ", shape_of(seed));
  require(rng_stream >= 0 && rng_stream <= UINT32_MAX, "rng_stream must be between 0 and 2^32 - 1, got ", rng_stream);
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())),
          static_cast<uint32_t>(rng_stream)};
}

inline const float* factors_of(const char* name, std::optional<Tensor>& factors, int64_t size) {
  if (!factors.has_value()) return nullptr;
  check_vector(name, *factors, size);
  factors = readable(name, *factors);
  return static_cast<const float*>(factors->const_data_ptr());
}

}  // namespace qk::tensors
