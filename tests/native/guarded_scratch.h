// The scratch of the core (cpu/buffer.h), guarded: this replaces the aligned operator new of the program that includes
// it.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "guarded.h"

// Under sanitizers the operators stay what they are: that of addresses guards scratch itself, and for that of threads a
// mutex would order what threads do.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

namespace {

// Memory that ends where unreadable memory begins, but for its alignment: the bytes that are left must keep their
// value.
class Scratch {
 public:
  Scratch(size_t size, size_t alignment)
      : size_(size), slack_(qk::round_up(size, alignment) - size), pages_(size + slack_) {
    std::memset(data(), kFill, size + slack_);
  }

  char* data() const { return pages_.end() - slack_ - size_; }

  bool intact() const {
    const char* bytes = data() + size_;
    return std::all_of(bytes, bytes + slack_, [](char byte) { return byte == kFill; });
  }

 private:
  static constexpr char kFill = 0x5a;
  size_t size_, slack_;
  Pages pages_;
};

std::mutex scratch_mutex;
std::vector<std::unique_ptr<Scratch>> live_scratch;

}  // namespace

void* operator new(size_t size, std::align_val_t alignment) {
  const std::lock_guard lock(scratch_mutex);
  live_scratch.push_back(std::make_unique<Scratch>(size, static_cast<size_t>(alignment)));
  return live_scratch.back()->data();
}

void operator delete(void* data, std::align_val_t) noexcept {
  const std::lock_guard lock(scratch_mutex);
  const auto found =
      std::find_if(live_scratch.begin(), live_scratch.end(), [=](const auto& s) { return s->data() == data; });
  if (found == live_scratch.end() || !(*found)->intact()) {
    std::fprintf(stderr, "the core wrote past the end of its scratch\n");
    std::abort();
  }
  live_scratch.erase(found);
}
#endif
