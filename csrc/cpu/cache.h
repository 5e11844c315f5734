// The size of this CPU's caches.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace qk {

// Bytes of L2 that belong to one core; a common size where the system does not tell.
inline int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = [] {
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return size > 0 ? int64_t{size} : int64_t{1} << 20;
  }();
  return bytes;
#else
  return int64_t{1} << 20;
#endif
}

}  // namespace qk
