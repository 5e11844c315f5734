// Rows of patches, the A of a convolution: row m holds what lies under the kernel at output pixel m.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/api.h"

namespace qk {

// Bytes past the end of what patches are read from and copied to that may be touched, too.
constexpr int64_t kPatchSlack = 64;

// Patches of padded images, gathered when a row is read: no matrix of them is in memory.
struct Patches {
  const char* images;  // [batch, height, width, channels], and kPatchSlack bytes
  int64_t element;     // bytes of a value
  int64_t height, width, channels;
  int64_t out_height, out_width;
  ConvGeometry geometry;
  const float* scales = nullptr;  // of integers: [batch]
  int64_t first = 0;              // the output pixel of row 0

  int64_t columns() const { return geometry.kernel_height * geometry.kernel_width * channels; }

  float scale(int64_t m) const { return scales[(first + m) / (out_height * out_width)]; }

  // Row m: where it lies, if it is contiguous there, or gathered into scratch, of columns() values and kPatchSlack
  // bytes.
  const char* row(int64_t m, char* scratch) const {
    const int64_t pixel = first + m, x = pixel % out_width, y = pixel / out_width % out_height;
    const int64_t image = pixel / out_width / out_height, value = channels * element;
    const char* corner =
        images + ((image * height + y * geometry.stride_height) * width + x * geometry.stride_width) * value;
    const bool dense = geometry.dilation_width == 1 || geometry.kernel_width == 1;
    const int64_t pieces = dense ? 1 : geometry.kernel_width, bytes = dense ? geometry.kernel_width * value : value;
    if (dense && geometry.kernel_height == 1) return corner;
    char* target = scratch;
    for (int64_t i = 0; i < geometry.kernel_height; ++i) {
      const char* source = corner + i * geometry.dilation_height * width * value;
      for (int64_t j = 0; j < pieces; ++j, source += geometry.dilation_width * value, target += bytes)
        copy(source, bytes, target);
    }
    return scratch;
  }

 private:
  // Pieces are short: whole vectors are copied, which the next piece overwrites from its beginning on.
  static void copy(const char* source, int64_t bytes, char* target) {
    constexpr int64_t kVector = 16;
    static_assert(kVector <= kPatchSlack);
    for (int64_t i = 0; i < bytes; i += kVector) std::memcpy(target + i, source + i, kVector);
  }
};

}  // namespace qk
