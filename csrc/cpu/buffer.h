// Scratch memory for one call: uninitialized, aligned to a cache line.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

namespace qk {

struct Scratch {
  void* data;
  int64_t bytes;
};

// At least `bytes`. Large blocks that are given back are kept by the thread for its next call: otherwise the system
// takes them away after each call and clears their pages anew, which can take as long as a product.
Scratch take_scratch(int64_t bytes);
void give_scratch(Scratch scratch);

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : scratch_(take_scratch(count * static_cast<int64_t>(sizeof(T)))) {}
  ~Buffer() { give_scratch(scratch_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(scratch_, other.scratch_);
    return *this;
  }

  T* get() { return static_cast<T*>(scratch_.data); }
  const T* get() const { return static_cast<const T*>(scratch_.data); }
  T& operator[](int64_t i) { return get()[i]; }
  const T& operator[](int64_t i) const { return get()[i]; }

 private:
  Scratch scratch_;
};

}  // namespace qk
