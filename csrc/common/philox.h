// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the random bits of stochastic
// rounding: a pure function of a seed and of where a value lies, so that it depends on neither threads nor vectors.
#pragma once

#include "common/types.h"

namespace qk {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier[2] = {0xd2511f53, 0xcd9e8d57};
constexpr uint32_t kPhiloxWeyl[2] = {0x9e3779b9, 0xbb67ae85};
constexpr int kPhiloxWords = 4;  // 32-bit words in a block

// The blocks of one row of values: block b, for the values 4 b .. 4 b + 3, has the counter (b, row, rng_stream, 0) and
// the key (seed low, seed high).
struct PhiloxRow {
  uint32_t keys[kPhiloxRounds][2];
  uint32_t row, rng_stream;

  PhiloxRow(const Random& random, int64_t index)
      : row(static_cast<uint32_t>(random.first_row + index)), rng_stream(random.rng_stream) {
    uint32_t key[2] = {static_cast<uint32_t>(random.seed), static_cast<uint32_t>(random.seed >> 32)};
    for (auto& round : keys) {
      for (int i = 0; i < 2; ++i) {
        round[i] = key[i];
        key[i] += kPhiloxWeyl[i];
      }
    }
  }

  void block(uint32_t index, uint32_t (&words)[kPhiloxWords]) const {
    uint32_t c[kPhiloxWords] = {index, row, rng_stream, 0};
    for (const auto& key : keys) {
      const uint64_t product0 = uint64_t{kPhiloxMultiplier[0]} * c[0], product1 = uint64_t{kPhiloxMultiplier[1]} * c[2];
      c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key[0];
      c[1] = static_cast<uint32_t>(product1);
      c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key[1];
      c[3] = static_cast<uint32_t>(product0);
    }
    for (int i = 0; i < kPhiloxWords; ++i) words[i] = c[i];
  }
};

}  // namespace qk
