#include "cuda/unpack.h"

#include "cuda/device.cuh"
#include "cuda/rules.cuh"

namespace qk::cuda {

constexpr int kThreads = 128;

struct UnpackArgs {
  const uint8_t* weight;
  const float* scales;
  const uint8_t* zeros;
  const float* column_scales;
  int8_t* out;
  int64_t n, k, row_bytes, stride, groups;
  int bits, group;  // group 0: the row
};

// A thread makes the bytes of two neighbouring k.
__global__ void __launch_bounds__(kThreads) unpack_weight_kernel(const UnpackArgs args) {
  const int64_t n = blockIdx.x, first = 2 * (int64_t{blockIdx.y} * kThreads + threadIdx.x);
  for (int i = 0; i < 2; ++i) {
    const int64_t k = first + i;
    if (k >= args.k) return;
    const int64_t group = n * args.groups + (args.group != 0 ? k / args.group : 0);
    int q;
    if (args.bits == 8) {
      q = static_cast<int8_t>(args.weight[n * args.row_bytes + k]);
    } else {
      const int byte = args.weight[n * args.row_bytes + k / 2];
      q = (i == 0 ? byte & 15 : byte >> 4) - (args.zeros != nullptr ? args.zeros[group] : 8);
    }
    if (args.column_scales != nullptr) {
      const float inverse = __fdiv_rn(1.0f, args.column_scales[k]);
      q = round_nearest(__fmul_rn(__int2float_rn(q), args.scales[group]), inverse);
    }
    args.out[n * args.stride + k] = static_cast<int8_t>(q);
  }
}

cudaError_t unpack_weight(const Weight& weight, const float* column_scales, int8_t* out, int64_t stride,
                          cudaStream_t stream) {
  if (weight.n == 0) return cudaSuccess;
  const UnpackArgs args = {.weight = weight.qweight,
                           .scales = weight.scales,
                           .zeros = weight.zeros,
                           .column_scales = column_scales,
                           .out = out,
                           .n = weight.n,
                           .k = weight.k,
                           .row_bytes = weight.row_bytes,
                           .stride = stride,
                           .groups = weight.groups,
                           .bits = weight.scheme.weight->bits,
                           .group = static_cast<int>(weight.scheme.group_size)};
  const dim3 grid(static_cast<unsigned>(weight.n), static_cast<unsigned>(div_up(weight.k, 2 * kThreads)));
  return launch(unpack_weight_kernel, grid, kThreads, 0, stream, args);
}

}  // namespace qk::cuda
