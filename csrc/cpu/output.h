// Outputs on their way to memory: through the caches, or past them.
#pragma once

#include "convert.h"
#include "units.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dae::cpu::DAE_ISA {

constexpr int64_t kLine = 64, kStreamed = 256;  // bytes

// Memory that is written to at length would else stand idle the other way. Of what is not there nothing is read.
template <class T>
static inline void read_ahead(const T* data, int64_t n) {
  for (int64_t i = 0; i < n; i += kLine / sizeof(T)) __builtin_prefetch(data + i);
}

// A plain store to memory reads the line first, to write it whole later: a third of a map's traffic. What is more than
// the cache holds nobody will find there, and is better written past it; some lines at a time, so that a processor
// computes the next while these go.
template <class T>
struct Output {
  T* data = nullptr;
  bool streams = false;

  explicit operator bool() const { return data; }
  Output operator+(int64_t elements) const { return {data + elements, streams}; }

  // Has fill(i, to, m) write the m elements from i, for all n.
  template <class Fill>
  void put(int64_t n, Fill fill) const {
    int64_t i = 0;
#if defined(__SSE2__)
    if (streams) {
      constexpr int64_t kCount = kStreamed / sizeof(T);
      const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % kLine / sizeof(T));
      i = past ? kLine / sizeof(T) - past : 0;
      if (i > n) i = n;
      fill(int64_t{0}, data, i);
      for (; i + kCount <= n; i += kCount) {
        alignas(kLine) T block[kCount];
        fill(i, block, kCount);
        const auto* from = reinterpret_cast<const __m128i*>(block);
        auto* to = reinterpret_cast<__m128i*>(data + i);
        for (int64_t k = 0; k < kStreamed / static_cast<int64_t>(sizeof(__m128i)); ++k) _mm_stream_si128(to + k, from[k]);
      }
    }
#endif
    fill(i, data + i, n - i);
  }
};

// Whether a thread that writes `bytes` does so past the caches: where it reads two such, they are more than its share of the
// last one.
static inline bool streams(double bytes) { return bytes > cache_share() / 3; }

// Before another thread may read them.
static inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace dae::cpu::DAE_ISA
