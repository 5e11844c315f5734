#include "emulator.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <deque>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

// Saves the registers that a call preserves and the stack pointer in *save, and goes on where `load` was saved.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emulator {

Schedule schedule;
Counts counts;
Position position;

namespace {

constexpr int kWarp = 32;
constexpr size_t kPage = 4096, kStack = 64 * 1024, kMaxThreads = 1024, kMaxShared = 48 * 1024;

struct Copy {
  uint8_t* shared;
  const uint8_t* global;
  int bytes;
};

struct Warp {
  const char* instruction = nullptr;
  void* operands[kWarp];
  int arrived = 0, finished = 0;
  uint64_t meetings = 0;
};

struct Thread {
  dim3 place;
  int lane;
  Warp* warp;
  void* stack;
  bool done;
  const uint64_t* waits_on;  // blocked while *waits_on == waits_for
  uint64_t waits_for;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Pages {
  uint8_t* data;
  size_t size;
};

// Memory whose end lies at a page that cannot be touched, after one before it.
Pages guarded_pages(size_t size) {
  const size_t inner = (size + kPage - 1) / kPage * kPage;
  auto* const all = static_cast<uint8_t*>(
      mmap(nullptr, inner + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (all == MAP_FAILED) {
    perror("mmap");
    abort();
  }
  mprotect(all, kPage, PROT_NONE);
  mprotect(all + kPage + inner, kPage, PROT_NONE);
  return {all, inner + 2 * kPage};
}

Thread* current = nullptr;
void* scheduler_stack = nullptr;
const std::function<void()>* kernel_body = nullptr;
Pages stacks, shared_pages;
uint8_t* shared_begin = nullptr;
size_t shared_size = 0;
uint64_t barriers_passed = 0;
int at_barrier = 0, running = 0;
bool recording = false;
std::vector<Launch> recorded;
std::string message;
sigjmp_buf give_up;

void to_scheduler() {
  ++counts.switches;
  emulator_switch(&current->stack, scheduler_stack);
}

void wait_for_change(const uint64_t& what) {
  current->waits_on = &what;
  current->waits_for = what;
  to_scheduler();
}

void open_barrier() {
  at_barrier = 0;
  ++barriers_passed;
  ++counts.barriers;
}

void arrive(const Copy& copy) {
  memset(copy.shared, 0, 16);
  memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
}

void check_shared(const uint8_t* p, size_t size) {
  if (p < shared_begin || p + size > shared_begin + shared_size) fail("a shared address is out of bounds");
  check_aligned(p, size);
}

void thread_main() {
  (*kernel_body)();
  Thread& thread = *current;
  for (const auto& group : thread.groups) {
    if (!group.empty()) fail("a thread ends before its copies were waited for");
  }
  if (!thread.open.empty()) fail("a thread ends before its copies were waited for");
  thread.done = true;
  ++thread.warp->finished;
  if (thread.warp->arrived != 0) fail("a lane ends while others of its warp wait for it");
  --running;
  if (at_barrier != 0 && at_barrier == running) open_barrier();
  to_scheduler();
}

void prepare(Thread& thread, size_t index, Warp* warp) {
  thread.place = dim3(static_cast<unsigned>(index));
  thread.lane = static_cast<int>(index) % kWarp;
  thread.warp = warp;
  thread.done = false;
  thread.waits_on = nullptr;
  thread.open.clear();
  thread.groups.clear();
  auto** const top = reinterpret_cast<void**>(stacks.data + kPage + (index + 1) * kStack);
  memset(top - 8, 0, 8 * sizeof(void*));
  top[-2] = reinterpret_cast<void*>(&thread_main);
  thread.stack = top - 8;
}

bool blocked(const Thread& thread) {
  return thread.done || (thread.waits_on != nullptr && *thread.waits_on == thread.waits_for);
}

// Runs a warp until all its lanes are blocked; whether any of them ran.
bool run_warp(std::vector<Thread>& threads, size_t first, unsigned rotation) {
  bool ran = false;
  for (bool more = true; more;) {
    more = false;
    for (unsigned i = 0; i < kWarp; ++i) {
      Thread& thread = threads[first + (i + rotation) % kWarp];
      if (blocked(thread)) continue;
      thread.waits_on = nullptr;
      current = &thread;
      position.thread = thread.place;
      ran = more = true;
      emulator_switch(&scheduler_stack, thread.stack);
    }
  }
  return ran;
}

void run_block(std::vector<Thread>& threads, std::vector<Warp>& warps, std::mt19937_64& random) {
  for (size_t i = 0; i < shared_size; ++i) shared_begin[i] = static_cast<uint8_t>(random());
  std::fill(warps.begin(), warps.end(), Warp());
  for (size_t i = 0; i < threads.size(); ++i) prepare(threads[i], i, &warps[i / kWarp]);
  running = static_cast<int>(threads.size());
  at_barrier = 0;
  std::vector<size_t> order(warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  while (running > 0) {
    std::shuffle(order.begin(), order.end(), random);
    bool ran = false;
    for (const size_t warp : order) ran |= run_warp(threads, warp * kWarp, static_cast<unsigned>(random() % kWarp));
    if (!ran) fail("deadlock: every thread waits");
  }
}

void on_fault(int, siginfo_t* info, void*) {
  char text[96];
  snprintf(text, sizeof text, "access to memory of no buffer at %p", info->si_addr);
  message = text;
  siglongjmp(give_up, 1);
}

void install_fault_handler() {
  static uint8_t handler_stack[64 * 1024];
  const stack_t alternate{handler_stack, 0, sizeof handler_stack};
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

void run_grid(const Launch& launch) {
  std::mt19937_64 random(schedule.seed);
  std::vector<Thread> threads(static_cast<size_t>(launch.threads));
  std::vector<Warp> warps(threads.size() / kWarp);
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; ++x) {
        position = {dim3(), dim3(x, y, z), dim3(static_cast<unsigned>(launch.threads)), launch.grid};
        run_block(threads, warps, random);
      }
    }
  }
}

}  // namespace

void fail(const char* what) {
  const dim3 block = position.block;
  message = std::string(what) + " (block " + std::to_string(block.x) + ", " + std::to_string(block.y) + ", thread " +
            (current != nullptr ? std::to_string(current->place.x) : "none") + ")";
  siglongjmp(give_up, 1);
}

cudaError_t launch(const Launch& launch, const std::function<void()>& body) {
  if (recording) {
    recorded.push_back(launch);
    return cudaSuccess;
  }
  if (stacks.data == nullptr) {
    stacks = guarded_pages(kMaxThreads * kStack);
    shared_pages = guarded_pages(kMaxShared);
  }
  install_fault_handler();
  current = nullptr;
  if (sigsetjmp(give_up, 1) != 0) return cudaErrorLaunchFailure;
  if (launch.threads % kWarp != 0 || launch.threads > static_cast<int>(kMaxThreads) || launch.threads < kWarp) {
    fail("a block must have whole warps and at most 1024 threads");
  }
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) fail("an empty grid");
  if (launch.shared_bytes > kMaxShared) fail("more shared memory than a kernel has without asking");
  shared_size = (launch.shared_bytes + 15) / 16 * 16;
  shared_begin = shared_pages.data + shared_pages.size - kPage - (shared_size + 127) / 128 * 128;
  kernel_body = &body;
  run_grid(launch);
  return cudaSuccess;
}

uint8_t* shared_memory() { return shared_begin; }

void sync_block() {
  if (++at_barrier == running) {
    open_barrier();
  } else {
    wait_for_change(barriers_passed);
  }
}

void meet(const char* name, void* operands, void (*all)(void* const (&lanes)[32])) {
  Warp& warp = *current->warp;
  if (warp.finished != 0) fail("a warp instruction after lanes of the warp have ended");
  if (warp.arrived != 0 && strcmp(warp.instruction, name) != 0) fail("lanes of a warp meet at different instructions");
  warp.instruction = name;
  warp.operands[current->lane] = operands;
  if (++warp.arrived < kWarp) {
    wait_for_change(warp.meetings);
    return;
  }
  all(warp.operands);
  warp.arrived = 0;
  ++warp.meetings;
}

void check_aligned(const void* p, size_t size) {
  if (reinterpret_cast<uintptr_t>(p) % size != 0) fail("a misaligned address");
}

void begin_copy(uint8_t* shared, const uint8_t* global, int bytes) {
  check_shared(shared, 16);
  check_aligned(global, 16);
  if (bytes < 0 || bytes > 16) fail("a copy of less than 0 or more than 16 bytes");
  current->open.push_back({shared, global, bytes});
  if (schedule.early_copies) {
    arrive(current->open.back());
  }
}

void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void wait_copies(int pending) {
  auto& groups = current->groups;
  for (; groups.size() > static_cast<size_t>(pending); groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (!schedule.early_copies) arrive(copy);
    }
  }
}

