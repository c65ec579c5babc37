// What PTX's instructions mean, for translate.py: registers of 64 bits, typed where they are read and written.
#pragma once

#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include <cuda_runtime.h>

namespace ptx {

using Register = uint64_t;

inline Register nothing;  // written, never read
inline unsigned char* const shared = [] {
  static unsigned char memory[1 << 18] __attribute__((aligned(64)));
  return memory;
}();

template <class T>
inline T get(Register r) {
  T value;
  memcpy(&value, &r, sizeof(value));
  return value;
}
template <class T>
inline Register put(T value) {
  Register r = 0;
  memcpy(&r, &value, sizeof(value));
  return r;
}
inline Register part(Register r, int from, int bits) { return r >> from & ((Register(1) << bits) - 1); }

// As the hardware: a whole access at its own alignment, or nothing.
template <class T, int N>
inline unsigned char* checked(const unsigned char* at) {
  if (reinterpret_cast<uintptr_t>(at) % (N * sizeof(T))) {
    std::fprintf(stderr, "ptx_on_cpu: %d bytes at %p\n", static_cast<int>(N * sizeof(T)), static_cast<const void*>(at));
    std::abort();
  }
  return const_cast<unsigned char*>(at);
}
template <class T>
inline T load(const unsigned char* from, int i) {
  T value;
  memcpy(&value, from + i * sizeof(T), sizeof(T));
  return value;
}
template <class T>
inline void store(unsigned char* to, int i, T value) {
  memcpy(to + i * sizeof(T), &value, sizeof(T));
}

// Integers wrap around.
template <class T, class Op>
inline T wrapped(T a, T b, Op op) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(op(static_cast<U>(a), static_cast<U>(b))));
  } else {
    return op(a, b);
  }
}
template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
template <class T>
using Twice = std::conditional_t<sizeof(T) == 4, Wide<T>, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>;

template <class T> T add_(T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x + y; }); }
template <class T> T sub_(T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x - y; }); }
template <class T> T mul_(T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x * y; }); }
template <class T> T mad_(T a, T b, T c) { return add_(mul_(a, b), c); }
template <class T> T mul_hi_(T a, T b) { return static_cast<T>(Twice<T>(a) * Twice<T>(b) >> 8 * sizeof(T)); }
template <class T> Twice<T> mul_wide_(T a, T b) { return Twice<T>(a) * Twice<T>(b); }
template <class T> Twice<T> mad_wide_(T a, T b, Twice<T> c) { return add_(mul_wide_(a, b), c); }
template <class T> T div_(T a, T b) { return a / b; }
template <class T> T rem_(T a, T b) { return a % b; }
#if defined(UNFUSED)  // to see that it shows
inline float fma_(float a, float b, float c) { return a * b + c; }
#else
inline float fma_(float a, float b, float c) { return std::fma(a, b, c); }
#endif
inline double fma_(double a, double b, double c) { return std::fma(a, b, c); }
template <class T> T neg_(T a) { return -a; }
template <class T> T abs_(T a) { return a < 0 || (a == 0 && std::signbit(static_cast<double>(a))) ? -a : a; }
// The other one of NaN, as fmin's.
template <class T> T min_(T a, T b) { return a < b || b != b ? a : b; }
template <class T> T max_(T a, T b) { return b < a || b != b ? a : b; }
template <class T> T and_(T a, T b) { return a & b; }
template <class T> T or_(T a, T b) { return a | b; }
template <class T> T xor_(T a, T b) { return a ^ b; }
template <class T> T not_(T a) { return std::is_same_v<T, bool> ? !a : static_cast<T>(~a); }
template <class T> T sqrt_(T a) { return std::sqrt(a); }
template <class T> T rcp_(T a) { return 1 / a; }
// Correctly rounded, where a GPU's may be 2 ulp off: what is made of it must not depend on that.
inline float rsqrt_(float a) { return static_cast<float>(1 / std::sqrt(static_cast<double>(a))); }

template <class T> T shl_(T a, uint32_t by) { return by >= 8 * sizeof(T) ? 0 : static_cast<T>(a << by); }
template <class T> T shr_(T a, uint32_t by) {
  const uint32_t most = 8 * sizeof(T) - 1;
  return by > most ? (std::is_signed_v<T> ? static_cast<T>(a >> most) : 0) : static_cast<T>(a >> by);
}
template <class T> T bfi_(T a, T b, uint32_t position, uint32_t length) {
  const T mask = static_cast<T>((length >= 8 * sizeof(T) ? T(0) : T(T(1) << length)) - 1) << position;
  return (b & ~mask) | (a << position & mask);
}

inline uint32_t bfe_(uint32_t a, uint32_t position, uint32_t length) {
  return shr_(a, position) & static_cast<uint32_t>((uint64_t(1) << (length > 32 ? 32 : length)) - 1);
}
inline uint32_t prmt_(uint32_t a, uint32_t b, uint32_t chosen) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = chosen >> 4 * i & 0xf, byte = bytes >> 8 * (which & 7) & 0xff;
    result |= (which & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}

// Ordered: false of NaN, but for those in "u".
template <class T> bool unordered(T a, T b) { return a != a || b != b; }
template <class T> bool setp_eq(T a, T b) { return a == b; }
template <class T> bool setp_ne(T a, T b) { return !unordered(a, b) && a != b; }
template <class T> bool setp_lt(T a, T b) { return a < b; }
template <class T> bool setp_le(T a, T b) { return a <= b; }
template <class T> bool setp_gt(T a, T b) { return a > b; }
template <class T> bool setp_ge(T a, T b) { return a >= b; }
template <class T> bool setp_lo(T a, T b) { return a < b; }
template <class T> bool setp_ls(T a, T b) { return a <= b; }
template <class T> bool setp_hi(T a, T b) { return a > b; }
template <class T> bool setp_hs(T a, T b) { return a >= b; }
template <class T> bool setp_equ(T a, T b) { return unordered(a, b) || a == b; }
template <class T> bool setp_neu(T a, T b) { return a != b; }
template <class T> bool setp_ltu(T a, T b) { return unordered(a, b) || a < b; }
template <class T> bool setp_leu(T a, T b) { return unordered(a, b) || a <= b; }
template <class T> bool setp_gtu(T a, T b) { return unordered(a, b) || a > b; }
template <class T> bool setp_geu(T a, T b) { return unordered(a, b) || a >= b; }

struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float v) {
    const uint32_t u = get<uint32_t>(put(v));
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(is_nan ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
  explicit operator float() const { return get<float>(put(static_cast<uint32_t>(bits) << 16)); }
};
template <class Half> uint32_t pair(float high, float low) {
  return static_cast<uint32_t>(put(Half(high)) << 16 | put(Half(low)));
}
inline uint32_t cvt_bf16x2(float high, float low) { return pair<bf16>(high, low); }
inline uint32_t cvt_f16x2(float high, float low) { return pair<_Float16>(high, low); }

inline uint32_t shfl_bfly(uint32_t value, uint32_t lanes, uint32_t within, uint32_t members) {
  if (within != 31 || members != ~0u) std::abort();  // no whole warp
  return static_cast<uint32_t>(__shfl_xor_sync(members, value, static_cast<int>(lanes)));
}

struct Kernel {
  void (*thread)(const unsigned char* parameters);
  size_t size;                                      // of all parameters
  std::vector<std::pair<size_t, size_t>> arguments;  // offset and size of each
};
using Table = std::map<std::string, Kernel>;

}  // namespace ptx
