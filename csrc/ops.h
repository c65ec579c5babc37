// The functors: what happens to one element. CPU and CUDA drivers feed them.
#pragma once

#include "chain.h"

namespace dae {

// IEEE, of any argument. On AMD's GPUs the library's: clang before 17 took the builtin for an instruction that is not.
DAE_FN float square_root(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#elif defined(__HIP_DEVICE_COMPILE__)
  return sqrtf(a);
#else
  return __builtin_sqrtf(a);
#endif
}
DAE_FN double square_root(double a) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(a);
#elif defined(__HIP_DEVICE_COMPILE__)
  return sqrt(a);
#else
  return __builtin_sqrt(a);
#endif
}

// c0*x + c1*y + ..., the last product first: noising, Tweedie conversions, Langevin, DDPM and DDIM steps, guidance.
template <class R>
DAE_FN R affine(R c, R x) {
  return c * x;
}
template <class R, class... Rest>
DAE_FN R affine(R c, R x, Rest... rest) {
  return mul_add(c, x, affine(rest...));
}

// The clipped x0 estimate. NaN compares false and so passes through.
template <class R>
struct Clamp {
  R lo, hi;
  DAE_FN R operator()(R v) const { return v < lo ? lo : (v > hi ? hi : v); }
  DAE_FN bool passes(R v) const { return lo <= v && v <= hi; }
};

template <class R>
DAE_FN R where_is(R a, float c, R b, R otherwise) {
  return a == c ? b : otherwise;
}

// w + m*(v - w); where m is 0 or 1 the one or the other, whatever the other holds.
template <class R>
DAE_FN R blend(R m, R v, R w) {
  const R between = mul_add(m, v - w, w);
  return where_is(m, 0, w, where_is(m, 1, v, between));
}

// rho(r) and half its derivative. The pseudo-Huber 2 delta (sqrt(r^2 + delta^2) - delta) in a form that does not cancel,
// and straight beyond kStraight, where a square would overflow.
constexpr float kStraight = 1e18f;

template <Penalty kPenalty, class R>
struct Rho {
  R delta;
  DAE_FN R value(R r) const {
    const R size = r < 0 ? -r : r;
    if constexpr (kPenalty == Penalty::mse) return r * r;
    if constexpr (kPenalty == Penalty::l1) return size;
    if constexpr (kPenalty == Penalty::huber)
      return size > delta ? delta * (size - R(0.5) * delta) : R(0.5) * (r * r);
    if constexpr (kPenalty == Penalty::pseudo_huber) {
      const R bent = size < kStraight ? size : R(kStraight);
      const R root = square_root(mul_add(bent, bent, delta * delta));
      return 2 * delta * (bent * bent / (root + delta) + (size - bent));
    }
  }
  DAE_FN R half_slope(R r) const {
    if constexpr (kPenalty == Penalty::mse) return r;
    if constexpr (kPenalty == Penalty::l1) return r > 0 ? R(0.5) : (r < 0 ? R(-0.5) : r);
    if constexpr (kPenalty == Penalty::huber) return R(0.5) * Clamp<R>{-delta, delta}(r);
    if constexpr (kPenalty == Penalty::pseudo_huber) {
      const R bent = Clamp<R>{-R(kStraight), R(kStraight)}(r);
      return delta * (bent / square_root(mul_add(bent, bent, delta * delta)));
    }
  }
};

// e^x, e^x - 1 and e^x - 1 - x, the latter two without cancellation where x is small.
template <class R>
struct Growth {
  R value, minus_1, rest;
};

// Where |n| <= 1, with x = n ln 2 + f: (2^n - 1 - n ln 2) + (2^n - 1) f + 2^n f^2 p.
DAE_FN Growth<float> growth(float x) {
  constexpr float kLn2 = 0.693147181f;
  const Exponential e(x);
  const float value = e.value(), power = e.factor * e.other_factor, more = power - 1.0f;
  const float near = fma32(more, e.f, fma32(power * (e.f * e.f), e.p, fma32(-e.n, kLn2, more)));
  const bool small = e.n * e.n <= 1.0f;
  return {value, small ? near + x : value - 1.0f, small ? near : (value - 1.0f) - x};
}

DAE_FN constexpr double factorial(int k) { return k < 2 ? 1 : k * factorial(k - 1); }

// Of (e^x - 1 - x)/x^2 = 1/2 + x/6 + ... on |x| < 1, by Horner's rule from the last power that a double can tell.
template <int kPower = 19>
DAE_FN double taylor(double x, double sum = 0) {
  if constexpr (kPower < 2) {
    return sum;
  } else {
    constexpr double kFactor = 1 / factorial(kPower);  // made here, not at -O0 in the kernel
    return taylor<kPower - 1>(x, mul_add(sum, x, kFactor));
  }
}

