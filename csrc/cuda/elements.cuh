// Element types in memory, 16 bytes at a time, and the type they are computed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../math.h"

namespace dae::cuda {

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// N consecutive values of one thread.
template <class T, int N>
struct alignas(16) Pack {
  T v[N];
};

// Past the multiprocessor's own cache: nothing is read twice.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  static_assert(sizeof(Pack<T, N>) % 16 == 0, "whole 16-byte accesses");
  Pack<T, N> pack;
  uint4 chunk[sizeof(pack) / 16];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) chunk[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
  memcpy(&pack, chunk, sizeof(pack));
  return pack;
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  uint4 chunk[sizeof(pack) / 16];
  memcpy(chunk, &pack, sizeof(pack));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) __stcg(reinterpret_cast<uint4*>(to) + i, chunk[i]);
}

// Two at a time where the hardware converts so.
template <int N>
__device__ __forceinline__ void widen(const Pack<float, N>& pack, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = pack.v[i];
}
template <int N>
__device__ __forceinline__ void widen(const Pack<double, N>& pack, double (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = pack.v[i];
}
template <int N>
__device__ __forceinline__ void widen(const Pack<__nv_bfloat16, N>& pack, float (&v)[N]) {
  uint32_t words[N / 2];
  memcpy(words, &pack, sizeof(words));
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    v[2 * i] = bits_as<float>(words[i] << 16);
    v[2 * i + 1] = bits_as<float>(words[i] & 0xffff0000u);
  }
}
template <int N>
__device__ __forceinline__ void widen(const Pack<__half, N>& pack, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = __half2float(pack.v[i]);
}

template <int N>
__device__ __forceinline__ void narrow(const float (&v)[N], Pack<float, N>& pack) {
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = v[i];
}
template <int N>
__device__ __forceinline__ void narrow(const double (&v)[N], Pack<double, N>& pack) {
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = v[i];
}
template <int N>
__device__ __forceinline__ void narrow(const float (&v)[N], Pack<__nv_bfloat16, N>& pack) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(v[i], v[i + 1]);
    pack.v[i] = two.x, pack.v[i + 1] = two.y;
  }
}
template <int N>
__device__ __forceinline__ void narrow(const float (&v)[N], Pack<__half, N>& pack) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const __half2 two = __floats2half2_rn(v[i], v[i + 1]);
    pack.v[i] = two.x, pack.v[i + 1] = two.y;
  }
}

}  // namespace dae::cuda
