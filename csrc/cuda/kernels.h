// Between the library's face (api.cu) and the kernels of each element type (kernels.cu).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../api.h"
#include "batch.cuh"
#include "runtime.h"

namespace dae::cuda {

struct Launch {
  cudaStream_t stream;
  int multiprocessors;

  // Calls run(access) with what fits the operands: Whole where every one is contiguous, aligned and made of whole
  // groups, else Strided.
  template <class T, int K, class Run>
  const char* with_access(const Batch& batch, const Operand (&operands)[K], Run run) const;

  // The batch cut for the kernel, in groups of so many values.
  template <auto kKernel>
  Cut cut(const Batch& batch, int group) const;

  // Cuts the batch into p.cut for the kernel and launches it.
  template <auto kKernel, class T, class Parameters, class Access>
  const char* units(const Batch& batch, Parameters p, const Access& access) const;
};

// Of the ways to cut a batch the one that is done first when `resident` thread blocks run at a time. A turn of the
// threads, a group each, counts 1, and so does what a thread block does before its first.
inline Cut best_cut(const Batch& batch, int group, int64_t resident) {
  Cut best(batch.B, batch.D, group, 1);
  const auto cost = [&](const Cut& cut, int iterations) { return (cut.units + resident - 1) / resident * (1 + iterations); };
  int64_t least = cost(best, 1);
  for (int iterations = 2; iterations <= kMaxIterations && best.units > resident; iterations *= 2) {
    const Cut cut(batch.B, batch.D, group, iterations);
    if (cost(cut, iterations) < least) least = cost(cut, iterations), best = cut;
  }
  return best;
}

template <int K>
bool is_whole(const Batch& batch, const Operand (&operands)[K], int group) {
  for (const Operand& o : operands)
    if (o.strides || reinterpret_cast<uintptr_t>(o.data) % 16) return false;
  return batch.D % group == 0;
}

template <int K>
Strided<K> make_strided(const Batch& batch, const Operand (&operands)[K]) {
  Strided<K> s{};
  const int64_t whole_row[] = {batch.D};
  const int ndim = batch.ndim ? batch.ndim : 1;
  const int64_t* sizes = batch.ndim ? batch.sizes : whole_row;
  int64_t logical[kMaxDims], order[kMaxDims];
  for (int64_t d = ndim - 1, next = 1; d >= 0; next *= sizes[d], --d) logical[d] = next;
  const auto stride = [&](const Operand& o, int64_t d) {
    return o.strides && batch.ndim ? o.strides[d + 1] : logical[d];
  };
  const Operand* guide = operands;  // memory order is that of the first strided operand
  for (const Operand& o : operands)
    if (o.strides && !guide->strides) guide = &o;

  s.ndim = ndim;
  s.grouped = batch.D && sizes[ndim - 1] % 4 == 0;
  for (int d = 0; d < ndim; ++d) order[d] = ndim - 1 - d;
  // An expanded dimension has stride 0 and is no help to neighbouring threads: last.
  const auto distance = [&](int64_t d) { return stride(*guide, d) ? stride(*guide, d) : INT64_MAX; };
  if (s.grouped && guide->strides)
    std::stable_sort(order, order + ndim, [&](int64_t a, int64_t b) { return distance(a) < distance(b); });
  const auto group = [&](int64_t d) { return s.grouped && d == ndim - 1 ? 4 : 1; };
  const auto way = [&](const Operand& o) {
    Way found{o.strides ? o.strides[0] : batch.D, stride(o, ndim - 1), {}};
    for (int i = 0; i < ndim; ++i) found.strides[i] = stride(o, order[i]) * group(order[i]);
    return found;
  };
  s.common = way(*guide);
  for (int i = 0; i < ndim; ++i) {
    s.sizes[i] = Divisor(static_cast<uint32_t>(sizes[order[i]] / group(order[i])));
    s.logical[i] = logical[order[i]] * group(order[i]);
  }
  for (int k = 0; k < K; ++k) {
    s.data[k] = operands[k].data;
    s.ways[k] = way(operands[k]);
    s.alike[k] = std::memcmp(&s.ways[k], &s.common, sizeof(Way)) == 0;
  }
  return s;
}

template <class T, int K, class Run>
const char* Launch::with_access(const Batch& batch, const Operand (&operands)[K], Run run) const {
  if (is_whole(batch, operands, Whole<K>::template group<T>)) {
    Whole<K> whole;
    for (int k = 0; k < K; ++k) whole.data[k] = operands[k].data;
    return run(whole);
  }
  if (batch.ndim > kMaxDims || (batch.ndim > 1 && batch.D > INT32_MAX))
    return "a strided row of more than 8 dimensions, or of several and 2^31 elements";
  return run(make_strided(batch, operands));
}

struct Kernels {
  const char* (*affine)(const AffineArgs&, const Launch&);
  const char* (*residual)(const ResidualArgs&, const LossArgs&, Scratch, const Launch&);
  const char* (*row_dots)(const RowDotsArgs&, double* out, Scratch, const Launch&);
  const char* (*corrupt)(const CorruptArgs&, const Launch&);
  const char* (*gaussian)(const GaussianArgs&, void* kl, Scratch, const Launch&);
  const char* (*gaussian_grad)(const GaussianGradArgs&, const Launch&);
};

// One table per element type.
extern const Kernels kernels_f32, kernels_f64, kernels_bf16, kernels_f16;

const char* chain(const ChainArgs&, Queue);
const char* normal_sum(const NormalSumArgs&, Queue);

// Not <<<>>>: this form is plain C++, so that the tests can compile it for the CPU.
template <class... Parameters, class... Arguments>
const char* launch(cudaStream_t stream, int64_t blocks, unsigned threads, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <auto kKernel>
Cut Launch::cut(const Batch& batch, int group) const {
  // Asked until it is answered: the GPUs of a machine are taken to be alike, and another number would be as right, if
  // slower.
  static std::atomic<int> known{0};
  int resident = known.load(std::memory_order_relaxed);
  if (!resident) {
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kKernel, kThreads, 0);
    if (error != cudaSuccess) resident = 0;
    known.store(resident, std::memory_order_relaxed);
  }
  return best_cut(batch, group, static_cast<int64_t>(resident ? resident : 1) * multiprocessors);
}

template <auto kKernel, class T, class Parameters, class Access>
const char* Launch::units(const Batch& batch, Parameters p, const Access& access) const {
  p.cut = cut<kKernel>(batch, Access::template group<T>);
  return launch(stream, p.cut.units, kThreads, kKernel, p, access);
}

}  // namespace dae::cuda
