// Scratch memory for one call: uninitialized, aligned to a cache line.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

namespace qk {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kLine}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{kLine}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }

  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr size_t kLine = 64;
  T* data_;
};

}  // namespace qk
