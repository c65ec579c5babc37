// Element types in memory, 16 bytes at a time, and the type they are computed in.
#pragma once

#include "../math.h"
#include "runtime.h"

namespace dae::cuda {

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// N consecutive values of one thread, as they lie in memory. Not an array of T: the compiler would take the halves of
// each register apart.
template <class T, int N>
struct Pack {
  static constexpr int kWords = sizeof(T) * N / sizeof(uint32_t);
  uint32_t word[kWords];

  Pack() = default;
  __device__ __forceinline__ explicit Pack(const T (&v)[N]) { memcpy(word, v, sizeof(word)); }
  __device__ __forceinline__ void values(T (&v)[N]) const { memcpy(v, word, sizeof(word)); }
};

// Past the multiprocessor's own cache: nothing is read twice.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  Pack<T, N> pack;
  static_assert(pack.kWords % 4 == 0, "whole 16-byte accesses");
#pragma unroll
  for (int i = 0; i < pack.kWords; i += 4) {
    const uint4 chunk = __ldcg(reinterpret_cast<const uint4*>(from) + i / 4);
    pack.word[i] = chunk.x, pack.word[i + 1] = chunk.y, pack.word[i + 2] = chunk.z, pack.word[i + 3] = chunk.w;
  }
  return pack;
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
#pragma unroll
  for (int i = 0; i < pack.kWords; i += 4)
    __stcg(reinterpret_cast<uint4*>(to) + i / 4,
           make_uint4(pack.word[i], pack.word[i + 1], pack.word[i + 2], pack.word[i + 3]));
}

// Two at a time where the hardware converts so.
template <int N>
__device__ __forceinline__ void widen(const Pack<float, N>& pack, float (&v)[N]) {
  pack.values(v);
}
template <int N>
__device__ __forceinline__ void widen(const Pack<double, N>& pack, double (&v)[N]) {
  pack.values(v);
}
template <int N>
__device__ __forceinline__ void widen(const Pack<__nv_bfloat16, N>& pack, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    v[2 * i] = bits_as<float>(pack.word[i] << 16);
    v[2 * i + 1] = bits_as<float>(pack.word[i] & 0xffff0000u);
  }
}
template <int N>
__device__ __forceinline__ void widen(const Pack<__half, N>& pack, float (&v)[N]) {
  __half halves[N];
  pack.values(halves);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = __half2float(halves[i]);
}

template <int N>
__device__ __forceinline__ void narrow(const float (&v)[N], Pack<float, N>& pack) {
  pack = Pack<float, N>(v);
}
template <int N>
__device__ __forceinline__ void narrow(const double (&v)[N], Pack<double, N>& pack) {
  pack = Pack<double, N>(v);
}
template <int N>
__device__ __forceinline__ void narrow(const float (&v)[N], Pack<__nv_bfloat16, N>& pack) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) pack.word[i] = bits_as<uint32_t>(__floats2bfloat162_rn(v[2 * i], v[2 * i + 1]));
}
template <int N>
__device__ __forceinline__ void narrow(const float (&v)[N], Pack<__half, N>& pack) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) pack.word[i] = bits_as<uint32_t>(__floats2half2_rn(v[2 * i], v[2 * i + 1]));
}

}  // namespace dae::cuda
