// Chains whose rows are within a warp: four elements a lane, in registers from the first step to the last.

#include "../ops.h"
#include "kernels.h"
#include "reduce.cuh"

namespace dae::cuda {

struct ChainParams {
  ChainArgs a;
  int lanes;          // of a row
  uint32_t zero = 0;  // for pin
};

__device__ __forceinline__ float sum_of_lanes(float v, int lanes) {
#pragma unroll 1
  for (int apart = lanes / 2; apart > 0; apart /= 2) v += from_lane(v, apart);
  return v;
}

__device__ __forceinline__ void load_lane(const float* from, float (&v)[kOfLane]) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  memcpy(v, &words, sizeof(v));
}

// One component: its mean and precision stay in registers, and its weight does not matter. None: a double well.
template <int kComponents>
__global__ void __launch_bounds__(kThreads) chain_kernel(const __grid_constant__ ChainParams p) {
  __shared__ uint4 keys[kThreads];
  constexpr bool kOne = kComponents == 1;
  const ChainArgs& a = p.a;
  const int thread = static_cast<int>(threadIdx.x), lane = thread & (p.lanes - 1), rows = kThreads / p.lanes;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * rows + thread / p.lanes;
  const int64_t row = own < a.B ? own : a.B - 1;  // past the last one, that one again, unwritten: whole warps shuffle
  const int first = kOfLane * lane, width = kOfLane * p.lanes;
  const Pinned pinned = pin(p.zero);
  const Key start = a.noise.key_at ? *a.noise.key_at : a.noise.key;
  Noise noise = a.noise;
  noise.key_at = nullptr;
  float x[kOfLane], mean[kOfLane], precision[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) x[i] = first + i < a.D ? a.x[row * a.D + first + i] : 0.0f;
  if (kOne) load_lane(a.means + first, mean), load_lane(a.precisions + first, precision);
#pragma unroll 1
  for (int64_t done = 0; done < a.steps; done += p.lanes) {
    noise.key = fold_in(start, static_cast<uint64_t>(done + lane));  // a lane makes the key of one step for the row
    const Key made = row_key(noise, row);
    __syncthreads();
    keys[thread] = make_uint4(static_cast<uint32_t>(made.seed), static_cast<uint32_t>(made.seed >> 32),
                              static_cast<uint32_t>(made.offset), static_cast<uint32_t>(made.offset >> 32));
    __syncthreads();
    const int64_t left = a.steps - done;
    const int turns = left < p.lanes ? static_cast<int>(left) : p.lanes;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      float z[kOfLane];
      normals(Blocks{to_key(keys[thread - lane + turn]), static_cast<uint64_t>(lane)}, z, pinned);
      if (!kComponents) {
#pragma unroll
        for (int i = 0; i < kOfLane; ++i)
          x[i] = affine(1.0f, x[i], a.step, double_well(x[i], a.slope, a.square), a.spread, z[i]);
        continue;
      }
      if (!kOne) load_lane(a.means + first, mean), load_lane(a.precisions + first, precision);
      Pull pull(mean, precision, x);
      if (!kOne) {
        MixtureWeights weights(log_density(a.log_weights[0], sum_of_lanes(pull.square, p.lanes)));
#pragma unroll 1
        for (int k = 1; k < a.components; ++k) {
          load_lane(a.means + k * width + first, mean), load_lane(a.precisions + k * width + first, precision);
          const Pull next(mean, precision, x);
          const Balance balance = weights.add(log_density(a.log_weights[k], sum_of_lanes(next.square, p.lanes)));
#pragma unroll
          for (int i = 0; i < kOfLane; ++i) pull.by[i] = mul_add(balance.next, next.by[i], balance.old * pull.by[i]);
        }
        const float share = 1.0f / weights.total;
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) pull.by[i] *= share;
      }
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) x[i] = affine(1.0f, x[i], a.step, pull.by[i], a.spread, z[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kOfLane; ++i)
    if (own < a.B && first + i < a.D) a.out[row * a.D + first + i] = x[i];
}

const char* chain(const ChainArgs& a, Queue queue) {
  if (!a.B || !a.D) return nullptr;
  const ChainParams p{a, chain_lanes(a.D)};
  const int64_t rows = kThreads / p.lanes, blocks = (a.B + rows - 1) / rows;
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  switch (a.components) {
    case 0: return launch(stream, blocks, kThreads, chain_kernel<0>, p);
    case 1: return launch(stream, blocks, kThreads, chain_kernel<1>, p);
    default: return launch(stream, blocks, kThreads, chain_kernel<2>, p);
  }
}

struct NormalSumParams {
  NormalSumArgs a;
  uint32_t zero = 0;  // for pin
};

// A thread has four elements; it makes each term's key for itself.
__global__ void __launch_bounds__(kThreads) normal_sum_kernel(const __grid_constant__ NormalSumParams p) {
  const NormalSumArgs& a = p.a;
  const int64_t lanes = (a.D + kOfLane - 1) / kOfLane, at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.B * lanes) return;
  const int64_t row = at / lanes, lane = at - row * lanes, first = kOfLane * lane;
  const Pinned pinned = pin(p.zero);
  const Key start = a.noise.key_at ? *a.noise.key_at : a.noise.key;
  Noise noise = a.noise;
  noise.key_at = nullptr;
  float sums[kOfLane] = {};
#pragma unroll 1
  for (int k = 0; k < a.terms; ++k) {
    noise.key = fold_in(start, a.nodes[k]);
    float z[kOfLane];
    normals(Blocks{row_key(noise, row), static_cast<uint64_t>(lane)}, z, pinned);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) sums[i] = affine(1.0f, sums[i], a.weights[k], z[i]);
  }
#pragma unroll
  for (int i = 0; i < kOfLane; ++i)
    if (first + i < a.D) a.out[row * a.D + first + i] = sums[i];
}

const char* normal_sum(const NormalSumArgs& a, Queue queue) {
  if (!a.B || !a.D) return nullptr;
  const int64_t lanes = (a.D + kOfLane - 1) / kOfLane;
  return launch(static_cast<cudaStream_t>(queue.stream), (a.B * lanes + kThreads - 1) / kThreads, kThreads,
                normal_sum_kernel, NormalSumParams{a});
}

}  // namespace dae::cuda
