// The torch operators on CUDA tensors: checks, allocation on torch's current stream, and the launches. Their schemas
// are those of the operators of the same name in `qkernels::`; qkernels/kernels/dispatch.py says which calls come here.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "cuda/api.h"
#include "torch/arguments.h"

namespace {

using namespace qk::tensors;

// The driver is asked once for a device.
int processors_of(int device) {
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices];
  const bool keep = device < kMostDevices;
  if (const int count = keep ? known[device].load(std::memory_order_relaxed) : 0; count != 0) return count;
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  require(error == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(error));
  if (keep) known[device].store(count, std::memory_order_relaxed);
  return count;
}

// Makes the device of a tensor current for the time of a call. Kernels run on torch's stream; scratch is memory of
// torch's allocator, which keeps it until they are done.
class Call {
 public:
  explicit Call(const Tensor& t) : like_(t), guard_(t.get_device_index()) {
    const int index = t.get_device_index();
    void* stream = nullptr;
    require(aoti_torch_get_current_cuda_stream(index, &stream) == 0, "no CUDA stream on device ", index);
    stream_ = static_cast<cudaStream_t>(stream);
    processors_ = processors_of(index);
  }

  qk::cuda::Device device() { return {stream_, processors_, allocate, this}; }

 private:
  static void* allocate(size_t bytes, void* self) {
    auto& call = *static_cast<Call*>(self);
    const auto size = static_cast<int64_t>(bytes);
    call.scratch_.push_back(torch::stable::new_empty(call.like_, {size}, ScalarType::Byte));
    return call.scratch_.back().mutable_data_ptr();
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  int processors_ = 0;
  std::vector<Tensor> scratch_;
};

void check_launch(const char* op, cudaError_t error) {
  const bool missing = error == cudaErrorNoKernelImageForDevice;
  require(error == cudaSuccess, op, " could not be launched: ", cudaGetErrorString(error),
          missing ? "; build the package with TORCH_CUDA_ARCH_LIST for this device" : "");
}

// Kernels count rows in 32 bits.
void check_rows(const char* name, int64_t rows) {
  require(rows <= INT32_MAX, name, " must have less than 2^31 rows, got ", rows);
}

// Half the depth of a product on tensor cores is not a group that these kernels sum apart.
const qk::Scheme& supported(const qk::Scheme& scheme) {
  require(scheme.group_size != 16, "groups of 16 have no CUDA C++ kernels, got scheme ", scheme);
  require(!scheme.has_min(), "weights with minima have no CUDA C++ kernels, got scheme ", scheme);
  return scheme;
}

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& x_arg, int64_t scheme_code) {
  const qk::Scheme scheme = qk::scheme_of(scheme_code);
  require(scheme.int_activations(), "scheme must be an a8 scheme, got ", scheme);
  Call call(x_arg);
  FloatMatrix x("x", x_arg);
  check_rows("x", x.rows);
  Tensor q = new_tensor(x_arg, {x.rows, x.cols}, ScalarType::Char);
  Tensor scales = new_tensor(x_arg, {x.rows, scheme.act_groups(x.cols)}, ScalarType::Float);
  check_launch("quantize_activation",
               qk::cuda::quantize_activation(x.read(), scheme, static_cast<int8_t*>(q.mutable_data_ptr()),
                                             static_cast<float*>(scales.mutable_data_ptr()), call.device()));
  return {q, scales};
}

std::tuple<Tensor, Tensor> quantize_rows_stochastic(const Tensor& x_arg, std::optional<Tensor> column_factors,
                                                    const Tensor& seed, int64_t rng_stream) {
  Call call(x_arg);
  FloatMatrix x("x", x_arg);
  check_rows("x", x.rows);
  const float* const factors = factors_of("column_factors", column_factors, x.cols);
  Tensor q = new_tensor(x_arg, {x.rows, x.cols}, ScalarType::Char);
  Tensor scales = new_tensor(x_arg, {x.rows}, ScalarType::Float);
  check_launch("quantize_rows_stochastic",
               qk::cuda::quantize_rows_stochastic(x.read(), factors, random_of(seed, rng_stream),
                                                  static_cast<int8_t*>(q.mutable_data_ptr()),
                                                  static_cast<float*>(scales.mutable_data_ptr()), call.device()));
  return {q, scales};
}

// What linear multiplies, which is no float32 for a16 schemes.
void check_linear(const Tensor& x, const qk::Weight& weight) {
  check_rows("x", x.size(0));
  check_rows("qweight", weight.n);
  require(weight.scheme.int_activations() || x.scalar_type() != ScalarType::Float,
          "x must be bfloat16 or float16 for scheme ", weight.scheme, ", got torch.float32");
}

