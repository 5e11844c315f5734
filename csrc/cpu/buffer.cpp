#include "cpu/buffer.h"

#include <vector>

namespace qk {
namespace {

constexpr auto kLine = std::align_val_t{64};
constexpr int64_t kLarge = 64 << 10;     // smaller blocks stay in the lists of the allocator
constexpr int64_t kMostKept = 32 << 20;  // bytes, of a thread
constexpr int64_t kMostWasted = 2;       // a block serves requests of at least this part of it

// The large blocks of a thread that are not in use, the one given back last at the end.
class Kept {
 public:
  Kept() = default;
  ~Kept() {
    for (const Scratch& block : blocks_) ::operator delete(block.data, kLine);
  }
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;

  // The smallest that serves; its data is null if none does.
  Scratch take(int64_t bytes) {
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool serves = block->bytes >= bytes && block->bytes <= kMostWasted * bytes;
      if (serves && (best == blocks_.end() || block->bytes < best->bytes)) best = block;
    }
    if (best == blocks_.end()) return {nullptr, 0};
    const Scratch found = *best;
    bytes_ -= found.bytes;
    blocks_.erase(best);
    return found;
  }

  // Lets go of the oldest while there is no room.
  void give(Scratch block) {
    blocks_.push_back(block);
    bytes_ += block.bytes;
    while (bytes_ > kMostKept) {
      bytes_ -= blocks_.front().bytes;
      ::operator delete(blocks_.front().data, kLine);
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  std::vector<Scratch> blocks_;
  int64_t bytes_ = 0;
};

thread_local Kept kept;

}  // namespace

Scratch take_scratch(int64_t bytes) {
  const Scratch found = bytes >= kLarge ? kept.take(bytes) : Scratch{nullptr, 0};
  return found.data != nullptr ? found : Scratch{::operator new(bytes, kLine), bytes};
}

void give_scratch(Scratch scratch) {
  if (scratch.bytes >= kLarge) {
    kept.give(scratch);
  } else {
    ::operator delete(scratch.data, kLine);
  }
}

}  // namespace qk
