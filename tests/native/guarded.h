// Arrays that end where unreadable memory begins, so that a kernel that reads or writes past them is killed.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#include "common/types.h"

// At least `size` bytes, up to where unreadable memory begins.
class Pages {
 public:
  explicit Pages(int64_t size) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    bytes_ = qk::round_up(size, page) + page;
    memory_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(end(), page, PROT_NONE) != 0) throw std::bad_alloc();
  }
  ~Pages() { munmap(memory_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  char* end() const { return memory_ + bytes_ - sysconf(_SC_PAGESIZE); }

 private:
  char* memory_;
  int64_t bytes_;
};

// An array that ends there.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : pages_(count * sizeof(T)), data_(reinterpret_cast<T*>(pages_.end()) - count) {}

  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  Pages pages_;
  T* data_;
};
