// CUDA on the CPU under ThreadSanitizer: a host thread for each block, a fiber for each of its threads. Between them there
// is only the order that CUDA promises: a barrier's among a block's threads, a fence before an atomic and one after it
// among blocks. Shuffles give none.
#pragma once

#include <sanitizer/tsan_interface.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(...)
// Of the emulator itself, whose fibers share a host thread.
#define UNSEEN __attribute__((no_sanitize("thread"), noinline))

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

namespace emulator {

enum class State { ready, at_warp, at_block, done };
enum class Order { forward, turns, shuffled };

// What a run is to be like; without fences or barriers, to see that they are missed.
inline Order order = Order::forward;
inline unsigned seed = 1, resident = 2;
inline bool fences = true, barriers = true;

constexpr unsigned kWarp = 32, kThreads = 256, kBlocksAtOnce = 10;
constexpr size_t kStack = 1 << 17;

struct Thread {
  ucontext_t context;
  char* stack;
  void* fiber;
  State state;
  bool fenced;         // so that its next atomic releases what it did before
  uint32_t* ticket;    // its last atomic, which its next fence acquires
  unsigned barriers;   // passed
};

struct Block {
  Thread threads[kThreads];
  ucontext_t scheduler;
  void* own_fiber;
  unsigned current, count, index;
  std::function<void()> body;
  double slots[kThreads];  // of a shuffle
  char at_start, at_barrier[64], at_end;
  std::mt19937 random;
};

// Used again by each launch, which is ordered after the one before: fibers take long to make.
inline Block pool[kBlocksAtOnce];
inline thread_local Block* block;
inline unsigned grid_size, block_size;

UNSEEN inline Thread& self() { return block->threads[block->current]; }
UNSEEN inline unsigned thread_index() { return block->current; }
UNSEEN inline unsigned block_index() { return block->index; }
UNSEEN inline unsigned blocks() { return grid_size; }

// The flag: a switch gives no order.
UNSEEN inline void to_scheduler() {
  Thread& thread = self();
  __tsan_switch_to_fiber(block->own_fiber, __tsan_switch_to_fiber_no_sync);
  swapcontext(&thread.context, &block->scheduler);
}
UNSEEN inline void wait(State state) {
  self().state = state;
  to_scheduler();
}
UNSEEN inline void enter() {
  __tsan_acquire(&block->at_start);
  block->body();
  __tsan_release(&block->at_end);
  wait(State::done);
}

// Releases a group whose living threads all wait for the same thing.
UNSEEN inline bool release(Block* b, unsigned begin, unsigned end, State state) {
  for (unsigned i = begin; i < end; ++i)
    if (b->threads[i].state != state && b->threads[i].state != State::done) return false;
  bool any = false;
  for (unsigned i = begin; i < end; ++i)
    if (b->threads[i].state == state) b->threads[i].state = State::ready, any = true;
  return any;
}

UNSEEN inline void run_block(Block* b) {
  block = b;
  b->own_fiber = __tsan_get_current_fiber();
  b->random.seed(seed * 7919 + b->index);
  unsigned turn[kThreads];
  for (unsigned i = 0; i < b->count; ++i) {
    Thread& t = b->threads[i];
    if (!t.stack) t.stack = static_cast<char*>(malloc(kStack)), t.fiber = __tsan_create_fiber(0);
    t.state = State::ready, t.fenced = false, t.ticket = nullptr, t.barriers = 0;
    turn[i] = i;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = &b->scheduler;
    makecontext(&t.context, enter, 0);
  }
  __tsan_release(&b->at_start);
  for (bool alive = true; alive;) {
    bool progress = alive = false;
    if (order == Order::turns) std::reverse(turn, turn + b->count);
    if (order == Order::shuffled) std::shuffle(turn, turn + b->count, b->random);
    for (unsigned k = 0; k < b->count; ++k) {
      Thread& t = b->threads[turn[k]];
      if (t.state == State::ready) {
        b->current = turn[k];
        __tsan_switch_to_fiber(t.fiber, __tsan_switch_to_fiber_no_sync);
        swapcontext(&b->scheduler, &t.context);
        progress = true;
      }
      alive |= t.state != State::done;
    }
    for (unsigned w = 0; w < b->count; w += kWarp) progress |= release(b, w, std::min(w + kWarp, b->count), State::at_warp);
    progress |= release(b, 0, b->count, State::at_block);
    if (alive && !progress) {
      std::fprintf(stderr, "races: threads of one block wait at different barriers\n");
      std::abort();
    }
  }
  __tsan_acquire(&b->at_end);
}

// Of a thread, whatever fiber asks.
template <unsigned (*kValue)()>
struct Index {
  struct {
    UNSEEN operator unsigned() const { return kValue(); }
  } x;
};

}  // namespace emulator

inline emulator::Index<emulator::thread_index> threadIdx;
inline emulator::Index<emulator::block_index> blockIdx;
inline emulator::Index<emulator::blocks> gridDim;

UNSEEN inline char* barrier_of_self() {
  return &emulator::block->at_barrier[emulator::self().barriers++ % sizeof(emulator::Block::at_barrier)];
}
inline void __syncthreads() {
  char* const barrier = barrier_of_self();
  if (emulator::barriers) __tsan_release(barrier);
  emulator::wait(emulator::State::at_block);
  if (emulator::barriers) __tsan_acquire(barrier);
}

UNSEEN inline uint32_t* fence_of_self() {
  emulator::self().fenced = true;
  return emulator::self().ticket;
}
inline void __threadfence() {
  if (!emulator::fences) return;
  if (uint32_t* const ticket = fence_of_self()) __atomic_load_n(ticket, __ATOMIC_ACQUIRE);
}
UNSEEN inline bool take_ticket(uint32_t* at) {
  emulator::self().ticket = at;
  return emulator::self().fenced;
}
// Relaxed, as CUDA's: what orders is the fences.
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  return take_ticket(at) ? __atomic_fetch_add(at, value, __ATOMIC_RELEASE) : __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

UNSEEN inline void put_slot(double value) { emulator::block->slots[emulator::block->current] = value; }
UNSEEN inline double slot_of(unsigned lanes) { return emulator::block->slots[emulator::block->current ^ lanes]; }
inline double __shfl_xor_sync(unsigned, double value, int lanes) {
  put_slot(value);
  emulator::wait(emulator::State::at_warp);
  const double other = slot_of(static_cast<unsigned>(lanes));
  emulator::wait(emulator::State::at_warp);
  return other;
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
struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = static_cast<int>(emulator::resident), cudaSuccess;
}

// Some blocks at a time, in an order of chance.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  emulator::grid_size = config->gridDim.x, emulator::block_size = config->blockDim.x;
  std::vector<unsigned> order(emulator::grid_size);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::mt19937 random(emulator::seed);
  std::shuffle(order.begin(), order.end(), random);
  for (size_t first = 0; first < order.size(); first += emulator::kBlocksAtOnce) {
    std::vector<std::thread> hosts;
    for (size_t i = first; i < std::min(order.size(), first + emulator::kBlocksAtOnce); ++i) {
      emulator::Block& block = emulator::pool[i - first];
      block.index = order[i], block.count = emulator::block_size;
      block.body = [=] { kernel(arguments...); };
      hosts.emplace_back([&block] { emulator::run_block(&block); });
    }
    for (std::thread& host : hosts) host.join();
  }
  return cudaSuccess;
}
