// Launches of sparse_matmul for V:2:M; the steps of a thread block are in sparse_matmul.h.
#include "sparse_matmul.h"

#include <cuda_runtime.h>

#include <climits>

namespace sparsebert::cuda {
namespace {

template <typename Shape>
struct ThreadBlock {
  VnmLane<Shape::tiles> lane;
  std::uint32_t shared;  // address of the buffers

  template <typename Step>
  __device__ void each(const Step& step) {
    step(static_cast<int>(threadIdx.x), lane);
  }

  __device__ void copy(int to, const Bf16* from, bool inside, int) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared + to * 2),
                 "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
                 : "memory");
  }
  __device__ void commit(int) { asm volatile("cp.async.commit_group;" ::: "memory"); }
  __device__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(buffers - 2) : "memory");
    __syncthreads();
  }

  __device__ void load_x() {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(lane.x[0]), "=r"(lane.x[1]), "=r"(lane.x[2]), "=r"(lane.x[3])
                 : "r"(shared + lane.address * 2)
                 : "memory");
  }

  // The indices of a row ascend, which the ordered form of the instruction requires; ptxas advises against the other.
  template <int selector>
  __device__ static void mma(float (&sum)[4], const std::uint32_t (&w)[4], const std::uint32_t (&x)[4],
                             std::uint32_t metadata) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(metadata),
          "n"(selector));
  }
  __device__ void multiply(int n) {
#pragma unroll
    for (int t = 0; t < Shape::tiles; t += 2) {
      mma<0>(lane.sums[t][n], lane.weights.values[t], lane.x, lane.weights.metadata[t / 2]);
      mma<1>(lane.sums[t + 1][n], lane.weights.values[t + 1], lane.x, lane.weights.metadata[t / 2]);
    }
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, 512 / Shape::threads) sparse_matmul_vnm_kernel(VnmMatmulJob job) {
  __shared__ __align__(16) Bf16 shared[buffers * buffer_size];
  ThreadBlock<Shape> block;
  block.shared = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  multiply_strip<Shape>(block, job, blockIdx.x);
}

template <typename Shape>
cudaError_t launch(const VnmMatmulJob& job, std::int64_t blocks, cudaStream_t stream) {
  sparse_matmul_vnm_kernel<Shape><<<static_cast<unsigned>(blocks), Shape::threads, 0, stream>>>(job);
  return cudaGetLastError();
}

}  // namespace

int sparse_matmul_vnm(const VnmMatmulJob& job, void* stream) {
  const std::int64_t blocks = strips_of(job.weight) * (round_up(job.tokens, panel_tokens) / panel_tokens);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (job.weight.strip_rows) {
    case 32: return launch<VnmShape<2, 1>>(job, blocks, on);
    case 64: return launch<VnmShape<4, 1>>(job, blocks, on);
    case 128: return launch<VnmShape<4, 2>>(job, blocks, on);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sparsebert::cuda
