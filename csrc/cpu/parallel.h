// How a call is spread over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

#include "common/types.h"

namespace qk {

// The tasks of a call, in a share for each thread.
//
// NOTE [shares]. Equal shares finish at different times (cores differ, and other programs use them too), so idle
// threads steal pieces: a thread takes the pieces of its own share in order, then the last pieces of the others'
// shares.
class Shares {
 public:
  Shares(int64_t tasks, int count, int64_t pieces_each)
      : tasks_(tasks), piece_(div_up(tasks, pieces_each * count)), shares_(count) {
    const int64_t pieces = div_up(tasks, piece_);
    for (int i = 0; i < count; ++i) {
      shares_[i].range =
          Range{static_cast<uint32_t>(pieces * i / count), static_cast<uint32_t>(pieces * (i + 1) / count)};
    }
  }

  // Calls f(begin, end) for pieces of share `own`, then of the others, until none is left.
  template <class F>
  void run_share(int64_t own, const F& f) {
    const auto count = static_cast<int64_t>(shares_.size());
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t piece; (piece = next(shares_[(own + i) % count], i == 0)) >= 0;)
        f(piece * piece_, std::min((piece + 1) * piece_, tasks_));
    }
  }

 private:
  struct alignas(8) Range {
    uint32_t begin, end;
  };
  struct alignas(64) Share {
    std::atomic<Range> range;
  };

  // The first or the last piece of a share, or -1. Which thread takes a piece orders nothing, so relaxed is enough.
  static int64_t next(Share& share, bool first) {
    Range range = share.range.load(std::memory_order_relaxed);
    while (range.begin < range.end) {
      const Range rest = first ? Range{range.begin + 1, range.end} : Range{range.begin, range.end - 1};
      if (share.range.compare_exchange_weak(range, rest, std::memory_order_relaxed))
        return first ? range.begin : rest.end;
    }
    return -1;
  }

  int64_t tasks_, piece_;
  std::vector<Share> shares_;
};

// Carries the first exception of a call's threads over to the one that called.
class FirstError {
 public:
  // f(), whatever it throws.
  template <class F>
  void guard(const F& f) noexcept {
    try {
      f();
    } catch (...) {
      if (!taken_.test_and_set()) error_ = std::current_exception();
    }
  }

  // When all threads are done.
  void rethrow() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::atomic_flag taken_;
  std::exception_ptr error_;
};

// How a call may use threads. The core has none of its own: the binding passes its host's pool.
struct Parallel {
  int num_threads;
  // Calls body(begin, end, context) over a partition of [0, shares), each range of it in any thread, and returns when
  // all of it is done. There are never more shares than num_threads, so a pool of any size runs so many threads.
  void (*run)(int64_t shares, void (*body)(int64_t begin, int64_t end, void* context), void* context);
  int64_t pieces = 1;  // of a thread's share

  // Calls f(begin, end) for pieces of [0, tasks), in at most num_threads threads.
  template <class F>
  void operator()(int64_t tasks, const F& f) const {
    if (tasks <= 1 || num_threads <= 1) {
      if (tasks > 0) f(0, tasks);
      return;
    }
    const auto count = static_cast<int>(std::min<int64_t>(num_threads, tasks));
    if (pieces == 1) {
      split_evenly(count, [&](int64_t begin, int64_t end) { f(tasks * begin / count, tasks * end / count); });
      return;
    }
    Shares shares(tasks, count, pieces);
    split_evenly(count, [&](int64_t begin, int64_t end) {
      for (int64_t own = begin; own < end; ++own) shares.run_share(own, f);
    });
  }

 private:
  template <class F>
  void split_evenly(int64_t shares, const F& f) const {
    auto body = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
    run(shares, body, const_cast<F*>(&f));
  }
};

// Below this many multiply-adds a thread, starting it costs more than it saves. Tests that look for races set it to 1.
#if !defined(QK_MIN_WORK_PER_THREAD)
#define QK_MIN_WORK_PER_THREAD (1 << 18)
#endif
constexpr int64_t kMinWorkPerThread = QK_MIN_WORK_PER_THREAD;

inline int useful_threads(int threads, int64_t work) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(work / kMinWorkPerThread, 1)));
}

// `parallel` with as many threads and pieces as this many multiply-adds are worth. Work that is not large stays whole:
// a piece sets up its scratch anew.
inline Parallel limited_to_work(const Parallel& parallel, int64_t work) {
  constexpr int64_t kMostPieces = 8, kMinWorkPerPiece = 32 * kMinWorkPerThread;
  const int threads = useful_threads(parallel.num_threads, work);
  return {threads, parallel.run, std::clamp<int64_t>(work / threads / kMinWorkPerPiece, 1, kMostPieces)};
}

}  // namespace qk
