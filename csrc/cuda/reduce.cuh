// Sums that have the same bits every run: every addition has its fixed place, and no float is added atomically.
#pragma once

#include "../api.h"
#include "batch.cuh"

namespace dae::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32, kWarps = kThreads / kWarp;

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kWholeWarp, v, lanes);
  return v;
}

// Of all threads, returned to thread 0.
__device__ __forceinline__ double block_sum(double v) {
  __shared__ double of_warp[kWarps];
  v = warp_sum(v);
  __syncthreads();  // of_warp may still be read from the sum before this one
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) sum += of_warp[w];
  return sum;
}

// Calls done(row, sum of the row's `length` values) for each of `rows` rows that lie one after the other:
// a thread to a short row, a warp to a long one.
template <class Value, class Done>
__device__ __forceinline__ void sum_rows(int64_t rows, int64_t length, Value value, Done done) {
  if (length < kWarp) {
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      double sum = 0;
#pragma unroll 1
      for (int64_t i = 0; i < length; ++i) sum += value(row * length + i);
      done(row, sum);
    }
  } else {
    for (int64_t row = threadIdx.x / kWarp; row < rows; row += kWarps) {
      double sum = 0;
#pragma unroll 4
      for (int64_t i = threadIdx.x % kWarp; i < length; i += kWarp) sum += value(row * length + i);
      sum = warp_sum(sum);
      if (threadIdx.x % kWarp == 0) done(row, sum);
    }
  }
}

// The sums of a unit's rows, K of each. A thread adds what its groups give; a row's end is in `scratch`:
// one sum for each segment of a long row, or for each row.
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

  __device__ __forceinline__ void store(const Cut& cut, const Unit& unit, R (&groups)[K][kMaxTile], double* scratch) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      double* sums = scratch + k * cut.B * cut.segments_per_row;
      if (unit.rows == 1) {
        const double sum = block_sum(total[k]);
        if (threadIdx.x == 0) sums[unit.row * cut.segments_per_row + unit.begin / cut.tile] = sum;
      } else {
        __syncthreads();  // groups are complete
        sum_rows(
            unit.rows, cut.groups_per_row, [&](int64_t i) { return static_cast<double>(groups[k][i]); },
            [&](int64_t row, double sum) { sums[unit.row + row] = sum; });
      }
    }
  }
};

// True in the thread block that comes here last, when the partial sums of all others can be read. A fence by one
// thread is one for all that a barrier put before it, or puts behind it.
__device__ __forceinline__ bool is_last_block(uint32_t* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (last) {
      *counter = 0;  // for the next launch
      __threadfence();
    }
  }
  __syncthreads();
  return last;
}

// Of what other thread blocks wrote: not through this multiprocessor's own cache.
__device__ __forceinline__ double read_sum(const double* sums, int64_t i) { return __ldcg(sums + i); }

}  // namespace dae::cuda
