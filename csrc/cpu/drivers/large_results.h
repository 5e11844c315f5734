// Results that are larger than the caches.
//
// NOTE [large results]. The gradient of a weight is larger than the caches and often lies in memory that is fresh from
// the system, which clears a page when it is first written to. Threads that work on neighbouring columns get to the
// same pages at the same time, and all fault on them. So the system is asked to map the pages first, each by one
// thread, and the result is stored past the caches (non-temporal stores), which hold the operands.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qk {

constexpr int64_t kLargeResult = 16 << 20;  // bytes

// Has the system map the pages of a large result, each by one thread. Smaller ones are seldom fresh, and asking costs.
inline void map_pages(void* out, int64_t bytes, const Parallel& parallel) {
#ifdef MADV_POPULATE_WRITE
  if (bytes < kLargeResult) return;
  constexpr int64_t kPage = 4096, kPart = 2 << 20;  // a part of the memory is one huge page, if those are used
  const auto begin = round_up(reinterpret_cast<int64_t>(out), kPage), end = reinterpret_cast<int64_t>(out) + bytes;
  const int64_t first = begin / kPart, parts = div_up(end, kPart) - first;
  parallel(parts, [&](int64_t i, int64_t j) {
    const int64_t from = std::max(begin, (first + i) * kPart), to = std::min(end / kPage * kPage, (first + j) * kPart);
    // An old system does not know this: then the pages are mapped as they are written to.
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_POPULATE_WRITE);
  });
#endif
}

// Whether a result of this size is to be stored past the caches; maps its pages if so.
inline bool begin_nontemporal(const Kernels& kernels, void* out, int64_t bytes, const Parallel& parallel) {
  if (kernels.tiles.end_nontemporal == nullptr || bytes < kLargeResult) return false;
  map_pages(out, bytes, parallel);
  return true;
}

}  // namespace qk
