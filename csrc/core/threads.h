// How many threads a call is worth.
#pragma once

#include <algorithm>

#include "core/types.h"

namespace qk {

// Below this many multiply-adds a thread, starting it costs more than it saves.
constexpr int64_t kMinWorkPerThread = int64_t{1} << 18;

inline int useful_threads(int threads, int64_t work) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(work / kMinWorkPerThread, 1)));
}

inline Parallel limit(const Parallel& parallel, int64_t work) {
  return {useful_threads(parallel.num_threads, work), parallel.run};
}

}  // namespace qk
