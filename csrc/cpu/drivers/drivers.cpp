#include "cpu/drivers/drivers.h"

namespace qk {
namespace {

// Best first.
const LinearDriver* const kDrivers[] = {
    &kTileDot, &kGroupDot, &kRowDot, &kTileGroups, &kIntMatmul, &kFloatDot, &kFloatMatmul,
};

}  // namespace

bool few_rows(const Kernels& kernels, const Scheme& scheme, int64_t m) {
  const DotRows& most = kernels.dots.most_rows;
  if (!scheme.int_activations()) return m <= most.floats;
  if (scheme.weight_bits == 8) return m <= (scheme.grouped() ? most.int8_grouped : most.int8);
  return m <= (scheme.grouped() ? most.int4_grouped : most.int4);
}

const LinearDriver& choose_driver(const Kernels& kernels, const Scheme& scheme, int64_t m) {
  const LinearDriver* const* driver = kDrivers;
  while (!(*driver)->accepts(kernels, scheme, m)) ++driver;  // the last of a8 and of a16 schemes accept any m
  return **driver;
}

}  // namespace qk
