// What a device offers: one table of functions, filled by the CPU code and by the CUDA library. Knows neither
// torch nor CUDA headers, so that the Python module finds the library where it is and does without where it is not.
#pragma once

#include "chain.h"

namespace dae {

// Where a GPU's kernels are launched, its device being the current one; the CPU has none.
struct Queue {
  int device = -1;
  void* stream = nullptr;  // cudaStream_t or hipStream_t
};

// Memory that a GPU's reduction needs: doubles for partial sums, and a counter that is 0 before and after each
// launch, used by one launch at a time.
struct Scratch {
  double* sums = nullptr;
  uint32_t* counter = nullptr;
};

// Doubles for a reduction of (B, D) in `columns` sums, however the batch is cut: those of each segment of a long row, or
// the loss and the two further means of each unit of whole rows.
constexpr int64_t kMinSegment = 1024;
inline int64_t scratch_doubles(int64_t B, int64_t D, int64_t columns) {
  const int64_t segments = columns * B * (1 + D / kMinSegment), units = 3 * (B ? B : 1);
  return segments > units ? segments : units;
}

// What is returned where memory is short: this string itself, so that its address says so.
inline constexpr char kNoMemory[] = "out of memory";

// Each returns nullptr or what went wrong, a string that lives as long as the library.
struct Api {
  const char* (*affine)(const AffineArgs&, Queue);
  const char* (*residual)(const ResidualArgs&, const LossArgs&, Scratch, Queue);
  const char* (*row_dots)(const RowDotsArgs&, double* out, Scratch, Queue);  // out (B, 3)
  const char* (*mask_count)(const MaskArgs&, double* kept, Scratch, Queue);  // kept (B,)
  const char* (*corrupt)(const CorruptArgs&, Queue);
  const char* (*gaussian)(const GaussianArgs&, void* kl, Scratch, Queue);  // kl (B,) of the compute type
  const char* (*gaussian_grad)(const GaussianGradArgs&, Queue);
  const char* (*bits)(const BitsArgs&, Queue);
  // out: the folded key; data is read through data_at where that is set.
  const char* (*fold_in)(const Noise&, uint64_t data, const uint64_t* data_at, Key* out, Queue);
  const char* (*devices)(int* count);  // that the library has code for; initialises the driver
  int (*current_device)();
  const char* (*chain)(const ChainArgs&, Queue);
  const char* (*normal_sum)(const NormalSumArgs&, Queue);
  const char* (*embedding)(const EmbeddingArgs&, Queue);
  bool on_host = false;  // computes on tensors in host memory: a build for a CPU, which then gets theirs
  const char* runtime = "CUDA";  // that its errors come from
};

namespace cpu {
extern const Api kApi;
}

}  // namespace dae

// Of the CUDA library, or the HIP library, made of the same sources.
extern "C" const dae::Api* dae_cuda_api();
