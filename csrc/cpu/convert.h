// Element types in memory and the type they are computed in.
#pragma once

#include "../math.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dae::cpu::DAE_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

static inline float widen(float v) { return v; }
static inline double widen(double v) { return v; }
static inline float widen(BFloat16 v) { return bits_as<float>(static_cast<uint32_t>(v.bits) << 16); }

static inline float widen(Half v) {
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const float normal = bits_as<float>(magnitude + (exponent == 0x0f800000u ? 0x70000000u : 0x38000000u));
  const float subnormal = bits_as<float>(magnitude + 0x38800000u) - 0x1p-14f;
  const uint32_t value = bits_as<uint32_t>(exponent == 0 ? subnormal : normal);
  return bits_as<float>(value | static_cast<uint32_t>(v.bits & 0x8000u) << 16);
}

// Round to nearest even.
static inline void narrow(float v, float& out) { out = v; }
static inline void narrow(double v, double& out) { out = v; }
static inline void narrow(float v, double& out) { out = v; }

// A NaN of arithmetic is quiet, which its upper half says; rounding it could carry into the sign.
static inline void narrow(float v, BFloat16& out) {
  const uint32_t u = bits_as<uint32_t>(v), half = 0x7fffu + ((u >> 16) & 1u);
  out.bits = static_cast<uint16_t>((u + (v != v ? 0u : half)) >> 16);
}

static inline void narrow(float v, Half& out) {
  const uint32_t u = bits_as<uint32_t>(v), sign = u & 0x80000000u, m = u ^ sign;
  const uint32_t normal = (m - 0x38000000u + 0xfffu + ((m >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(m) + 0.5f) - 0x3f000000u;
  const uint32_t special = m > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t h = m >= 0x47800000u ? special : (m < 0x38800000u ? subnormal : normal);
  out.bits = static_cast<uint16_t>(h | sign >> 16);
}

// What the arithmetic loops read and write: the type in memory, except that Half is converted a block
// at a time before and after them, since compilers find its instructions only when they are spelled out.
template <class T>
struct LoopType {
  using type = T;
};
template <>
struct LoopType<Half> {
  using type = float;
};

static inline void convert(uint8_t v, uint8_t& out) { out = v; }
static inline void convert(BFloat16 v, BFloat16& out) { out = v; }
template <class T, class U>
static inline void convert(T v, U& out) {
  narrow(widen(v), out);
}

template <class T, class U>
static inline void convert_block(const T* in, U* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) convert(in[i], out[i]);
}

#if defined(__F16C__)
static inline void convert_block(const Half* in, float* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#endif
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = widen(in[i]);
}

static inline void convert_block(const float* in, Half* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) narrow(in[i], out[i]);
}
#endif

}  // namespace dae::cpu::DAE_ISA
