// The torch operators on CUDA tensors: checks, allocation on torch's current stream, and the launches. Their schemas
// are those of the operators of the same name in `qkernels::`; qkernels/dispatch.py says which calls come here.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/rows.h"
#include "tensors.h"

namespace {

using namespace qk::tensors;
using qk::cuda::Order;
using qk::cuda::RowsArgs;

// Makes the device of a tensor current; its stream there is the one torch uses.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    require(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "no CUDA stream on device ",
            t.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

void check_launch(const char* op, cudaError_t error) {
  require(error == cudaSuccess, op, " could not be launched: ", cudaGetErrorString(error));
}

struct QuantizedRows {
  Tensor q, scales;
};

// x quantized for a scheme: per token or per group.
QuantizedRows quantize_x(const qk::Matrix& view, const Tensor& x, const qk::Scheme& scheme, Order order,
                         cudaStream_t stream) {
  const int64_t stride = order == Order::plain ? view.cols : qk::round_up(view.cols, 32);
  QuantizedRows out{torch::stable::new_empty(x, {view.rows, stride}, ScalarType::Char),
                    torch::stable::new_empty(x, {view.rows, scheme.act_groups(view.cols)}, ScalarType::Float)};
  const RowsArgs args{.x = view.data,
                      .factors = nullptr,
                      .q = static_cast<int8_t*>(out.q.mutable_data_ptr()),
                      .scales = static_cast<float*>(out.scales.mutable_data_ptr()),
                      .rows = view.rows,
                      .cols = view.cols,
                      .q_stride = stride,
                      .group = static_cast<int>(scheme.act_group_size),
                      .dtype = view.dtype,
                      .order = order,
                      .random = {}};
  check_launch("quantize_activation", qk::cuda::quantize_rows(args, stream));
  return out;
}

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& x_arg, std::string scheme_name) {
  const qk::Scheme scheme = qk::parse_scheme(scheme_name);
  require(scheme.int_activations(), "scheme must be an a8 scheme, got ", scheme_name);
  const OnDevice device(x_arg);
  const Tensor x = as_contiguous(x_arg);
  QuantizedRows out = quantize_x(matrix("x", x, -1), x, scheme, Order::plain, device.stream());
  return {out.q, out.scales};
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_arg, std::optional<Tensor> column_factors, const Tensor& seed,
                                         int64_t stream) {
  const OnDevice device(x_arg);
  const Tensor x = as_contiguous(x_arg);
  const qk::Matrix view = matrix("x", x, -1);
  const float* const factors = factors_of("column_factors", column_factors, view.cols);
  Tensor q = torch::stable::new_empty(x, {view.rows, view.cols}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {view.rows}, ScalarType::Float);
  const RowsArgs args{.x = view.data,
                      .factors = factors,
                      .q = static_cast<int8_t*>(q.mutable_data_ptr()),
                      .scales = static_cast<float*>(scales.mutable_data_ptr()),
                      .rows = view.rows,
                      .cols = view.cols,
                      .q_stride = view.cols,
                      .group = 0,
                      .dtype = view.dtype,
                      .order = Order::plain,
                      .random = random_of(seed, stream)};
  check_launch("quantize_rows", qk::cuda::quantize_rows_stochastic(args, device.stream()));
  return {q, scales};
}

STABLE_TORCH_LIBRARY(qkernels_cuda, m) {
  m.def("quantize_activation(Tensor x, str scheme) -> (Tensor, Tensor)");
  m.def("quantize_rows(Tensor x, Tensor? column_factors, Tensor seed, int stream) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qkernels_cuda, CUDA, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
}

}  // namespace
