// Numbers of docs/numerics.md and docs/formats.md that several files share.
#pragma once

#include <cstdint>

namespace qk {

// Rule 1: the range of values below it counts as 0, and their scale is 1.
constexpr float kTinyRange = 0x1p-96f;
constexpr uint32_t kTinyBits = 0x0f800000;  // its bits

// 1.5 * 2^23: adding it to a float below 2^22 and subtracting it again rounds to an integer, half to even.
constexpr float kRoundMagic = 12582912.0f;

// Rule 7: the dither of a column is that of the column before plus this.
constexpr uint32_t kDitherStep = 0x9e3779b9;

// Sizes of groups along k. The smaller ones divide the larger ones.
constexpr int64_t kGroupSizes[] = {16, 32, 64, 128};
constexpr int64_t kMinGroup = 16, kMaxGroup = 128;
constexpr int64_t kMinActGroup = 32;  // of activations; WeightFormat::least_group: of a weight

}  // namespace qk
