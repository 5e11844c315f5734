// A failed allocation that says what for; Python gets it as a MemoryError.
#pragma once

#include <new>
#include <string>

#include "common/types.h"

namespace qk {

class QK_API OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(int64_t bytes, const std::string& what)
      : message_("out of memory: " + std::to_string(bytes) + " bytes for " + what) {}

  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

}  // namespace qk
