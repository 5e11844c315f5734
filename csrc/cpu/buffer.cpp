#include "cpu/buffer.h"

#include <algorithm>
#include <array>

#include "common/out_of_memory.h"

namespace qk {
namespace {

constexpr auto kLine = std::align_val_t{64};
constexpr int64_t kLarge = 64 << 10;     // smaller blocks stay in the lists of the allocator
constexpr int64_t kMostKept = 32 << 20;  // bytes, of a thread
constexpr int64_t kMostWasted = 2;       // a block serves requests of at least this part of it
constexpr int kMostBlocks = 32;

// The large blocks of a thread that are not in use, the one given back last at the end. Nothing here allocates, for
// blocks are given back in destructors.
class Kept {
 public:
  Kept() = default;
  ~Kept() { drop(count_); }
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;

  // The smallest that serves; its data is null if none does.
  Scratch take(int64_t bytes) {
    int best = count_;
    for (int i = 0; i < count_; ++i) {
      const bool serves = blocks_[i].bytes >= bytes && blocks_[i].bytes <= kMostWasted * bytes;
      if (serves && (best == count_ || blocks_[i].bytes < blocks_[best].bytes)) best = i;
    }
    if (best == count_) return {nullptr, 0};
    const Scratch found = blocks_[best];
    erase(best, 1);
    return found;
  }

  // Lets go of the oldest while there is no room.
  void give(Scratch block) {
    if (count_ == kMostBlocks) drop(1);
    blocks_[count_++] = block;
    bytes_ += block.bytes;
    while (bytes_ > kMostKept) drop(1);
  }

 private:
  // The oldest.
  void drop(int count) {
    for (int i = 0; i < count; ++i) ::operator delete(blocks_[i].data, kLine);
    erase(0, count);
  }

  void erase(int first, int count) {
    for (int i = first; i < first + count; ++i) bytes_ -= blocks_[i].bytes;
    std::copy(blocks_.begin() + first + count, blocks_.begin() + count_, blocks_.begin() + first);
    count_ -= count;
  }

  std::array<Scratch, kMostBlocks> blocks_;
  int count_ = 0;
  int64_t bytes_ = 0;
};

thread_local Kept kept;

alignas(64) char nothing[64];  // what an empty buffer points to

}  // namespace

Scratch take_scratch(int64_t bytes) {
  if (bytes == 0) return {nothing, 0};
  const Scratch found = bytes >= kLarge ? kept.take(bytes) : Scratch{nullptr, 0};
  if (found.data != nullptr) return found;
  void* const data = ::operator new(bytes, kLine, std::nothrow);
  if (data == nullptr) throw OutOfMemory(bytes, "the scratch of an operator");
  return {data, bytes};
}

void give_scratch(Scratch scratch) {
  if (scratch.bytes == 0) return;
  if (scratch.bytes >= kLarge) {
    kept.give(scratch);
  } else {
    ::operator delete(scratch.data, kLine);
  }
}

}  // namespace qk
