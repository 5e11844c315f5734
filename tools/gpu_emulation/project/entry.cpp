// The operators of csrc/cuda/api.h for ctypes: each argument a number or an address. The result is 0, or the launch
// failed for what emulator_message says.
#include <cstdlib>
#include <vector>

#include "cuda/api.h"
#include "cuda/device.cuh"
#include "cuda/float_matmul.h"
#include "cuda/int_matmul.h"

extern "C" {
void* emulator_allocate(size_t size);
void emulator_free(void* p, size_t size);
}

namespace {

// Scratch of the launches. Recorded ones run later, so it is freed when the next call begins.
struct Scratch {
  void* data;
  size_t size;
};
std::vector<Scratch> scratch;

void* allocate(size_t size, void*) {
  auto* const data = static_cast<uint8_t*>(emulator_allocate(size));
  for (size_t i = 0; i < size; ++i) data[i] = static_cast<uint8_t>(0xa5 ^ i);
  scratch.push_back({data, size});
  return data;
}

// A device with few processors, so that small matrices reach the large tiles.
qk::cuda::Device device(int processors) {
  for (const Scratch& piece : scratch) emulator_free(piece.data, piece.size);
  scratch.clear();
  return {nullptr, processors, allocate, nullptr};
}

qk::Matrix matrix(const void* data, int dtype, int64_t rows, int64_t cols) {
  return {data, static_cast<qk::DType>(dtype), rows, cols};
}

}  // namespace

extern "C" {

int emulator_scratch_count() { return static_cast<int>(scratch.size()); }
void* emulator_scratch(int i, size_t* size) {
  *size = scratch[static_cast<size_t>(i)].size;
  return scratch[static_cast<size_t>(i)].data;
}

int quantize_activation(const void* x, int dtype, int64_t rows, int64_t cols, const char* scheme, int8_t* q,
                        float* scales) {
  return qk::cuda::quantize_activation(matrix(x, dtype, rows, cols), qk::parse_scheme(scheme), q, scales, device(1));
}

int quantize_rows_stochastic(const void* x, int dtype, int64_t rows, int64_t cols, const float* factors, uint64_t seed,
                             uint32_t rng_stream, int8_t* q, float* scales) {
  return qk::cuda::quantize_rows_stochastic(matrix(x, dtype, rows, cols), factors, {seed, rng_stream}, q, scales,
                                            device(1));
}

int linear(const void* x, int dtype, int64_t rows, int64_t cols, const void* qweight, const float* scales,
           const uint8_t* zeros, int64_t n, const char* scheme, const void* bias, int bias_dtype, void* out,
           int out_dtype, int processors) {
  const qk::Weight weight(qk::parse_scheme(scheme), n, cols, qweight, scales, zeros);
  return qk::cuda::linear(matrix(x, dtype, rows, cols), weight, {bias, static_cast<qk::DType>(bias_dtype)}, out,
                          static_cast<qk::DType>(out_dtype), device(processors));
}

int linear_with_saved_input(const void* x, int dtype, int64_t rows, int64_t cols, const void* qweight,
                            const float* scales, const uint8_t* zeros, int64_t n, const char* scheme, const void* bias,
                            int bias_dtype, void* out, int out_dtype, int8_t* q, float* x_scales, int processors) {
  const qk::Weight weight(qk::parse_scheme(scheme), n, cols, qweight, scales, zeros);
  return qk::cuda::linear_with_saved_input(matrix(x, dtype, rows, cols), weight,
                                           {bias, static_cast<qk::DType>(bias_dtype)}, out,
                                           static_cast<qk::DType>(out_dtype), q, x_scales, device(processors));
}

// Why these tiles: of an `a8` forward with K a multiple of 16 or not, and of an `a16` forward.
const char* tile_reason(int m, int n, int k, int processors) {
  qk::cuda::IntMatmulArgs args = {};
  args.m = m;
  args.n = n;
  args.x_stride = args.weight_stride = args.k = k;
  return qk::cuda::choose_tile(args, qk::cuda::Storage::int8, processors).reason;
}

const char* slices_reason(int m, int n, int k, int processors) {
  qk::cuda::FloatMatmulArgs args = {};
  args.m = m;
  args.n = n;
  args.k = k;
  return qk::cuda::choose_slices(args, processors).reason;
}

int int_grad_input(const int8_t* grad, const float* grad_scales, int64_t rows, const void* qweight, const float* scales,
                   const uint8_t* zeros, int64_t n, int64_t k, const char* scheme, const float* column_scales,
                   void* out, int out_dtype, int processors) {
  const qk::Weight weight(qk::parse_scheme(scheme), n, k, qweight, scales, zeros);
  return qk::cuda::int_grad_input({grad, grad_scales, rows, n}, weight, column_scales, out,
                                  static_cast<qk::DType>(out_dtype), device(processors));
}
}
