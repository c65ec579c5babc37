// The noise contract as arithmetic: Philox4x32-10 words and the normals made from them.
//
// Every function here is branch-free, uses explicit fma, IEEE sqrt and no division, so that each
// instruction set and each device gives the same 32 bits. Do not reorder a sum or drop an fma.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__HIPCC__)
#include <hip/hip_runtime.h>  // before any use of memcpy, which it has for the device
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define DAE_FN __host__ __device__ __forceinline__
#else
#define DAE_FN inline __attribute__((always_inline))
#endif

namespace dae {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Key {
  uint64_t seed, offset;
};

struct Block {
  uint32_t r[4];
};

template <class To, class From>
DAE_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps every bit");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// One rounding, everywhere. Without the instruction: the product of two floats is exact in double;
// rounding the double sum to odd keeps the second rounding (to float) from seeing a false tie
// (Boldo and Melquiond 2008). libm's fmaf would be the same value at a call per element.
DAE_FN float fma32(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  return __builtin_fmaf(a, b, c);
#else
  const double p = static_cast<double>(a) * b, d = c, s = p + d;
  const double t = s - p, err = (p - (s - t)) + (d - t);  // TwoSum: s + err = p + d exactly
  // To odd: down to the neighbour nearer zero when the exact sum lies that way, then set the low bit.
  // No branch and no select, so that it vectorises.
  const int64_t inexact = (err > 0) | (err < 0), inward = ((err > 0) & (s < 0)) | ((err < 0) & (s > 0));
  return static_cast<float>(bits_as<double>((bits_as<int64_t>(s) - inward) | inexact));
#endif
}

// a*b + c. Only float carries the bit-for-bit promise; double is the checking precision, and
// unfused it is the same on every instruction set.
DAE_FN float mul_add(float a, float b, float c) { return fma32(a, b, c); }
DAE_FN double mul_add(double a, double b, double c) { return a * b + c; }

// On a GPU one instruction; from the plain product nvcc makes two.
DAE_FN uint64_t mul_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// The keys of Philox's rounds.
struct Rounds {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

DAE_FN Rounds rounds_of(uint64_t seed) {
  Rounds rounds;
  for (int i = 0; i < kPhiloxRounds; ++i) {
    rounds.k0[i] = static_cast<uint32_t>(seed) + static_cast<uint32_t>(i) * kPhiloxW0;
    rounds.k1[i] = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(i) * kPhiloxW1;
  }
  return rounds;
}

DAE_FN Block philox4x32_10(Block counter, const Rounds& rounds) {
  Block b = counter;
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const uint64_t p0 = mul_wide(b.r[0], kPhiloxM0), p1 = mul_wide(b.r[2], kPhiloxM1);
    b = {{static_cast<uint32_t>(p1 >> 32) ^ b.r[1] ^ rounds.k0[i], static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ b.r[3] ^ rounds.k1[i], static_cast<uint32_t>(p0)}};
  }
  return b;
}

// The block of a key's word stream whose counter is key.offset + n.
DAE_FN Block block_of(const Rounds& rounds, uint64_t counter) {
  return philox4x32_10({{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}}, rounds);
}

// Block n of a key's word stream.
DAE_FN Block block_at(Key key, uint64_t n) { return block_of(rounds_of(key.seed), key.offset + n); }

// Block `data` of `key`, read as a key.
DAE_FN Key fold_in(Key key, uint64_t data) {
  const Block b = block_at(key, data);
  return {b.r[0] | static_cast<uint64_t>(b.r[1]) << 32, b.r[2] | static_cast<uint64_t>(b.r[3]) << 32};
}

// The normals' constants that meet another constant in one fma: a GPU's instruction has room for one, so that a loop
// which makes many of them keeps these in registers (cuda/batch.cuh).
struct Pinned {
  float scale = 0x1p-32f, log = -1.7469501495e-01f, sine = -7.5393562317e+01f, cosine = 5.9229240417e+01f;
};

// -2 ln u with u = (r + 1/2) 2^-32, relative error below 2^-22.9.
//
// For u > 1/2 the complement 1 - u comes from ~r, so that ln stays exact as u -> 1. Then
// u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and -2 ln(1 + f) = -2f + f^2 Q(f), Q minimax.
DAE_FN float neg2_log_u(uint32_t r, const Pinned& pinned) {
  const int32_t sign = static_cast<int32_t>(r) >> 31;  // all ones when u > 1/2
  const float x = fma32(static_cast<float>(static_cast<int32_t>(r) ^ sign), pinned.scale, 0x1p-33f);
  const float u = sign ? 1.0f - x : x;
  const int32_t bits = bits_as<int32_t>(u);
  const int32_t exponent = (bits - 0x3f3504f3) & static_cast<int32_t>(0xff800000);  // e << 23
  const float f = exponent == 0 ? -x : bits_as<float>(bits - exponent) - 1.0f;
  float q = fma32(f, pinned.log, 2.8614965081e-01f);
  q = fma32(q, f, -2.9835978150e-01f);
  q = fma32(q, f, 3.3141028881e-01f);
  q = fma32(q, f, -3.9924141765e-01f);
  q = fma32(q, f, 5.0003510714e-01f);
  q = fma32(q, f, -6.6667902470e-01f);
  q = fma32(q, f, 9.9999982119e-01f);
  constexpr float kNeg2Ln2 = -1.3862943611f * 0x1p-23f;  // exponent is e scaled by 2^23
  return fma32(f * f, q, fma32(static_cast<float>(exponent), kNeg2Ln2, -2.0f * f));
}

// Whether it is set. On a GPU one instruction; from the plain form nvcc makes three.
DAE_FN bool bit_30(uint32_t r) {
#if defined(__CUDA_ARCH__)
  uint32_t set;
  asm("{.reg .pred p; .reg .b32 t; and.b32 t, %1, 0x40000000; setp.ne.b32 p, t, 0; selp.b32 %0, 1, 0, p;}"
      : "=r"(set)
      : "r"(r));
  return set;
#else
  return (r & 0x40000000u) != 0;
#endif
}

constexpr float kTwoPi = 6.2831855f, kTwoPiRest = -1.7484556e-07f;  // 2 pi is their sum

// On |y| <= 1/8, of y^2: what is left of sin(2 pi y) / y from its second power of y on, of cos(2 pi y) from its fourth.
DAE_FN float sine_series(float y2, const Pinned& pinned) {
  return fma32(fma32(y2, pinned.sine, 8.1592353821e+01f), y2, -4.1341663361e+01f);
}
DAE_FN float cosine_series(float y2, const Pinned& pinned) {
  return fma32(fma32(y2, pinned.cosine, -8.5443237305e+01f), y2, 6.4939323425e+01f);
}

// Box-Muller's angle 2 pi u with u = (r + 1/2) 2^-32: sin and cos of it, both to be multiplied by the sign, which is
// the top bit of `sign`. The nearest quarter turn comes off as integer bits, so the argument of the polynomials is
// exact up to its one rounding to float.
DAE_FN void sincos_2pi_u(uint32_t r, float& sine, float& cosine, uint32_t& sign, const Pinned& pinned) {
  const float y = static_cast<float>(static_cast<int32_t>(r << 2 | 2u)) * 0x1p-34f;
  const float y2 = y * y;
  // The leading product is rounded once, with everything else inside it.
  const float s = fma32(y, kTwoPi, y * fma32(sine_series(y2, pinned), y2, kTwoPiRest));
  const float c = fma32(fma32(cosine_series(y2, pinned), y2, -1.9739208221e+01f), y2, 1.0f);
  sign = r + 0x20000000u;  // the quarter turn in the two top bits: a half turn is a sign, a quarter swaps the two
  const bool swap = bit_30(sign);
  sine = swap ? c : s;
  cosine = swap ? -s : c;
}

DAE_FN double nearest(double a) {
#if defined(__CUDA_ARCH__)
  return rint(a);
#else
  return __builtin_rint(a);
#endif
}
DAE_FN float nearest(float a) {
#if defined(__CUDA_ARCH__)
  return rintf(a);
#else
  return __builtin_rintf(a);
#endif
}

// sin and cos of 2 pi u within 0.8 * 2^-24, near zeros of the sine 0.8 ulp. In turns the whole and the quarter ones come
// off without a rounding, however large u is; what float leaves of the rest is a second number, `low`.
DAE_FN void sincos_2pi(double u, float& sine, float& cosine) {
  const double part = u - nearest(u);
  const float high = static_cast<float>(part), low = static_cast<float>(part - static_cast<double>(high));
  const float quarter = nearest(4.0f * high), y = fma32(quarter, -0.25f, high), y2 = y * y;
  constexpr Pinned kPinned;
  constexpr float kSquare = -19.739208f, kSquareRest = -5.8071e-7f;  // -(2 pi)^2 / 2 is their sum
  const float turn = kTwoPi * low;  // sin(a + turn) = sin a + turn cos a, and cos likewise
  const float s = fma32(
      y, kTwoPi, fma32(turn, fma32(y2, kSquare, 1.0f), y * fma32(sine_series(y2, kPinned), y2, kTwoPiRest)));
  const float rest = fma32(fma32(y, y, -y2), kSquare, y2 * fma32(cosine_series(y2, kPinned), y2, kSquareRest));
  const float c = 1.0f + fma32(y2, kSquare, fma32(-turn, s, rest));
  // quarter is -2, -1, 0, 1 or 2: a quarter turn swaps the two, with a sign for one of them; a half turn changes both.
  const bool swap = quarter * quarter == 1.0f;
  const float first = swap ? c : s, second = swap ? s : c;
  sine = quarter < 0.0f || quarter > 1.0f ? -first : first;
  cosine = quarter > 0.0f || quarter < -1.0f ? -second : second;
}

// IEEE sqrt of a number in [2^-32, 46]. On a GPU these are the instructions of sqrt.rn without its branch
// for zeros, subnormals and infinities. AMD's instruction is within one ulp, and so was what clang before 17 made of
// __builtin_sqrtf: the remainders of its two neighbours say which of the three is nearest.
DAE_FN float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
  float rsqrt;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(rsqrt) : "f"(a));
  const float s = a * rsqrt;
  return fma32(fma32(-s, s, a), 0.5f * rsqrt, s);
