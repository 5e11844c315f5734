"""Executes PTX, the assembly of NVIDIA GPUs, on the CPU: kernels as the compiler wrote them, without a GPU.

    program     text -> instructions
    memory      global buffers and shared memory, with checks
    machine     a block of threads as NumPy vectors: control flow, registers, launch
    arithmetic, conversion, movement, warp, warpgroup
                what the instructions do, by the PTX ISA

Covered is what Triton and nvcc emit for sm_80, sm_89 and sm_120, and of sm_90 the integer wgmma: no tcgen05, mbarrier,
TMA or clusters. Timing, caches and the weakness of the memory model between blocks are not modelled.
"""
