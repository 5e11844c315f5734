#include "cpu/drivers/drivers.h"

namespace qk {
namespace {

// Best first: of a16 schemes, then of a8 schemes.
const LinearDriver* const kDrivers[] = {
    &kFloatDot, &kFloatMatmul, &kTileDot, &kGroupDot, &kRowDot, &kTileGroups, &kIntMatmul,
};

}  // namespace

bool few_rows(const Kernels& kernels, const Scheme& scheme, int64_t m) {
  if (!scheme.int_activations()) return m <= kernels.dots.most_rows_float;
  const RowDot& dot = kernels.dots.of(*scheme.weight);
  return m <= (scheme.grouped() ? dot.most_rows_grouped : dot.most_rows);
}

const LinearDriver& choose_driver(const Kernels& kernels, const Scheme& scheme, int64_t m) {
  const LinearDriver* const* driver = kDrivers;
  while (!(*driver)->accepts(kernels, scheme, m)) ++driver;  // the last of a8 and of a16 schemes accept any m
  return **driver;
}

}  // namespace qk