// Lane l, with g = l / 4 and t = l % 4: register i of a holds four bytes of row g + 8 (i % 2) from column 4 t + 16 (i /
// 2); register i of b those of column g from row 4 t + 16 i; c register i is row g + 8 (i / 2), column 2 t + i % 2.
template <class Element, class Sum, class Widen>
void multiply(void* const (&lanes)[32], Widen widen) {
  constexpr int kPerWord = 4 / sizeof(Element), kDepth = 8 * kPerWord;
  Sum a[16][kDepth], b[8][kDepth];
  for (int l = 0; l < kWarp; ++l) {
    const auto& operands = *static_cast<const Multiply*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      Element values[kPerWord];
      memcpy(values, &operands.a[i], 4);
      for (int v = 0; v < kPerWord; ++v) {
        a[g + 8 * (i % 2)][kPerWord * t + v + kDepth / 2 * (i / 2)] = widen(values[v]);
      }
      if (i >= 2) continue;
      memcpy(values, &operands.b[i], 4);
      for (int v = 0; v < kPerWord; ++v) b[g][kPerWord * t + v + kDepth / 2 * i] = widen(values[v]);
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    auto* const c = static_cast<Sum*>(static_cast<const Multiply*>(lanes[l])->c);
    for (int i = 0; i < 4; ++i) {
      const Sum* const row = a[l / 4 + 8 * (i / 2)];
      const Sum* const column = b[2 * (l % 4) + i % 2];
      Sum sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += row[k] * column[k];
      c[i] += sum;
    }
  }
  ++counts.products;
}

