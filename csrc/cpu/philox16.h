// Sixteen Philox blocks at once, each lane with its own key and counter.
//
// Only the 32x32 -> 64 bit product is written per instruction set: compilers turn the plain loop
// into 64-bit multiplies, which cost three times as much.
#pragma once

#include "../math.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dae::cpu::DAE_ISA {

constexpr int kLanes = 16;

struct alignas(64) Lanes {
  uint32_t v[kLanes];
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
static DAE_FN void philox16(const Lanes& key0, const Lanes& key1, Lanes (&r)[4]) {
  const Vec m0 = splat(kPhiloxM0), m1 = splat(kPhiloxM1), w0 = splat(kPhiloxW0), w1 = splat(kPhiloxW1);
  for (int lane = 0; lane < kLanes; lane += kVecLanes) {
    Vec k0 = load(key0.v + lane), k1 = load(key1.v + lane);
    Vec a = load(r[0].v + lane), b = load(r[1].v + lane), c = splat(0), d = splat(0);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      Vec hi0, lo0, hi1, lo1;
      mulhilo(a, m0, hi0, lo0);
      mulhilo(c, m1, hi1, lo1);
      a = xor3(hi1, b, k0);
      b = lo1;
      c = xor3(hi0, d, k1);
      d = lo0;
      k0 = add(k0, w0);
      k1 = add(k1, w1);
    }
    store(r[0].v + lane, a);
    store(r[1].v + lane, b);
    store(r[2].v + lane, c);
    store(r[3].v + lane, d);
  }
}

}  // namespace dae::cpu::DAE_ISA
