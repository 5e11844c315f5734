// CUDA C++ on the host: what sections of the PTX ISA say, computed for one block at a time, whose threads are fibers.
// Instructions of whole warps are meetings of their 32 lanes. README.md says how a kernel is written for it.
//
// Unkind where the ISA leaves freedom: shared memory starts as noise, a copy arrives when it is waited for or at once
// (Schedule::early_copies), and a warp runs on, in an order drawn from a seed, until it stands at a barrier.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <functional>
#include <string>

#include "cuda_runtime.h"

namespace emulator {

struct Schedule {
  uint64_t seed;
  bool early_copies;
};

// What kernels did since it was last cleared. `conflicts`: further passes through the banks that ldmatrix needed.
struct Counts {
  uint64_t products, matrices, conflicts, barriers, switches;
};

struct Launch {
  std::string kernel;  // mangled
  dim3 grid;
  int threads;
  size_t shared_bytes;
  std::string arguments;  // the bytes of the kernel's parameter
};

extern Schedule schedule;
extern Counts counts;

// The place of the running thread.
struct Position {
  dim3 thread, block, block_size, grid;
};
extern Position position;

// Ends the launch with a message; does not return.
[[noreturn]] void fail(const char* what);

// Runs `body` for each thread of the grid, or only notes the launch if launches are recorded.
cudaError_t launch(const Launch& launch, const std::function<void()>& body);

uint8_t* shared_memory();
void sync_block();

// Meets the other lanes of the warp, all at the instruction `name`; the last to come runs `all` on the operands of all.
void meet(const char* name, void* operands, void (*all)(void* const (&lanes)[32]));

void begin_copy(uint8_t* shared, const uint8_t* global, int bytes);
void commit_copies();
void wait_copies(int pending);

// Fails unless `size` bytes at p are aligned to their size.
void check_aligned(const void* p, size_t size);

struct Multiply {
  void* c;
  const uint32_t *a, *b;
};
void multiply_int8(void* const (&lanes)[32]);
void multiply_float16(void* const (&lanes)[32]);
void multiply_bfloat16(void* const (&lanes)[32]);

struct LoadMatrices {
  uint32_t* r;
  const uint8_t* row;
};
void load_matrices(void* const (&lanes)[32]);
void load_matrices_transposed(void* const (&lanes)[32]);

float float16_value(uint16_t bits);
uint16_t float16_bits(float v);

// Runs a kernel whose arguments are any values. cudaSuccess, or emulator_message() says what is wrong with it.
template <class... Parameters, class... Arguments>
cudaError_t run(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                const Arguments&... arguments) {
  return launch({"", grid, threads, shared_bytes, ""}, [&] { kernel(arguments...); });
}

template <class T>
T shuffle_xor(T v, int mask) {
  struct Operands {
    T in, out;
    int mask;
  } operands{v, v, mask};
  meet("shfl.bfly", &operands, [](void* const(&lanes)[32]) {
    for (int l = 0; l < 32; ++l) {
      auto* const mine = static_cast<Operands*>(lanes[l]);
      mine->out = static_cast<Operands*>(lanes[l ^ mine->mask])->in;
    }
  });
  return operands.out;
}

}  // namespace emulator

#define threadIdx (emulator::position.thread)
#define blockIdx (emulator::position.block)
#define blockDim (emulator::position.block_size)
#define gridDim (emulator::position.grid)