void multiply_int8(void* const (&lanes)[32]) {
  multiply<int8_t, uint32_t>(lanes, [](int8_t v) { return static_cast<uint32_t>(int32_t{v}); });
}
void multiply_float16(void* const (&lanes)[32]) {
  multiply<uint16_t, float>(lanes, [](uint16_t v) { return float16_value(v); });
}
void multiply_bfloat16(void* const (&lanes)[32]) {
  multiply<uint16_t, float>(lanes, [](uint16_t v) { return __uint_as_float(uint32_t{v} << 16); });
}

namespace {

void load(void* const (&lanes)[32], bool transposed) {
  const auto operands = [&](int lane) { return *static_cast<const LoadMatrices*>(lanes[lane]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) {
      const uint8_t* const p = operands(8 * matrix + row).row;
      check_shared(p, 16);
      const unsigned bank = 1u << ((p - shared_begin) / 16 % 8);
      counts.conflicts += (banks & bank) != 0;
      banks |= bank;
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int half = 0; half < 2; ++half) {
        const int row = transposed ? 2 * (l % 4) + half : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + half;
        memcpy(reinterpret_cast<uint8_t*>(&operands(l).r[matrix]) + 2 * half,
               operands(8 * matrix + row).row + 2 * column, 2);
      }
    }
  }
  ++counts.matrices;
}

}  // namespace

void load_matrices(void* const (&lanes)[32]) { load(lanes, false); }
void load_matrices_transposed(void* const (&lanes)[32]) { load(lanes, true); }

float float16_value(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
uint16_t float16_bits(float v) { return std::bit_cast<uint16_t>(static_cast<_Float16>(v)); }

}  // namespace emulator

// What host.py calls.
extern "C" {

void emulator_schedule(uint64_t seed, int early_copies) { emulator::schedule = {seed, early_copies != 0}; }

const char* emulator_message() { return emulator::message.c_str(); }

// The counts of what ran since the last call, in the order of Counts.
void emulator_counts(uint64_t* out) {
  memcpy(out, &emulator::counts, sizeof emulator::counts);
  emulator::counts = {};
}

// Memory that ends at a page that cannot be touched, as far as an alignment of 16 bytes allows, preceded by another.
void* emulator_allocate(size_t size) {
  const emulator::Pages pages = emulator::guarded_pages(size);
  return pages.data + pages.size - emulator::kPage - (size + 15) / 16 * 16;
}

void emulator_free(void* p, size_t size) {
  const size_t inner = (size + emulator::kPage - 1) / emulator::kPage * emulator::kPage;
  uint8_t* const end = static_cast<uint8_t*>(p) + (size + 15) / 16 * 16;
  munmap(end - inner - emulator::kPage, inner + 2 * emulator::kPage);
}

// From now on launches are noted instead of run, or run again.
void emulator_record(int on) {
  emulator::recording = on != 0;
  if (on != 0) emulator::recorded.clear();
}

int emulator_recorded() { return static_cast<int>(emulator::recorded.size()); }
const char* emulator_kernel(int i) { return emulator::recorded[static_cast<size_t>(i)].kernel.c_str(); }
const char* emulator_arguments(int i) { return emulator::recorded[static_cast<size_t>(i)].arguments.data(); }

// Grid, threads, shared bytes and bytes of arguments.
void emulator_shape(int i, int64_t* out) {
  const auto& launch = emulator::recorded[static_cast<size_t>(i)];
  const int64_t shape[] = {launch.grid.x,
                           launch.grid.y,
                           launch.grid.z,
                           launch.threads,
                           static_cast<int64_t>(launch.shared_bytes),
                           static_cast<int64_t>(launch.arguments.size())};
  memcpy(out, shape, sizeof shape);
}
}
