// What the CUDA kernels share. Everything but the .cu files is plain C++ too: tests/cuda_layout.cpp compiles it with
// g++ and runs the same code on a CPU.
#pragma once

#include "../ops.h"

// SPARSEBERT_BOTH: arithmetic that the host also needs. SPARSEBERT_KERNEL: parts of a kernel; a host runs them in tests
// only.
#if defined(__CUDACC__)
#define SPARSEBERT_BOTH __host__ __device__ inline
#define SPARSEBERT_KERNEL __device__ inline
#else
#define SPARSEBERT_BOTH inline
#define SPARSEBERT_KERNEL inline
#endif

namespace sparsebert::cuda {

// A kernel is written as the steps of one thread block, over a type `ThreadBlock` that says how its threads run: on a
// device all at once, in tests one after the other. A step takes the number of the thread.
constexpr int warp = 32;

SPARSEBERT_BOTH constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
SPARSEBERT_BOTH constexpr std::int64_t round_up(std::int64_t a, std::int64_t to) { return (a + to - 1) / to * to; }

}  // namespace sparsebert::cuda
