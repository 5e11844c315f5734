// Which instruction set the kernels use: detected once, or forced by QKERNELS_ISA or force_isa().
#pragma once

#include <string>
#include <vector>

#include "common/types.h"

namespace qk {

// Names in ascending order of preference. "compiled": in this binary; "supported": this CPU and OS can run them too.
QK_API std::vector<std::string> compiled_isas();
QK_API std::vector<std::string> supported_isas();

// The ISA in use. Throws std::invalid_argument if QKERNELS_ISA names one that is unknown or unsupported.
QK_API std::string current_isa();

// Use `name` from now on, in all threads. Throws std::invalid_argument if it is unknown or unsupported.
QK_API void force_isa(const std::string& name);

}  // namespace qk