Tensor linear(const Tensor& x_arg, const Tensor& qweight, const Tensor& scales, std::optional<Tensor> zeros,
              std::optional<Tensor> bias_arg, int64_t scheme_code, std::optional<ScalarType> out_dtype) {
  Call call(x_arg);
  FloatMatrix x("x", x_arg);
  const CanonicalWeight weight(qweight, scales, zeros, x.cols, supported(qk::scheme_of(scheme_code)));
  check_linear(x_arg, weight.get());
  const ScalarType dtype = out_dtype.value_or(x_arg.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  const BiasVector bias(bias_arg, weight.get().n);
  Tensor out = new_tensor(x_arg, {x.rows, weight.get().n}, dtype);
  check_launch("linear",
               qk::cuda::linear(x.read(), weight.get(), bias.get(), out.mutable_data_ptr(), out_type, call.device()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_with_saved_input(const Tensor& x_arg, const Tensor& qweight,
                                                           const Tensor& scales, std::optional<Tensor> zeros,
                                                           std::optional<Tensor> bias_arg, int64_t scheme_code,
                                                           std::optional<ScalarType> out_dtype) {
  const qk::Scheme scheme = qk::scheme_of(scheme_code);
  require(scheme.int_activations() && scheme.act_group_size == 0,
          "scheme must be an a8 scheme without groups of activations, got ", scheme);
  Call call(x_arg);
  FloatMatrix x("x", x_arg);
  const CanonicalWeight weight(qweight, scales, zeros, x.cols, supported(scheme));
  check_linear(x_arg, weight.get());
  const ScalarType dtype = out_dtype.value_or(x_arg.scalar_type());
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  const BiasVector bias(bias_arg, weight.get().n);
  Tensor out = new_tensor(x_arg, {x.rows, weight.get().n}, dtype);
  Tensor q = new_tensor(x_arg, {x.rows, x.cols}, ScalarType::Char);
  Tensor x_scales = new_tensor(x_arg, {x.rows}, ScalarType::Float);
  check_launch("linear_with_saved_input",
               qk::cuda::linear_with_saved_input(x.read(), weight.get(), bias.get(), out.mutable_data_ptr(), out_type,
                                                 static_cast<int8_t*>(q.mutable_data_ptr()),
                                                 static_cast<float*>(x_scales.mutable_data_ptr()), call.device()));
  return {out, q, x_scales};
}

Tensor int_grad_input(const Tensor& grad_arg, const Tensor& grad_scales_arg, const Tensor& qweight,
                      const Tensor& scales, std::optional<Tensor> zeros, int64_t in_features, int64_t scheme_code,
                      std::optional<Tensor> column_scales_arg, std::optional<ScalarType> out_dtype) {
  Call call(grad_arg);
  const CanonicalWeight weight(qweight, scales, zeros, in_features, supported(qk::scheme_of(scheme_code)));
  const IntGradient args(grad_arg, grad_scales_arg, weight.get(), column_scales_arg);
  check_rows("q_grad", args.rows().rows);
  require(in_features <= INT32_MAX, "in_features must be less than 2^31, got ", in_features);
  const ScalarType dtype = out_dtype.value_or(ScalarType::Float);
  const qk::DType out_type = dtype_of("out_dtype", dtype);
  Tensor out = new_tensor(grad_arg, {args.rows().rows, in_features}, dtype);
  check_launch("int_grad_input", qk::cuda::int_grad_input(args.rows(), weight.get(), args.column_scales(),
                                                          out.mutable_data_ptr(), out_type, call.device()));
  return out;
}

STABLE_TORCH_LIBRARY(qkernels_cuda, m) {
  m.def("quantize_activation(Tensor x, int scheme) -> (Tensor, Tensor)");
  m.def("quantize_rows_stochastic(Tensor x, Tensor? column_factors, Tensor seed, int rng_stream) -> (Tensor, Tensor)");
  m.def(
      "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int scheme, "
      "ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "linear_with_saved_input(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int scheme, "
      "ScalarType? out_dtype=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "int_grad_input(Tensor q_grad, Tensor grad_scales, Tensor qweight, Tensor scales, Tensor? zeros, "
      "int in_features, int scheme, Tensor? column_scales=None, *, ScalarType? out_dtype=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qkernels_cuda, CUDA, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("quantize_rows_stochastic", TORCH_BOX(&quantize_rows_stochastic));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_with_saved_input", TORCH_BOX(&linear_with_saved_input));
  m.impl("int_grad_input", TORCH_BOX(&int_grad_input));
}

}  // namespace
