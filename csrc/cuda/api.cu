// The operators as launches: quantization, what a product needs before it, the product.
#include "cuda/api.h"

#include "cuda/float_matmul.h"
#include "cuda/int_matmul.h"
#include "cuda/rows.h"
#include "cuda/unpack.h"

namespace qk::cuda {
namespace {

struct QuantizedX {
  int8_t* q;
  float* scales;
  int64_t stride;
};

RowsArgs rows_args(const Matrix& x, const QuantizedX& to, int64_t group, Order order) {
  return {.x = x.data,
          .factors = nullptr,
          .q = to.q,
          .scales = to.scales,
          .rows = x.rows,
          .cols = x.cols,
          .q_stride = to.stride,
          .group = static_cast<int>(group),
          .dtype = x.dtype,
          .order = order,
          .random = {}};
}

template <class T>
T* allocate(const Device& device, int64_t count) {
  return static_cast<T*>(device.allocate(static_cast<size_t>(count) * sizeof(T), device.context));
}

}  // namespace

cudaError_t quantize_activation(const Matrix& x, const Scheme& scheme, int8_t* q, float* scales, const Device& device) {
  return quantize_rows(rows_args(x, {q, scales, x.cols}, scheme.act_group_size, Order::plain), device.stream);
}

cudaError_t quantize_rows_stochastic(const Matrix& x, const float* factors, const Random& random, int8_t* q,
                                     float* scales, const Device& device) {
  RowsArgs args = rows_args(x, {q, scales, x.cols}, 0, Order::plain);
  args.factors = factors;
  args.random = random;
  return quantize_rows_stochastic(args, device.stream);
}

namespace {

cudaError_t linear_float(const Matrix& x, const Weight& weight, const Bias& bias, void* out, DType out_dtype,
                         const Device& device) {
  FloatMatmulArgs args = {.x = x.data,
                          .dtype = x.dtype,
                          .weight = weight.qweight,
                          .scales = weight.scales,
                          .zeros = weight.zeros,
                          .bias = bias,
                          .out = out,
                          .out_dtype = out_dtype,
                          .m = static_cast<int>(x.rows),
                          .n = static_cast<int>(weight.n),
                          .k = static_cast<int>(x.cols),
                          .bits = weight.scheme.weight->bits,
                          .w_shift = group_shift(weight.scheme.group_size),
                          .slice = 0,
                          .parts = nullptr};
  if (is_float_row(args)) return float_row(args, device.processors, device.stream);
  args.slice = choose_slices(args, device.processors).size;
  if (args.slice < args.k) args.parts = allocate<float>(device, div_up(args.k, args.slice) * x.rows * weight.n);
  return float_matmul(args, device.stream);
}

// x quantized for int_matmul; rows are padded, so that only the weight decides whether copies are aligned.
struct Operand {
  QuantizedX x;
  Order order;

  Operand(const Matrix& x, const Scheme& scheme)
      : x{nullptr, nullptr, round_up(x.cols, 32)},
        order(scheme.weight->in_place() ? Order::plain : Order::interleaved) {}

  cudaError_t quantize(const Matrix& from, const Scheme& scheme, const Device& device) {
    x.q = allocate<int8_t>(device, from.rows * x.stride);
    x.scales = allocate<float>(device, from.rows * scheme.act_groups(from.cols));
    return quantize_rows(rows_args(from, x, scheme.act_group_size, order), device.stream);
  }
};

cudaError_t linear_int(const Matrix& x, const QuantizedX& quantized, const Weight& weight, const Bias& bias, void* out,
                       DType out_dtype, const Device& device) {
  const IntMatmulArgs args = {.x = quantized.q,
                              .x_scales = quantized.scales,
                              .weight = weight.qweight,
                              .scales = weight.scales,
                              .zeros = weight.zeros,
                              .bias = bias,
                              .out = out,
                              .out_dtype = out_dtype,
                              .m = static_cast<int>(x.rows),
                              .n = static_cast<int>(weight.n),
                              .k = static_cast<int>(x.cols),
                              .x_stride = quantized.stride,
                              .weight_stride = weight.row_bytes,
                              .x_shift = group_shift(weight.scheme.act_group_size),
                              .w_shift = group_shift(weight.scheme.group_size)};
  const Storage storage = weight.scheme.weight->in_place() ? Storage::int8 : Storage::int4;
  return int_matmul(args, storage, device.processors, device.stream);
}

}  // namespace

cudaError_t linear(const Matrix& x, const Weight& weight, const Bias& bias, void* out, DType out_dtype,
                   const Device& device) {
  if (x.rows == 0 || weight.n == 0) return cudaSuccess;
  if (!weight.scheme.int_activations()) return linear_float(x, weight, bias, out, out_dtype, device);
  Operand operand(x, weight.scheme);
  const cudaError_t error = operand.quantize(x, weight.scheme, device);
  if (error != cudaSuccess) return error;
  return linear_int(x, operand.x, weight, bias, out, out_dtype, device);
}

cudaError_t linear_with_saved_input(const Matrix& x, const Weight& weight, const Bias& bias, void* out, DType out_dtype,
                                    int8_t* q, float* scales, const Device& device) {
  const cudaError_t error = quantize_activation(x, weight.scheme, q, scales, device);
  if (error != cudaSuccess || x.rows == 0 || weight.n == 0) return error;
  const Operand operand(x, weight.scheme);
  // What is saved is what is multiplied, unless the product needs its rows padded or in another order.
  const bool same = operand.order == Order::plain && operand.x.stride == x.cols;
  if (!same) return linear(x, weight, bias, out, out_dtype, device);
  return linear_int(x, {q, scales, x.cols}, weight, bias, out, out_dtype, device);
}

cudaError_t int_grad_input(const QuantizedRows& grad, const Weight& weight, const float* column_scales, void* out,
                           DType out_dtype, const Device& device) {
  if (grad.rows == 0) return cudaSuccess;
  const uint8_t* integers = weight.qweight;
  int64_t stride = weight.k;
  if (!weight.scheme.weight->in_place() || column_scales != nullptr) {
    // The product of a gradient needs bytes whose scale does not depend on the row: they are made first, for the time
    // of this call.
    stride = round_up(weight.k, 16);
    auto* const bytes = allocate<int8_t>(device, weight.n * stride);
    const cudaError_t error = unpack_weight(weight, column_scales, bytes, stride, device.stream);
    if (error != cudaSuccess) return error;
    integers = reinterpret_cast<const uint8_t*>(bytes);
  }
  const IntMatmulArgs args = {.x = grad.data,
                              .x_scales = grad.scales,
                              .weight = integers,
                              .scales = column_scales,
                              .zeros = nullptr,
                              .bias = {nullptr, DType::float32},
                              .out = out,
                              .out_dtype = out_dtype,
                              .m = static_cast<int>(grad.rows),
                              .n = static_cast<int>(weight.k),
                              .k = static_cast<int>(weight.n),
                              .x_stride = weight.n,
                              .weight_stride = stride,
                              .x_shift = kWholeRow,
                              .w_shift = kWholeRow};
  return int_matmul(args, Storage::int8_across, device.processors, device.stream);
}

}  // namespace qk::cuda
