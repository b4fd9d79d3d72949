// Launches of masked_lstsq; the steps of a thread block are in masked_lstsq.h.
#include "masked_lstsq.h"

#include <cuda_runtime.h>

namespace sparsebert::cuda {
namespace {

struct ThreadBlock {
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  template <typename Step>
  __device__ void each(const Step& step) const {
    step(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

// in_shared is known at compile time, so that the compiler knows which memory each access goes to.
template <bool in_shared>
__global__ void __launch_bounds__(lstsq_threads, lstsq_resident / lstsq_threads)
    masked_lstsq_kernel(MaskedLstsqJob job, double* work, std::int64_t doubles) {
  extern __shared__ __align__(16) double dynamic[];
  __shared__ MaskedLstsqShared shared;
  for (std::int64_t group = blockIdx.x; group < job.groups.count; group += gridDim.x) {
    if constexpr (in_shared) {
      solve_group(ThreadBlock{}, job, group, shared, dynamic);
    } else {
      solve_group(ThreadBlock{}, job, group, shared, work + blockIdx.x * doubles);
    }
  }
}

cudaError_t plan(std::int64_t k, std::int64_t g, std::int64_t count, MaskedLstsqPlan* plan) {
  int device = 0, bytes = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) *plan = plan_masked_lstsq(k, g, count, bytes, processors);
  return error;
}

}  // namespace

int masked_lstsq_work(std::int64_t k, std::int64_t g, std::int64_t count, std::int64_t* doubles) {
  MaskedLstsqPlan planned{};
  const cudaError_t error = plan(k, g, count, &planned);
  *doubles = planned.work_doubles;
  return error;
}

int masked_lstsq(const MaskedLstsqJob& job, std::int64_t k, std::int64_t g, double* work, void* stream) {
  if (job.groups.count == 0) return cudaSuccess;
  MaskedLstsqPlan planned{};
  cudaError_t error = plan(k, g, job.groups.count, &planned);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(planned.blocks);
  const auto on = static_cast<cudaStream_t>(stream);
  if (planned.work_doubles == 0) {
    const auto bytes = static_cast<int>(planned.shared_doubles * sizeof(double));
    error = cudaFuncSetAttribute(masked_lstsq_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    masked_lstsq_kernel<true><<<blocks, planned.threads, bytes, on>>>(job, nullptr, 0);
  } else {
    masked_lstsq_kernel<false><<<blocks, planned.threads, 0, on>>>(job, work, planned.work_doubles / planned.blocks);
  }
  return cudaGetLastError();
}

}  // namespace sparsebert::cuda
