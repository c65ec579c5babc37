// Enough of CUDA to run csrc/cuda on the CPU: one thread block at a time, its threads as coroutines that take
// turns at barriers and shuffles. It finds wrong indexing, missing barriers' deadlocks and, under
// AddressSanitizer, accesses out of bounds; it knows nothing of races between blocks. With __HIP__ it stands in for HIP
// on an AMD GPU whose wavefronts have 64 lanes.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum class State { ready, at_warp, at_block, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::ready;
};

#if defined(__HIP__)
constexpr unsigned kWarp = 64;
#else
constexpr unsigned kWarp = 32;
#endif
constexpr size_t kStack = 1 << 16;

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
struct Argument {
  const void* at;
  size_t size;
};
// What a thread runs in a kernel's place: its PTX, in tests/ptx_on_cpu.
inline std::function<void()> (*other_body)(void* kernel, const std::vector<Argument>&) = nullptr;
inline double slots[1024];  // of a shuffle

inline void enter() {
  body();
  threads[current].state = State::done;
  swapcontext(&threads[current].context, &scheduler);
}

inline void wait(State state) {
  const unsigned self = current;
  threads[self].state = state;
  swapcontext(&threads[self].context, &scheduler);
}

// Releases a group whose living threads all wait for the same thing.
inline bool release(unsigned begin, unsigned end, State state) {
  for (unsigned i = begin; i < end; ++i)
    if (threads[i].state != state && threads[i].state != State::done) return false;
  bool any = false;
  for (unsigned i = begin; i < end; ++i)
    if (threads[i].state == state) threads[i].state = State::ready, any = true;
  return any;
}

inline void run_block() {
  const unsigned count = static_cast<unsigned>(threads.size());
  for (Thread& t : threads) {
    getcontext(&t.context);
    if (!t.stack) t.stack = std::make_unique<char[]>(kStack);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = &scheduler;
    makecontext(&t.context, enter, 0);
    t.state = State::ready;
  }
  for (;;) {
    bool progress = false, alive = false;
    for (unsigned i = 0; i < count; ++i) {
      if (threads[i].state == State::ready) {
        current = i;
        threadIdx.x = i;
        swapcontext(&scheduler, &threads[i].context);
        progress = true;
      }
      alive |= threads[i].state != State::done;
    }
    if (!alive) return;
    for (unsigned w = 0; w < count; w += kWarp)
      progress |= release(w, w + kWarp < count ? w + kWarp : count, State::at_warp);
    progress |= release(0, count, State::at_block);
    if (!progress) {
      std::fprintf(stderr, "cuda_on_cpu: threads of one block wait at different barriers\n");
      std::abort();
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::at_block); }
inline void __threadfence() {}
#if defined(__HIP__)
// Of lanes past the own group of `width` nothing comes.
inline double __shfl_xor(double value, int lanes, int width) {
  const unsigned self = emulator::current, group = static_cast<unsigned>(width);
  const unsigned other = self ^ static_cast<unsigned>(lanes);
#else
inline double __shfl_xor_sync(unsigned, double value, int lanes) {
  const unsigned self = emulator::current, group = emulator::kWarp;
  const unsigned other = self ^ static_cast<unsigned>(lanes);
#endif
  emulator::slots[self] = value;
  emulator::wait(emulator::State::at_warp);
  const double found = emulator::slots[other / group == self / group ? other : self];
  emulator::wait(emulator::State::at_warp);
  return found;
}
#if defined(__HIP__)
// Within one ulp, as the hardware's, and most of the time not nearest.
inline float __builtin_amdgcn_sqrtf(float a) {
  uint32_t bits, of_a;
  const float root = sqrtf(a);
  memcpy(&bits, &root, sizeof(bits)), memcpy(&of_a, &a, sizeof(of_a));
  bits += of_a % 3 - 1;
  float found;
  memcpy(&found, &bits, sizeof(found));
  return found;
}
#endif
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  const uint32_t old = *at;
  *at += value;
  return old;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoDevice, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
// One multiprocessor: even small batches give a thread several groups.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }

// For the tests: how many queries will fail, how many blocks the last launch had, and how many of each launch's last
// are run, all where it is 0.
extern "C" {
inline int failing_queries = 0;
inline unsigned blocks_launched = 0, last_blocks_only = 0;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  if (failing_queries) return --failing_queries, cudaErrorUnknown;
  return *blocks = 2, cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  blocks_launched = gridDim.x;
  emulator::threads.resize(config->blockDim.x);
  emulator::body = [&] { kernel(arguments...); };
  if (emulator::other_body)
    emulator::body = emulator::other_body(reinterpret_cast<void*>(kernel), {{&arguments, sizeof(arguments)}...});
  const unsigned count = config->gridDim.x;
  for (unsigned b = last_blocks_only && last_blocks_only < count ? count - last_blocks_only : 0; b < count; ++b) {
    blockIdx.x = b;
    emulator::run_block();
  }
  return cudaSuccess;
}
