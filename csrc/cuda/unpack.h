// A stored weight as bytes with one scale a column, for the product of a gradient (unpack.cu).
#pragma once

#include <cuda_runtime.h>

#include "common/types.h"

namespace qk::cuda {

// out: int8 [weight.n, stride], of which [weight.n, weight.k] is written: the integers, or with column_scales those of
// docs/numerics.md, rule 6.
cudaError_t unpack_weight(const Weight& weight, const float* column_scales, int8_t* out, int64_t stride,
                          cudaStream_t stream);

}  // namespace qk::cuda
