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

// What loops of numbers read and write: the type in memory, except that Half is converted a block at a time before and
// after them, since compilers find its instructions only when they are spelled out. Loops of Floats spell them out.
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
static inline void convert(Half v, Half& out) { out = v; }
template <class T, class U>
static inline void convert(T v, U& out) {
  narrow(widen(v), out);
}

// A vector of floats, and how halves become one and it becomes halves. kFloats is 1 where there is none.
#if defined(__AVX512F__)
constexpr int kFloats = 16;
struct Floats {
  __m512 v;
  Floats() = default;
  Floats(__m512 of) : v(of) {}
  explicit Floats(float one) : v(_mm512_set1_ps(one)) {}
  friend Floats operator*(Floats a, Floats b) { return _mm512_mul_ps(a.v, b.v); }
  friend Floats operator-(Floats a, Floats b) { return _mm512_sub_ps(a.v, b.v); }
  friend Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  friend Floats where_is(Floats a, float c, Floats b, Floats otherwise) {
    return _mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(c), _CMP_EQ_OQ), b.v);
  }
};
static inline Floats floats_at(const float* in) { return _mm512_loadu_ps(in); }
static inline Floats floats_at(const Half* in) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
}
static inline Floats floats_at(const BFloat16* in) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in))), 16));
}
static inline void put(Floats a, float* out) { _mm512_storeu_ps(out, a.v); }
static inline void put(Floats a, Half* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void put(Floats a, BFloat16* out) {  // as narrow
  const __m512i u = _mm512_castps_si512(a.v), even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __m512i half = _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff));
  const __m512i upper = _mm512_srli_epi32(_mm512_mask_add_epi32(u, number, u, half), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(upper));
}
#elif defined(__F16C__) && defined(__AVX2__)
constexpr int kFloats = 8;
struct Floats {
  __m256 v;
  Floats() = default;
  Floats(__m256 of) : v(of) {}
  explicit Floats(float one) : v(_mm256_set1_ps(one)) {}
  friend Floats operator*(Floats a, Floats b) { return _mm256_mul_ps(a.v, b.v); }
  friend Floats operator-(Floats a, Floats b) { return _mm256_sub_ps(a.v, b.v); }
  friend Floats mul_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  friend Floats where_is(Floats a, float c, Floats b, Floats otherwise) {
    return _mm256_blendv_ps(otherwise.v, b.v, _mm256_cmp_ps(a.v, _mm256_set1_ps(c), _CMP_EQ_OQ));
  }
};
static inline Floats floats_at(const float* in) { return _mm256_loadu_ps(in); }
static inline Floats floats_at(const Half* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}
static inline Floats floats_at(const BFloat16* in) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))), 16));
}
static inline void put(Floats a, float* out) { _mm256_storeu_ps(out, a.v); }
static inline void put(Floats a, Half* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void put(Floats a, BFloat16* out) {  // as narrow
  const __m256i u = _mm256_castps_si256(a.v), even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q));
  const __m256i half = _mm256_and_si256(_mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)), number);
  const __m256i upper = _mm256_srli_epi32(_mm256_add_epi32(u, half), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}
#else
constexpr int kFloats = 1;
struct Floats {};
#endif

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Half> = true;
template <>
constexpr bool kIsHalf<BFloat16> = true;

template <class T, class U>
static inline void convert_block(const T* in, U* out, int64_t n) {
  int64_t whole = 0;
  if constexpr (kFloats > 1 && ((kIsHalf<T> && sizeof(U) == sizeof(float)) || (sizeof(T) == sizeof(float) && kIsHalf<U>))) {
    whole = n / kFloats * kFloats;
    for (int64_t i = 0; i < whole; i += kFloats) put(floats_at(in + i), out + i);
  }
#pragma GCC ivdep
  for (int64_t i = whole; i < n; ++i) convert(in[i], out[i]);
}

}  // namespace dae::cpu::DAE_ISA