#elif defined(__HIP_DEVICE_COMPILE__)
  const float s = __builtin_amdgcn_sqrtf(a);
  const float below = bits_as<float>(bits_as<uint32_t>(s) - 1), above = bits_as<float>(bits_as<uint32_t>(s) + 1);
  return fma32(-below, s, a) <= 0.0f ? below : (fma32(-above, s, a) > 0.0f ? above : s);
#else
  return __builtin_sqrtf(a);
#endif
}

// Box-Muller 1958: two normals from two words.
DAE_FN void normal_pair(uint32_t radius, uint32_t angle, float& z0, float& z1, const Pinned& pinned = Pinned()) {
  float sine, cosine;
  uint32_t sign;
  sincos_2pi_u(angle, sine, cosine, sign, pinned);
  const float s = bits_as<float>(bits_as<uint32_t>(sqrt_rn(neg2_log_u(radius, pinned))) ^ (sign & 0x80000000u));
  z0 = s * cosine;
  z1 = s * sine;
}

// e^x = 2^n (1 + f + f^2 p), x = n ln 2 + f, |f| <= ln(2)/2, by Cephes' minimax polynomial: within 2 ulp; overflow,
// underflow and NaN as they should be. 2^n in two factors: one alone would overflow, or lose a subnormal result.
struct Exponential {
  float n, f, p, factor, other_factor;
  DAE_FN explicit Exponential(float x) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer
    const float inside = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
    const float shifted = fma32(inside, 1.44269504f, kRounder);
    n = shifted - kRounder;
    f = fma32(n, 2.12194440e-4f, fma32(n, -0.693359375f, inside));
    p = fma32(f, 1.9875691500e-4f, 1.3981999507e-3f);
    p = fma32(p, f, 8.3334519073e-3f);
    p = fma32(p, f, 4.1665795894e-2f);
    p = fma32(p, f, 1.6666665459e-1f);
    p = fma32(p, f, 5.0000001201e-1f);
    const int32_t power = bits_as<int32_t>(shifted) - bits_as<int32_t>(kRounder), half = power >> 1;
    // Of a NaN's exponent nothing is left in a signed shift.
    factor = bits_as<float>(static_cast<uint32_t>(half + 127) << 23);
    other_factor = bits_as<float>(static_cast<uint32_t>(power - half + 127) << 23);
  }
  DAE_FN float value() const { return (fma32(f * f, p, f) + 1.0f) * factor * other_factor; }
};
DAE_FN float exponential(float x) { return Exponential(x).value(); }
DAE_FN double exponential(double x) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  return exp(x);
#else
  return __builtin_exp(x);
#endif
}

}  // namespace dae
