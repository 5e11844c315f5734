// What this CPU can do at most: peaks of the instructions that products are made of, and how fast memory is read.
#pragma once

#include <string>
#include <vector>

#include "common/types.h"

namespace qk {

// Instructions this CPU can run, by name: "vpdpbusd-avx512", "vpdpbusd-avxvnni" (int8), "vdpbf16ps-avx512" (bfloat16),
// "vpmaddwd-avx512", "vpmaddwd-avx2" (int8 without VNNI), "fma-avx512", "fma-avx2" (float32).
QK_API std::vector<std::string> peak_probes();

// Operations per second of `threads` threads together that do nothing else; a multiply-add counts as 2. A product of
// 8-bit integers by vpmaddwd needs a vpaddd beside it, which is included. Throws std::invalid_argument for a probe
// that is not in peak_probes(), and for threads < 1 or seconds <= 0.
QK_API double peak(const std::string& probe, int threads, double seconds);

// Bytes per second that `threads` threads together read, each over and over from a block of its own of
// `bytes_per_thread`: the size decides which level of the memory serves them. Throws std::invalid_argument as above,
// and for blocks smaller than kMinReadBlock.
constexpr int64_t kMinReadBlock = 4096;
QK_API double read_bandwidth(int64_t bytes_per_thread, int threads, double seconds);

}  // namespace qk
