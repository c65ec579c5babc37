// The one kernel of a library, launched by ctypes: Triton's, whose parameters are all numbers.
#include "machine.h"

extern const ptx::Table ptx_alone;

extern "C" size_t ptx_parameters() { return ptx_alone.begin()->second.arguments.size(); }

// backwards: the blocks in the other order.
extern "C" void ptx_launch(const unsigned* grid, unsigned threads, const uint64_t* values, int backwards) {
  const ptx::Kernel& kernel = ptx_alone.begin()->second;
  alignas(64) unsigned char parameters[1024];
  for (size_t i = 0; i < kernel.arguments.size(); ++i)
    memcpy(parameters + kernel.arguments[i].first, values + i, kernel.arguments[i].second);
  gridDim = dim3(grid[0], grid[1], grid[2]);
  blockDim = dim3(threads);
  emulator::threads.resize(threads);
  emulator::body = [&] {
    if (threadIdx.x == 0) memset(ptx::shared, 0xA5, 1 << 16);
    kernel.thread(parameters);
  };
  const uint64_t count = uint64_t(grid[0]) * grid[1] * grid[2];
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t block = backwards ? count - 1 - i : i;
    blockIdx = dim3(block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]);
    emulator::run_block();
  }
}
