// The functions of csrc/cuda/device.cuh over the emulator.
#pragma once

#include "emulator.h"

namespace qk::cuda {

inline uint8_t* shared_memory() { return emulator::shared_memory(); }

inline Words4 load_16(const void* p) {
  emulator::check_aligned(p, 16);
  return *static_cast<const Words4*>(p);
}
inline Words2 load_8(const void* p) {
  emulator::check_aligned(p, 8);
  return *static_cast<const Words2*>(p);
}
inline void store_16(void* p, const Words4& v) {
  emulator::check_aligned(p, 16);
  *static_cast<Words4*>(p) = v;
}
inline void store_8(void* p, const Words2& v) {
  emulator::check_aligned(p, 8);
  *static_cast<Words2*>(p) = v;
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
  emulator::begin_copy(static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global), bytes);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kPending>
void wait_copies() {
  emulator::wait_copies(kPending);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::LoadMatrices operands{r, static_cast<const uint8_t*>(row)};
  emulator::meet("ldmatrix", &operands, emulator::load_matrices);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::LoadMatrices operands{r, static_cast<const uint8_t*>(row)};
  emulator::meet("ldmatrix.trans", &operands, emulator::load_matrices_transposed);
}
inline void multiply_int8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Multiply operands{c, a, b};
  emulator::meet("mma.s8", &operands, emulator::multiply_int8);
}
inline void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Multiply operands{c, a, b};
  emulator::meet("mma.f16", &operands, emulator::multiply_float16);
}
inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Multiply operands{c, a, b};
  emulator::meet("mma.bf16", &operands, emulator::multiply_bfloat16);
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return d;
}
inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

inline uint32_t subtract_float16(uint32_t a, uint32_t b) {
  uint32_t d = 0;
  for (int shift : {0, 16}) {
    const auto x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    d |= uint32_t{emulator::float16_bits(emulator::float16_value(x) - emulator::float16_value(y))} << shift;
  }
  return d;
}
inline uint32_t add_bfloat16(uint32_t a, uint32_t b) {
  uint32_t d = 0;
  for (int shift : {0, 16}) {
    const float x = __uint_as_float(a >> shift << 16), y = __uint_as_float(b >> shift << 16);
    const uint32_t bits = __float_as_uint(x + y);  // exact in float32 for the integers that kernels add
    if ((bits & 0xffff) != 0) emulator::fail("add_bfloat16: the sum is not a bfloat16 number");
    d |= bits >> 16 << shift;
  }
  return d;
}
inline uint16_t float16_bits(float v) { return emulator::float16_bits(v); }
inline float float16_value(uint16_t bits) { return emulator::float16_value(bits); }

template <class T>
T shuffle_xor(T v, int mask) {
  return emulator::shuffle_xor(v, mask);
}

inline void sync_block() { emulator::sync_block(); }

template <class Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, const Args& args) {
  Dl_info symbol;
  if (dladdr(reinterpret_cast<void*>(kernel), &symbol) == 0 || symbol.dli_sname == nullptr) {
    emulator::fail("the kernel has no name");
  }
  const std::string bytes(reinterpret_cast<const char*>(&args), sizeof(Args));
  return emulator::launch({symbol.dli_sname, grid, threads, shared_bytes, bytes}, [&] { kernel(args); });
}

}  // namespace qk::cuda
