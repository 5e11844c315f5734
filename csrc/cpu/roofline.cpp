#include "cpu/roofline.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>

#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/kernels/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qk {
namespace {

using Clock = std::chrono::steady_clock;

// The time is cut into windows, and the best one counts: on a shared machine the others measure the neighbours.
constexpr double kWindowSeconds = 0.01;
constexpr int kMinWindows = 3;

// Independent chains: enough for 2 instructions a cycle of latency 6, and with two operands and a temporary they fit
// into 16 registers.
constexpr int kChains = 12;
constexpr int64_t kPasses = 1024;  // of all chains between two looks at the clock

// NOTE [probes]. The instruction stands in an asm statement, so that the compiler can neither replace nor merge nor
// drop it, and the vectors are compiler types, so that no header for an ISA is needed. Both operands are filled with
// kOperand, an ordinary number in every format: zeros would toggle no wires and might raise the clock.
constexpr int32_t kOperand = 0x3f3e3f3e;  // bytes 62 and 63, about 0.74 as float and as bfloat16

template <int Bytes>
using Vector __attribute__((vector_size(Bytes))) = int32_t;

struct PeakProbe {
  const char* name;
  bool (*supported)();
  int operations;  // of one instruction
  void (*block)();
};

#if defined(__x86_64__)

#define QK_PEAK(function, isa, bytes, instructions)                                                                 \
  __attribute__((target(isa))) void function() {                                                                    \
    Vector<bytes> chain[kChains] = {}, a = chain[0] + kOperand, b = a, temporary;                                   \
    for (int64_t pass = 0; pass < kPasses; ++pass) {                                                                \
      _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) {                                                  \
        asm volatile(instructions : [chain] "+v"(chain[i]), [temporary] "=&v"(temporary) : [a] "v"(a), [b] "v"(b)); \
      }                                                                                                             \
    }                                                                                                               \
  }

QK_PEAK(vpdpbusd_avx512, "avx512f", 64, "vpdpbusd %[b], %[a], %[chain]")
QK_PEAK(vpdpbusd_avxvnni, "avx2", 32, "%{vex%} vpdpbusd %[b], %[a], %[chain]")
QK_PEAK(vdpbf16ps_avx512, "avx512f", 64, "vdpbf16ps %[b], %[a], %[chain]")
QK_PEAK(vpmaddwd_avx512, "avx512f", 64, "vpmaddwd %[b], %[a], %[temporary]\n\tvpaddd %[temporary], %[chain], %[chain]")
QK_PEAK(vpmaddwd_avx2, "avx2", 32, "vpmaddwd %[b], %[a], %[temporary]\n\tvpaddd %[temporary], %[chain], %[chain]")
QK_PEAK(fma_avx512, "avx512f", 64, "vfmadd231ps %[b], %[a], %[chain]")
QK_PEAK(fma_avx2, "avx2", 32, "vfmadd231ps %[b], %[a], %[chain]")

#undef QK_PEAK

// The operands have to lie in tiles: 2 x 2 of them, and 4 accumulators.
#define QK_TILE_PEAK(function, isa, multiply)                      \
  __attribute__((target(isa))) void function() {                   \
    alignas(64) Vector<64> operand[16];                            \
    for (Vector<64>& row : operand) row = Vector<64>{} + kOperand; \
    const TileState state(amx_kernels(), sizeof operand[0]);       \
    asm volatile("" : : "r"(operand) : "memory");                  \
    _tile_loadd(4, operand, 64);                                   \
    _tile_loadd(5, operand, 64);                                   \
    _tile_loadd(6, operand, 64);                                   \
    _tile_loadd(7, operand, 64);                                   \
    for (int64_t i = 0; i < kPasses * kChains; i += 4) {           \
      multiply(0, 4, 6);                                           \
      multiply(1, 4, 7);                                           \
      multiply(2, 5, 6);                                           \
      multiply(3, 5, 7);                                           \
    }                                                              \
  }

QK_TILE_PEAK(tdpbssd_amx, "amx-tile,amx-int8,avx512f", _tile_dpbssd)
QK_TILE_PEAK(tdpbf16ps_amx, "amx-tile,amx-bf16,avx512f", _tile_dpbf16ps)

#undef QK_TILE_PEAK

bool has_isa(const char* name) {
  const std::vector<std::string> isas = supported_isas();
  return std::find(isas.begin(), isas.end(), name) != isas.end();
}

bool has_amx() { return has_isa("amx"); }

const PeakProbe kPeakProbes[] = {
    {"tdpbssd-amx", has_amx, 2 * 16 * 16 * 64, tdpbssd_amx},
    {"tdpbf16ps-amx", has_amx, 2 * 16 * 16 * 32, tdpbf16ps_amx},
    {"vpdpbusd-avx512", [] { return __builtin_cpu_supports("avx512vnni") != 0; }, 128, vpdpbusd_avx512},
    {"vpdpbusd-avxvnni", [] { return has_isa("avxvnni"); }, 64, vpdpbusd_avxvnni},
    {"vdpbf16ps-avx512", [] { return __builtin_cpu_supports("avx512bf16") != 0; }, 64, vdpbf16ps_avx512},
    {"vpmaddwd-avx512", [] { return __builtin_cpu_supports("avx512bw") != 0; }, 64, vpmaddwd_avx512},
    {"vpmaddwd-avx2", [] { return __builtin_cpu_supports("avx2") != 0; }, 32, vpmaddwd_avx2},
    {"fma-avx512", [] { return __builtin_cpu_supports("avx512f") != 0; }, 32, fma_avx512},
    {"fma-avx2", [] { return __builtin_cpu_supports("fma") != 0; }, 16, fma_avx2},
};

