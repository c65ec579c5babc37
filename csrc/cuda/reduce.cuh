// Sums that have the same bits every run: every addition has its fixed place, and no float is added atomically.
#pragma once

#include "../api.h"
#include "batch.cuh"

namespace dae::cuda {

// Of AMD's wavefronts some have 64 lanes: they are two warps each, so that the sums are the same.
constexpr int kWarp = 32, kWarps = kThreads / kWarp;

// The value of the thread whose lane differs in these bits. All threads of the wavefront come here.
template <class T>
__device__ __forceinline__ T from_lane(T v, int lanes) {
#if defined(__HIP__)
  return __shfl_xor(v, lanes, kWarp);
#else
  return static_cast<T>(__shfl_xor_sync(0xffffffffu, v, lanes));
#endif
}

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v += from_lane(v, lanes);
  return v;
}

// Of all threads, left in thread 0.
template <int K>
__device__ __forceinline__ void block_sum(double (&v)[K]) {
  __shared__ double of_warp[K][kWarps];
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = warp_sum(v[k]);
  __syncthreads();  // of_warp may still be read from the sum before this one
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (threadIdx.x % kWarp == 0) of_warp[k][threadIdx.x / kWarp] = v[k];
  __syncthreads();
  if (threadIdx.x) return;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    v[k] = 0;
#pragma unroll 1  // a few registers at the end would be as many in the kernel's main loop
    for (int w = 0; w < kWarps; ++w) v[k] += of_warp[k][w];
  }
}

// Calls done(row, its sums) for each of `rows` rows that lie one after the other, K times `length` values each: one
// thread, which is lane 0 of a thread, a warp or, where rows are long and few, of the whole block.
template <int K, class Value, class Done>
__device__ __forceinline__ void sum_rows(int64_t rows, int64_t length, Value value, Done done) {
  const int lanes = length < kWarp ? 1 : (rows < kWarps && length >= rows * kThreads ? kThreads : kWarp);
  const int thread = static_cast<int>(threadIdx.x), at_a_time = kThreads / lanes, lane = thread % lanes;
#pragma unroll 1
  for (int64_t first = 0; first < rows; first += at_a_time) {
    const int64_t row = first + thread / lanes;
    double sum[K] = {};
    if (row < rows) {
#pragma unroll 4
      for (int64_t i = lane; i < length; i += lanes)
#pragma unroll
        for (int k = 0; k < K; ++k) sum[k] += value(k, row * length + i);
    }
    if (lanes == kThreads) block_sum(sum);
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (lanes == kWarp) sum[k] = warp_sum(sum[k]);
    if (row < rows && lane == 0) done(row, sum);
  }
}

// True in the thread block that comes here last, when the partial sums of all others can be read. The first fence puts
// this block's sums before its ticket, the second those of the others before what follows; each by one thread, for all
// that a barrier put before it, or puts behind it. HIP's barrier promises that of shared memory alone: there each fences.
__device__ __forceinline__ bool is_last_block(uint32_t* counter) {
#if defined(__HIP__)
  constexpr bool kEach = true;
#else
  constexpr bool kEach = false;
#endif
  __shared__ bool last;
  if (kEach) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (last) {
      __threadfence();
      *counter = 0;  // for the next launch
    }
  }
  __syncthreads();
  if (kEach) __threadfence();
  return last;
}

// Of what other thread blocks wrote: not through this multiprocessor's own cache.
__device__ __forceinline__ double read_sum(const double* sums, int64_t i) { return __ldcg(sums + i); }

// The sums of rows, K of each. A thread adds what its groups give.
template <class R, int K>
struct RowSums {
  double total[K] = {};  // of the one row

  // `groups` is shared memory, one number for each group of a unit of several rows. kOneRow: known to be none such.
  template <bool kOneRow = false>
  __device__ __forceinline__ void add(const Unit& unit, int g, const R (&value)[K], R (&groups)[K][kMaxTile]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (kOneRow || unit.rows == 1)
        total[k] += static_cast<double>(value[k]);
      else
        groups[k][g] = value[k];
    }
  }

  // Calls done(row, its sums) once for each row of the batch: the unit's block does where a row is no longer, else the
  // last block for all rows, from a sum of each unit in `scratch`. True in a block that has called it.
  template <class Done>
  __device__ __forceinline__ bool finish(const Cut& cut, const Unit& unit, R (&groups)[K][kMaxTile],
                                         const Scratch& scratch, Done done) {
    const bool whole = cut.segments_per_row == 1, one = unit.rows == 1;
    // Worked out again: kept, it would take registers from the main loop.
    const int64_t units = cut.units, first = whole ? static_cast<int64_t>(blockIdx.x) * cut.rows_per_unit : 0;
    if (whole) {
      __syncthreads();  // groups are complete
    } else {
      block_sum(total);
      if (threadIdx.x == 0)
        for (int k = 0; k < K; ++k) scratch.sums[k * units + blockIdx.x] = total[k];
      if (!is_last_block(scratch.counter)) return false;
    }
    sum_rows<K>(
        whole ? unit.rows : cut.B, whole ? (one ? kThreads : cut.groups_per_row) : cut.segments_per_row,
        [&](int k, int64_t i) {
          if (!whole) return read_sum(scratch.sums, k * units + i);
          return one ? total[k] : static_cast<double>(groups[k][i]);
        },
        [&](int64_t row, const double (&sum)[K]) { done(first + row, sum); });
    return true;
  }
};

}  // namespace dae::cuda
