// What csrc/cuda uses of CUDA's runtime and half types. Under hipcc HIP's, by CUDA's names.
#pragma once

#include "../math.h"

#if defined(__HIPCC__)

#include <hip/hip_fp16.h>

#include <type_traits>

#define __grid_constant__
#define cudaDevAttrMultiProcessorCount hipDeviceAttributeMultiprocessorCount
#define cudaDeviceGetAttribute hipDeviceGetAttribute
#define cudaErrorNoDevice hipErrorNoDevice
#define cudaError_t hipError_t
#define cudaFuncAttributes hipFuncAttributes
#define cudaGetDevice hipGetDevice
#define cudaGetDeviceCount hipGetDeviceCount
#define cudaGetErrorString hipGetErrorString
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor hipOccupancyMaxActiveBlocksPerMultiprocessor
#define cudaStream_t hipStream_t
#define cudaSuccess hipSuccess

namespace dae::cuda {

template <class... Parameters>
hipError_t cudaFuncGetAttributes(hipFuncAttributes* found, void (*kernel)(Parameters...)) {
  return hipFuncGetAttributes(found, reinterpret_cast<const void*>(kernel));
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  hipStream_t stream;
};

template <class... Parameters, class... Arguments>
hipError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                              const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "read where they are, by the kernel's types");
  void* addresses[] = {const_cast<Arguments*>(&arguments)...};
  return hipLaunchKernel(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim, addresses, 0,
                         config->stream);
}

// Plain accesses: which of the hardware's hints for them would pay has not been measured.
template <class T>
__device__ __forceinline__ T __ldcg(const T* from) {
  return *from;
}
template <class T>
__device__ __forceinline__ void __stcg(T* to, T value) {
  *to = value;
}

}  // namespace dae::cuda

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#endif

#if defined(__HIP__)

namespace dae::cuda {

// HIP's own differs from release to release in its name and in what becomes of a NaN. Rounds as cpu/convert.h does.
struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  DAE_FN explicit __nv_bfloat16(float v) {
    const uint32_t u = bits_as<uint32_t>(v);
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(is_nan ? (u >> 16) | 0x40u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
DAE_FN __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }

}  // namespace dae::cuda

#endif
