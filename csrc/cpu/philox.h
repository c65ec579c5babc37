// Philox blocks by the vector, each lane with its own key and counter.
//
// A word is the low half of a 64-bit lane; what its other half holds is not read. The 32x32 -> 64 bit product then needs no
// shuffles: its low half is the next word as it is, its high half a shift away. Even blocks are in one vector, odd ones in
// another, and the last round puts them together.
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
static inline Vec load(const void* p) { return _mm512_load_si512(p); }
static inline void store(void* p, Vec v) { _mm512_store_si512(p, v); }
static inline Vec splat(uint64_t v) { return _mm512_set1_epi64(static_cast<int64_t>(v)); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_epi64(a, b); }
static inline Vec xor2(Vec a, Vec b) { return _mm512_xor_si512(a, b); }
static inline Vec xor3(Vec a, Vec b, Vec c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
static inline Vec product(Vec a, Vec m) { return _mm512_mul_epu32(a, m); }
static inline Vec high(Vec a) { return _mm512_srli_epi64(a, 32); }
static inline Vec lows(Vec even, Vec odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB); }
static inline Vec highs(Vec even, Vec odd) { return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB); }

#elif defined(__AVX2__)

using Vec = __m256i;
static inline Vec load(const void* p) { return _mm256_load_si256(static_cast<const Vec*>(p)); }
static inline void store(void* p, Vec v) { _mm256_store_si256(static_cast<Vec*>(p), v); }
static inline Vec splat(uint64_t v) { return _mm256_set1_epi64x(static_cast<int64_t>(v)); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_epi64(a, b); }
static inline Vec xor2(Vec a, Vec b) { return _mm256_xor_si256(a, b); }
static inline Vec xor3(Vec a, Vec b, Vec c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
static inline Vec product(Vec a, Vec m) { return _mm256_mul_epu32(a, m); }
static inline Vec high(Vec a) { return _mm256_srli_epi64(a, 32); }
static inline Vec lows(Vec even, Vec odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
static inline Vec highs(Vec even, Vec odd) { return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA); }

#else

using Vec = uint64_t;
static inline Vec load(const void* p) { return *static_cast<const Vec*>(p); }
static inline void store(void* p, Vec v) { *static_cast<Vec*>(p) = v; }
static inline Vec splat(uint64_t v) { return v; }
static inline Vec add(Vec a, Vec b) { return a + b; }
static inline Vec xor2(Vec a, Vec b) { return a ^ b; }
static inline Vec xor3(Vec a, Vec b, Vec c) { return a ^ b ^ c; }
static inline Vec product(Vec a, Vec m) { return static_cast<uint64_t>(static_cast<uint32_t>(a)) * m; }
static inline Vec high(Vec a) { return a >> 32; }
static inline Vec lows(Vec even, Vec odd) { return static_cast<uint32_t>(even) | odd << 32; }
static inline Vec highs(Vec even, Vec odd) { return even >> 32 | (odd & 0xffffffff00000000u); }

#endif

constexpr int kVecLanes = sizeof(Vec) / 4;  // 32-bit lanes: two half as wide are in a vector of even and one of odd lanes

// N lanes of 64 bits: even ones, then odd ones.
template <int N>
struct alignas(64) Wide {
  uint64_t v[2][N / 2];
  DAE_FN uint64_t& operator[](int lane) { return v[lane % 2][lane / 2]; }
  DAE_FN Vec at(int lane, int odd) const { return load(v[odd] + lane / 2); }
  // From 32 bits a lane, and from two such halves. By the vector: a vector load of what was stored by eights stalls.
  DAE_FN void spread(const Lanes<N>& low) {
    for (int lane = 0; lane < N; lane += kVecLanes) {
      const Vec both = load(low.v + lane);
      store(v[0] + lane / 2, both), store(v[1] + lane / 2, high(both));
    }
  }
  DAE_FN void join(const Lanes<N>& low, const Lanes<N>& up) {
    for (int lane = 0; lane < N; lane += kVecLanes) {
      const Vec first = load(low.v + lane), second = load(up.v + lane);
      store(v[0] + lane / 2, lows(first, second)), store(v[1] + lane / 2, highs(first, second));
    }
  }
};

// The counters first, first + 1, ...
struct Consecutive {
  uint64_t first;
  DAE_FN Vec at(int lane, int odd) const {
    alignas(64) static const uint64_t kEven[8] = {0, 2, 4, 6, 8, 10, 12, 14};
    return add(load(kEven), splat(first + static_cast<uint64_t>(lane + odd)));
  }
};

// The same counter, added to each lane's first.
template <int N>
struct Apart {
  const Wide<N>& first;
  uint64_t block;
  DAE_FN Vec at(int lane, int odd) const { return add(first.at(lane, odd), splat(block)); }
};

// One key for all lanes: those of the rounds.
struct OneKey {
  uint64_t k[2][kPhiloxRounds];
  explicit OneKey(uint64_t seed) {
    const Rounds rounds = rounds_of(seed);
    for (int i = 0; i < kPhiloxRounds; ++i) k[0][i] = rounds.k0[i], k[1][i] = rounds.k1[i];
  }
  DAE_FN Vec at(int word, int round, int, int) const { return splat(k[word][round]); }
};

// A key for each lane: that of the first round.
template <int N>
struct LaneKeys {
  Wide<N> k[2];
  DAE_FN Vec at(int word, int round, int lane, int odd) const {
    return add(k[word].at(lane, odd), splat(static_cast<uint64_t>(round) * (word ? kPhiloxW1 : kPhiloxW0)));
  }
};

// The four words of N blocks. Two vectors at a time: one alone waits for its multiplications.
template <int N, class Counters, class Keys>
static DAE_FN void philox(const Counters& counters, const Keys& keys, Lanes<N> (&r)[4]) {
  const Vec m0 = splat(kPhiloxM0), m1 = splat(kPhiloxM1);
  constexpr int kPair = N >= 2 * kVecLanes ? 2 : 1, kLast = kPhiloxRounds - 1;
  for (int lane = 0; lane < N; lane += kPair * kVecLanes) {
    Vec a[kPair][2], b[kPair][2], c[kPair][2], d[kPair][2];
    for (int p = 0; p < kPair; ++p) {
      const int at = lane + p * kVecLanes;
      for (int odd = 0; odd < 2; ++odd) {  // the first round: two words of the counter are 0
        const Vec counter = counters.at(at, odd), p0 = product(counter, m0);
        a[p][odd] = xor2(high(counter), keys.at(0, 0, at, odd)), b[p][odd] = splat(0);
        c[p][odd] = xor2(high(p0), keys.at(1, 0, at, odd)), d[p][odd] = p0;
      }
    }
#pragma GCC unroll 10
    for (int round = 1; round < kLast; ++round) {
#pragma GCC unroll 2
      for (int p = 0; p < kPair; ++p) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const int at = lane + p * kVecLanes;
          const Vec p0 = product(a[p][odd], m0), p1 = product(c[p][odd], m1);
          a[p][odd] = xor3(high(p1), b[p][odd], keys.at(0, round, at, odd)), b[p][odd] = p1;
          c[p][odd] = xor3(high(p0), d[p][odd], keys.at(1, round, at, odd)), d[p][odd] = p0;
        }
      }
    }
    for (int p = 0; p < kPair; ++p) {
      const int at = lane + p * kVecLanes;
      const auto key = [&](int word) { return lows(keys.at(word, kLast, at, 0), keys.at(word, kLast, at, 1)); };
      const Vec p0[2] = {product(a[p][0], m0), product(a[p][1], m0)}, p1[2] = {product(c[p][0], m1), product(c[p][1], m1)};
      store(r[0].v + at, xor3(highs(p1[0], p1[1]), lows(b[p][0], b[p][1]), key(0)));
      store(r[1].v + at, lows(p1[0], p1[1]));
      store(r[2].v + at, xor3(highs(p0[0], p0[1]), lows(d[p][0], d[p][1]), key(1)));
      store(r[3].v + at, lows(p0[0], p0[1]));
    }
  }
}

}  // namespace dae::cpu::DAE_ISA