#else

const std::vector<PeakProbe> kPeakProbes;  // none are written for other CPUs yet

#endif

// Reads `size` bytes, a multiple of kMinReadBlock, as four streams side by side: prefetchers follow each within its
// page, and DRAM delivers a fifth more than to one stream. The pages are ordinary ones, as those of a weight are.
constexpr int kReadStreams = 4;

#define QK_READ(function, isa, bytes)                                           \
  isa void function(const char* data, int64_t size) {                           \
    constexpr int kLoads = 2; /* of each stream in a pass */                    \
    const auto* vectors = reinterpret_cast<const Vector<bytes>*>(data);         \
    const int64_t length = size / kReadStreams / bytes;                         \
    Vector<bytes> sums[kReadStreams * kLoads] = {};                             \
    for (int64_t i = 0; i < length; i += kLoads) {                              \
      _Pragma("GCC unroll 8") for (int j = 0; j < kReadStreams * kLoads; ++j) { \
        sums[j] += vectors[j / kLoads * length + i + j % kLoads];               \
      }                                                                         \
    }                                                                           \
    _Pragma("GCC unroll 8") for (int j = 0; j < kReadStreams * kLoads; ++j) {   \
      asm volatile("" : : QK_REGISTER(sums[j]) : "memory");                     \
    }                                                                           \
  }

#if defined(__x86_64__)
#define QK_REGISTER "x"
QK_READ(read_avx512, __attribute__((target("avx512f"))), 64)
QK_READ(read_avx2, __attribute__((target("avx2"))), 32)
#else
#define QK_REGISTER "m"
#endif
QK_READ(read_generic, , 16)

#undef QK_READ
#undef QK_REGISTER

using Read = void (*)(const char*, int64_t);

Read best_read() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return read_avx512;
  if (__builtin_cpu_supports("avx2")) return read_avx2;
#endif
  return read_generic;
}

// Work per second of `threads` threads that start together, in the best window. work(thread) does a little and
// returns how much it was. These threads are the measurement itself, so the host's pool is not asked for them.
template <class Work>
double best_rate(int threads, double seconds, const Work& work) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  if (!(seconds > 0)) throw std::invalid_argument("seconds must be positive, got " + std::to_string(seconds));
  struct Span {
    Clock::time_point begin, end;
    double done;
  };
  const int windows = std::max(kMinWindows, static_cast<int>(seconds / kWindowSeconds));
  const std::chrono::duration<double> window(seconds / windows);
  std::vector<Span> spans(static_cast<size_t>(threads) * windows);
  std::barrier together(threads);
  const auto run = [&](int thread) {
    work(thread);  // first touch of its memory, and the clock frequency rises
    for (int w = 0; w < windows; ++w) {
      together.arrive_and_wait();
      Span span{Clock::now(), {}, 0};
      do {
        span.done += work(thread);
        span.end = Clock::now();
      } while (span.end - span.begin < window);
      spans[w * threads + thread] = span;
    }
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) pool.emplace_back(run, thread);
  for (std::thread& thread : pool) thread.join();

  double best = 0;
  for (int w = 0; w < windows; ++w) {
    Span all = spans[w * threads];
    for (int thread = 1; thread < threads; ++thread) {
      const Span& span = spans[w * threads + thread];
      all = {std::min(all.begin, span.begin), std::max(all.end, span.end), all.done + span.done};
    }
    best = std::max(best, all.done / std::chrono::duration<double>(all.end - all.begin).count());
  }
  return best;
}

}  // namespace

std::vector<std::string> peak_probes() {
  std::vector<std::string> names;
  for (const PeakProbe& probe : kPeakProbes) {
    if (probe.supported()) names.push_back(probe.name);
  }
  return names;
}

double peak(const std::string& name, int threads, double seconds) {
  std::string known;
  for (const PeakProbe& probe : kPeakProbes) {
    if (!probe.supported()) continue;
    if (name == probe.name) {
      return best_rate(threads, seconds, [&](int) {
        probe.block();
        return static_cast<double>(kPasses) * kChains * probe.operations;
      });
    }
    known += (known.empty() ? "" : ", ") + std::string(probe.name);
  }
  throw std::invalid_argument("probe must be one of those this CPU can run (" + known + "), got '" + name + "'");
}

double read_bandwidth(int64_t bytes_per_thread, int threads, double seconds) {
  if (bytes_per_thread < kMinReadBlock) {
    throw std::invalid_argument("bytes_per_thread must be at least " + std::to_string(kMinReadBlock) + ", got " +
                                std::to_string(bytes_per_thread));
  }
  constexpr int64_t kStep = 1 << 18;  // between two looks at the clock
  const int64_t size = bytes_per_thread / kMinReadBlock * kMinReadBlock;
  const Read read = best_read();
  struct Block {
    Buffer<char> data;
    int64_t position;  // -1: not yet touched
  };
  std::vector<std::unique_ptr<Block>> blocks;
  for (int thread = 0; thread < threads; ++thread) blocks.emplace_back(new Block{Buffer<char>(size), -1});
  return best_rate(threads, seconds, [&](int thread) {
    Block& block = *blocks[thread];
    if (block.position < 0) {
      std::memset(block.data.get(), 1, size);
      block.position = 0;
    }
    const int64_t bytes = std::min(kStep, size - block.position);
    read(block.data.get() + block.position, bytes);
    block.position = block.position + bytes < size ? block.position + bytes : 0;
    return static_cast<double>(bytes);
  });
}

}  // namespace qk
