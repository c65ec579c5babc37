// Enough of CUDA for clang to compile csrc/cuda without a toolkit: as CUDA for NVIDIA's GPUs, as HIP for AMD's. What
// runs is the business of the real headers.
#pragma once

#define __CUDACC__
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))
#define __grid_constant__

#pragma clang force_cuda_host_device begin
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#pragma clang force_cuda_host_device end

struct dim3 {
  unsigned x, y, z;
  __host__ __device__ dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
__host__ __device__ inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace shim {
#if defined(__HIP__)
__device__ inline unsigned thread() { return __builtin_amdgcn_workitem_id_x(); }
__device__ inline unsigned block() { return __builtin_amdgcn_workgroup_id_x(); }
__device__ inline unsigned grid() { return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x(); }
__device__ inline int shuffle(int value, int lanes) {
  const int self = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u));
  return __builtin_amdgcn_ds_bpermute((self ^ lanes) << 2, value);
}
#else
__device__ inline unsigned thread() { return __nvvm_read_ptx_sreg_tid_x(); }
__device__ inline unsigned block() { return __nvvm_read_ptx_sreg_ctaid_x(); }
__device__ inline unsigned grid() { return __nvvm_read_ptx_sreg_nctaid_x(); }
__device__ inline int shuffle(int value, int lanes) { return __nvvm_shfl_sync_bfly_i32(~0u, value, lanes, 31); }
__device__ inline float fsqrt_rn(float a) { return __nvvm_sqrt_rn_f(a); }
__device__ inline double dsqrt_rn(double a) { return __nvvm_sqrt_rn_d(a); }
#endif
template <unsigned (*kValue)()>
struct Index {
  __declspec(property(get = value)) unsigned x;
  __device__ unsigned value() const { return kValue(); }
};
}  // namespace shim

extern const __device__ shim::Index<shim::thread> threadIdx;
extern const __device__ shim::Index<shim::block> blockIdx;
extern const __device__ shim::Index<shim::grid> gridDim;

#if defined(__HIP__)
__device__ inline void __syncthreads() {
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "workgroup");
  __builtin_amdgcn_s_barrier();
}
__device__ inline void __threadfence() { __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "agent"); }
__device__ inline float sqrtf(float a) { return __builtin_sqrtf(a); }
__device__ inline double sqrt(double a) { return __builtin_sqrt(a); }
#else
__device__ inline void __threadfence() { __nvvm_membar_gl(); }
__device__ inline float __fsqrt_rn(float a) { return shim::fsqrt_rn(a); }
__device__ inline double __dsqrt_rn(double a) { return shim::dsqrt_rn(a); }
__device__ double rint(double);
__device__ float rintf(float);
#endif
__device__ double exp(double);

#if defined(__HIP__)
__device__ inline double __shfl_xor(double value, int lanes, int) {
#else
__device__ inline double __shfl_xor_sync(unsigned, double value, int lanes) {
#endif
  int half[2];
  memcpy(half, &value, sizeof(value));
  half[0] = shim::shuffle(half[0], lanes), half[1] = shim::shuffle(half[1], lanes);
  memcpy(&value, half, sizeof(value));
  return value;
}
__device__ inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <class T>
__device__ inline T __ldcg(const T* at) {
  return *at;
}
template <class T>
__device__ inline void __stcg(T* at, T value) {
  *at = value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
struct cudaFuncAttributes {};
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel);
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int*, Kernel, int, size_t);
// That a kernel is instantiated by its launch, as in the real one.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(Parameters...), const Arguments&...);
cudaError_t cudaConfigureCall(dim3, dim3, size_t = 0, cudaStream_t = nullptr);
