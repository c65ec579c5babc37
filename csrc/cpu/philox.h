// Philox blocks by the vector, each lane with its own key and counter.
//
// Only the 32x32 -> 64 bit product is written per instruction set: compilers turn the plain loop
// into 64-bit multiplies, which cost three times as much.
#pragma once

#include "../math.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dae::cpu::DAE_ISA {

template <int N>
struct alignas(64) Lanes {
  uint32_t v[N];
};

#if defined(__AVX512F__)

using Vec = __m512i;
constexpr int kVecLanes = 16;
static inline Vec load(const uint32_t* p) { return _mm512_load_si512(p); }
static inline void store(uint32_t* p, Vec v) { _mm512_store_si512(p, v); }
static inline Vec splat(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
static inline Vec xor3(Vec a, Vec b, Vec c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
static inline void mulhilo(Vec a, Vec m, Vec& hi, Vec& lo) {
  const Vec even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  hi = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB);
  lo = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB);
}

#elif defined(__AVX2__)

using Vec = __m256i;
constexpr int kVecLanes = 8;
static inline Vec load(const uint32_t* p) { return _mm256_load_si256(reinterpret_cast<const Vec*>(p)); }
static inline void store(uint32_t* p, Vec v) { _mm256_store_si256(reinterpret_cast<Vec*>(p), v); }
static inline Vec splat(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
static inline Vec xor3(Vec a, Vec b, Vec c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
static inline void mulhilo(Vec a, Vec m, Vec& hi, Vec& lo) {
  const Vec even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

#else

using Vec = uint32_t;
constexpr int kVecLanes = 1;
static inline Vec load(const uint32_t* p) { return *p; }
static inline void store(uint32_t* p, Vec v) { *p = v; }
static inline Vec splat(uint32_t v) { return v; }
static inline Vec add(Vec a, Vec b) { return a + b; }
static inline Vec xor3(Vec a, Vec b, Vec c) { return a ^ b ^ c; }
static inline void mulhilo(Vec a, Vec m, Vec& hi, Vec& lo) {
  const uint64_t p = static_cast<uint64_t>(a) * m;
  hi = static_cast<uint32_t>(p >> 32);
  lo = static_cast<uint32_t>(p);
}

#endif

// In: counters in r[0] (low) and r[1] (high), the other two words zero. Out: the four words.
// Two vectors at a time: one alone waits for its multiplications.
template <int N>
static DAE_FN void philox(const Lanes<N>& key0, const Lanes<N>& key1, Lanes<N> (&r)[4]) {
  const Vec m0 = splat(kPhiloxM0), m1 = splat(kPhiloxM1), w0 = splat(kPhiloxW0), w1 = splat(kPhiloxW1);
  constexpr int kPair = N >= 2 * kVecLanes ? 2 : 1;
  for (int lane = 0; lane < N; lane += kPair * kVecLanes) {
    Vec k0[kPair], k1[kPair], a[kPair], b[kPair], c[kPair], d[kPair];
    for (int p = 0; p < kPair; ++p) {
      const int at = lane + p * kVecLanes;
      k0[p] = load(key0.v + at), k1[p] = load(key1.v + at);
      a[p] = load(r[0].v + at), b[p] = load(r[1].v + at), c[p] = splat(0), d[p] = splat(0);
    }
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 2
      for (int p = 0; p < kPair; ++p) {
        Vec hi0, lo0, hi1, lo1;
        mulhilo(a[p], m0, hi0, lo0);
        mulhilo(c[p], m1, hi1, lo1);
        a[p] = xor3(hi1, b[p], k0[p]);
        b[p] = lo1;
        c[p] = xor3(hi0, d[p], k1[p]);
        d[p] = lo0;
        k0[p] = add(k0[p], w0);
        k1[p] = add(k1[p], w1);
      }
    }
    for (int p = 0; p < kPair; ++p) {
      const int at = lane + p * kVecLanes;
      store(r[0].v + at, a[p]);
      store(r[1].v + at, b[p]);
      store(r[2].v + at, c[p]);
      store(r[3].v + at, d[p]);
    }
  }
}

}  // namespace dae::cpu::DAE_ISA
