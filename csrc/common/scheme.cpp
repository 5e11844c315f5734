#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "common/rules.h"
#include "common/types.h"

namespace qk {
namespace {

// Consumes `prefix` from the front of `text`.
bool take(std::string_view& text, std::string_view prefix) {
  if (text.substr(0, prefix.size()) != prefix) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// Consumes one of the group sizes from `least` on; 0 if there is none.
int64_t take_group(std::string_view& text, int64_t least) {
  for (const int64_t size : kGroupSizes) {
    if (size >= least && take(text, std::to_string(size))) return size;
  }
  return 0;
}

bool is_group(int64_t size, int64_t least) {
  const bool known = std::find(std::begin(kGroupSizes), std::end(kGroupSizes), size) != std::end(kGroupSizes);
  return size == 0 || (known && size >= least);
}

const char* suffix_of(Zeros zeros) { return zeros == Zeros::points ? "-asym" : zeros == Zeros::minima ? "-min" : ""; }

// Null for bits that no format has.
const WeightFormat* format_of(int64_t bits) {
  for (const WeightFormat* format : {&kInt8Weight, &kInt4Weight}) {
    if (format->bits == bits) return format;
  }
  return nullptr;
}

}  // namespace

Scheme parse_scheme(std::string_view name) {
  std::string_view rest = name;
  Scheme scheme{};
  const auto invalid = [&] { return std::invalid_argument("unknown scheme '" + std::string(name) + "'"); };

  for (const WeightFormat* format : {&kInt8Weight, &kInt4Weight}) {
    if (take(rest, "w" + std::to_string(format->bits))) scheme.weight = format;
  }
  for (const int bits : {8, 16}) {
    if (take(rest, "a" + std::to_string(bits))) scheme.act_bits = bits;
  }
  scheme.static_activations = scheme.act_bits == 8 && take(rest, "s");
  if (scheme.weight == nullptr || scheme.act_bits == 0) throw invalid();
  if (take(rest, "-g") && (scheme.group_size = take_group(rest, scheme.weight->least_group)) == 0) throw invalid();
  for (const Zeros zeros : {Zeros::points, Zeros::minima}) {
    if (scheme.symmetric() && take(rest, suffix_of(zeros))) scheme.zeros = zeros;
  }
  if (scheme.zeros == Zeros::points && !scheme.weight->has_zeros) throw invalid();
  if (take(rest, "-ag")) {
    if (scheme.act_bits != 8 || scheme.static_activations) throw invalid();
    if ((scheme.act_group_size = take_group(rest, kMinActGroup)) == 0) throw invalid();
  }
  if (!rest.empty()) throw invalid();
  return scheme;
}

Scheme scheme_of(int64_t code) {
  const auto invalid = [&] { return std::invalid_argument("unknown scheme code " + std::to_string(code)); };
  if (code < 0 || code / 10'000'000'000 > 1) throw invalid();
  const int64_t zeros = code / 1000 % 10;
  const Scheme scheme{.weight = format_of(code / 1'000'000'000 % 10),
                      .act_bits = static_cast<int>(code / 10'000'000 % 100),
                      .group_size = code / 10'000 % 1000,
                      .act_group_size = code % 1000,
                      .zeros = static_cast<Zeros>(zeros),
                      .static_activations = code / 10'000'000'000 == 1};
  const bool valid = scheme.weight != nullptr && (scheme.act_bits == 8 || scheme.act_bits == 16) &&
                     is_group(scheme.group_size, scheme.weight->least_group) &&
                     is_group(scheme.act_group_size, kMinActGroup) && zeros <= static_cast<int64_t>(Zeros::minima) &&
                     (scheme.zeros != Zeros::points || scheme.weight->has_zeros) &&
                     (scheme.act_group_size == 0 || (scheme.act_bits == 8 && !scheme.static_activations)) &&
                     (!scheme.static_activations || scheme.act_bits == 8);
  if (!valid) throw invalid();
  return scheme;
}

std::string name_of(const Scheme& scheme) {
  const auto group = [](const char* prefix, int64_t size) { return size == 0 ? "" : prefix + std::to_string(size); };
  return "w" + std::to_string(scheme.weight->bits) + "a" + std::to_string(scheme.act_bits) +
         (scheme.static_activations ? "s" : "") + group("-g", scheme.group_size) + suffix_of(scheme.zeros) +
         group("-ag", scheme.act_group_size);
}

}  // namespace qk
