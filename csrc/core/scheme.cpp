#include <stdexcept>
#include <string>

#include "core/types.h"

namespace qk {
namespace {

// Consumes `prefix` from the front of `text`.
bool take(std::string_view& text, std::string_view prefix) {
  if (text.substr(0, prefix.size()) != prefix) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// Consumes one of the group sizes; 0 if there is none.
int64_t take_group(std::string_view& text) {
  if (take(text, "32")) return 32;
  if (take(text, "64")) return 64;
  if (take(text, "128")) return 128;
  return 0;
}

}  // namespace

Scheme parse_scheme(std::string_view name) {
  std::string_view rest = name;
  Scheme scheme{};
  const auto invalid = [&] { return std::invalid_argument("unknown scheme '" + std::string(name) + "'"); };

  if (take(rest, "w8")) {
    scheme.weight_bits = 8;
  } else if (take(rest, "w4")) {
    scheme.weight_bits = 4;
  } else {
    throw invalid();
  }
  if (take(rest, "a8")) {
    scheme.act_bits = 8;
  } else if (take(rest, "a16")) {
    scheme.act_bits = 16;
  } else {
    throw invalid();
  }
  if (take(rest, "-g") && (scheme.group_size = take_group(rest)) == 0) throw invalid();
  scheme.symmetric = !take(rest, "-asym");
  if (!scheme.symmetric && scheme.weight_bits != 4) throw invalid();
  if (take(rest, "-ag")) {
    if (scheme.act_bits != 8 || (scheme.act_group_size = take_group(rest)) == 0) throw invalid();
  }
  if (!rest.empty()) throw invalid();
  return scheme;
}

}  // namespace qk
