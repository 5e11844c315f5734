// Every instruction that C++ cannot name, each behind one inline function with the section of the PTX ISA that
// defines it, by its title, for numbers change between releases. Kernels use these, the CUDA intrinsics for rounded
// arithmetic, and C++; so the same sources also compile for the host over `emulated_device.h` of tools/gpu_emulation,
// which defines the same functions by what those sections say.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(8) Words2 {
  uint32_t w[2];
};

#ifdef QK_EMULATED
#include "emulated_device.h"
#else

namespace qk::cuda {

// Dynamic shared memory, from its first byte.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  return dynamic_shared;
}

// Data Movement and Conversion: cvta. The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Data Movement and Conversion: ld. 16 or 8 bytes, which must be aligned.
__device__ __forceinline__ Words4 load_16(const void* p) { return *static_cast<const Words4*>(p); }
__device__ __forceinline__ Words2 load_8(const void* p) { return *static_cast<const Words2*>(p); }

// Data Movement and Conversion: st. 16 or 8 bytes, which must be aligned.
__device__ __forceinline__ void store_16(void* p, const Words4& v) { *static_cast<Words4*>(p) = v; }
__device__ __forceinline__ void store_8(void* p, const Words2& v) { *static_cast<Words2*>(p) = v; }

// Data Movement and Conversion: cp.async. `bytes` (0 to 16) from global to shared memory, and zeros up to 16. Both
// addresses aligned.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Data Movement and Conversion: cp.async.commit_group. The copies so far form a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Data Movement and Conversion: cp.async.wait_group. All but the last kPending groups of this thread have arrived.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Warp-level matrix load instruction: ldmatrix. Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix
// l / 8, and register r of lane l holds elements 2 (l % 4), + 1 of row l / 4 of matrix r.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Warp-level matrix load instruction: ldmatrix with .trans. The same of the transposed matrices: elements of rows 2 (l
// % 4), + 1 in column l / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Matrix Fragments for mma.m16n8k32. c += a b of signed bytes, modulo 2^32. Lane l, with g = l / 4 and t = l % 4:
// register i of a holds row g + 8 (i % 2), columns 4 t .. + 3 of half i / 2 of the depth; of b column g, the same rows
// of half i; of c row g + 8 (i / 2), column 2 t + i % 2.
__device__ __forceinline__ void multiply_int8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Matrix Fragments for mma.m16n8k16 with floating point type. c += a b of float16 in float32. As above, with pairs 2 t,
// + 1 of the depth for four bytes.
__device__ __forceinline__ void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Matrix Fragments for mma.m16n8k16 with floating point type. The same of bfloat16.
__device__ __forceinline__ void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Data Movement and Conversion: prmt. Byte i of the result is byte (selector >> 4 i) & 7 of b:a.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// Logic and Shift: lop3. (a & b) | c in one instruction, whatever the compiler thinks of the constants.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Half Precision Floating Point: sub. Of two float16 each.
__device__ __forceinline__ uint32_t subtract_float16(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Half Precision Floating Point: fma. The sum a * 1 + b of two bfloat16 each, for sm_80 has no other sum of them.
__device__ __forceinline__ uint32_t add_bfloat16(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return d;
}

// Data Movement and Conversion: cvt. Between float32 and the bits of float16.
__device__ __forceinline__ uint16_t float16_bits(float v) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}
__device__ __forceinline__ float float16_value(uint16_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

// Data Movement and Conversion: shfl.sync. The value of lane ^ mask; all lanes of the warp take part.
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

// Parallel Synchronization and Communication: barrier. All threads of the block.
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Starts a kernel and says whether it could be started.
template <class Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Args& args) {
  void* parameters[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernel(kernel, grid, dim3(threads), parameters, shared_bytes, stream);
}

}  // namespace qk::cuda
#endif