// value: e^x, from elsewhere: on a CPU the library's exponential keeps a loop from vectors.
DAE_FN Growth<double> growth(double x, double value) {
  const bool small = x > -1 && x < 1;
  const double inside = small ? x : 0, near = inside * inside * taylor(inside);
  return {value, small ? near + x : value - 1, small ? near : (value - 1) - x};
}
DAE_FN Growth<double> growth(double x) { return growth(x, exponential(x)); }

// A diagonal Gaussian's sample (Kingma and Welling 2014), its divergence from N(0, 1), and their gradients. An upstream
// gradient of 0 gives 0, whatever overflows: one of the two is often not used. With m = e^(log_var/2) - 1 all is made of
// one exponential: e^log_var - 1 = m (m + 2), and e^log_var - 1 - log_var = m^2 + 2 (m - log_var/2).
template <class R>
struct Gaussian {
  R mu;
  Growth<R> scale;
  DAE_FN Gaussian(R mean, R log_variance) : mu(mean), scale(growth(R(0.5) * log_variance)) {}
  DAE_FN Gaussian(R mean, Growth<R> grown) : mu(mean), scale(grown) {}
  DAE_FN R sample(R eps) const { return mul_add(scale.value, eps, mu); }
  DAE_FN R kl() const { return R(0.5) * mul_add(mu, mu, mul_add(scale.minus_1, scale.minus_1, 2 * scale.rest)); }
  DAE_FN R mu_grad(R z_grad, R kl_grad) const { return kl_grad == 0 ? z_grad : mul_add(kl_grad, mu, z_grad); }
  DAE_FN R log_var_grad(R z_grad, R kl_grad, R eps) const {
    const R of_z = z_grad == 0 ? R(0) : z_grad * scale.value;
    const R of_kl = kl_grad == 0 ? R(0) : kl_grad * mul_add(scale.minus_1, scale.minus_1, 2 * scale.minus_1);
    return R(0.5) * mul_add(of_z, eps, of_kl);
  }
};

// (h (1 - h))^2 and half its derivative: a sigmoid's slope, squared.
template <class R>
struct SquaredSlope {
  R h, slope;
  DAE_FN explicit SquaredSlope(R code) : h(code), slope(code * (R(1) - code)) {}
  DAE_FN R value() const { return slope * slope; }
  DAE_FN R half_grad() const { return slope * (R(1) - 2 * h); }
};

// KL(q || p) of two Gaussians in nats, q having e^r times the variance of p, and means that are scale * away of q's
// standard deviations apart: (e^r - 1 - r + (scale * away)^2 e^r) / 2, and its derivatives. An upstream gradient of 0 gives
// 0, whatever overflows.
template <class R>
struct StepDivergence {
  R scale, apart;
  Growth<R> ratio;
  DAE_FN StepDivergence(R of_away, R away, R r) : scale(of_away), apart(of_away * away), ratio(growth(r)) {}
  DAE_FN R nats() const { return R(0.5) * mul_add(apart * apart, ratio.value, ratio.rest); }
  DAE_FN R away_grad(R upstream) const { return upstream == 0 ? R(0) : upstream * (scale * apart * ratio.value); }
  DAE_FN R ratio_grad(R upstream) const {
    return upstream == 0 ? R(0) : upstream * R(0.5) * mul_add(apart * apart, ratio.value, ratio.minus_1);
  }
};

// Of one component at a lane's elements: what it pulls by, (mean - x) * precision; their part of the squared distance.
struct Pull {
  float by[kOfLane], square = 0;
  DAE_FN Pull(const float* mean, const float* precision, const float (&x)[kOfLane]) {
    for (int i = 0; i < kOfLane; ++i) {
      const float away = mean[i] - x[i];
      by[i] = away * precision[i];
      square = mul_add(away, by[i], square);
    }
  }
};

DAE_FN float double_well(float x, float slope, float square) { return (x * (x * x - square)) * slope; }

// How much the components seen so far and the next one weigh, relative to the larger of their densities.
struct Balance {
  float old, next;
};

// The mean of the pulls, weighed by the components' densities; the largest of these is kept out of every exponent.
struct MixtureWeights {
  float largest, total;
  DAE_FN explicit MixtureWeights(float log_density) : largest(log_density), total(1) {}
  DAE_FN Balance add(float log_density) {
    const float top = log_density > largest ? log_density : largest;
    const Balance balance = {exponential(largest - top), exponential(log_density - top)};
    largest = top;
    total = mul_add(total, balance.old, balance.next);
    return balance;
  }
};

DAE_FN float log_density(float log_weight, float square) { return mul_add(-0.5f, square, log_weight); }

}  // namespace dae
