// Results that are larger than the caches.
//
// NOTE [stream]. The gradient of a weight is larger than the caches and often lies in memory that is fresh from the
// system, whose pages (of 2 MB, if huge) are cleared when they are first written to. Threads that work on neighbouring
// columns get to the same pages at the same time, and all clear them. So the pages are touched first, each by one
// thread, and the result is stored past the caches, which hold the operands.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/kernels.h"

namespace qk {

// Whether a result of this size is to be stored past the caches; touches its pages if so.
inline bool begin_stream(const Kernels& kernels, void* out, int64_t bytes, const Parallel& parallel) {
  constexpr int64_t kLeast = 16 << 20, kHugePage = 2 << 20;
  if (kernels.end_stream == nullptr || bytes < kLeast) return false;
  parallel(div_up(bytes, kHugePage), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) static_cast<char*>(out)[i * kHugePage] = 0;
  });
  return true;
}

}  // namespace qk
