// The functors: what happens to one element. CPU and CUDA drivers feed them.
#pragma once

#include "math.h"

namespace dae {

// c0*x + c1*y + c2*z: noising, Tweedie conversions, Langevin, DDPM and DDIM steps.
template <class R>
struct Affine {
  R c0, c1, c2;
  DAE_FN R operator()(R x, R y, R z) const { return mul_add(c0, x, mul_add(c1, y, c2 * z)); }
};

// The same with y replaced by m = clamp(a0*x + a1*y, lo, hi), the clipped x0 estimate.
// NaN compares false and so passes through.
template <class R>
struct ClampedAffine {
  Affine<R> outer;
  R a0, a1, lo, hi;
  DAE_FN R operator()(R x, R y, R z) const {
    const R v = mul_add(a0, x, a1 * y);
    const R m = v < lo ? lo : (v > hi ? hi : v);
    return outer(x, m, z);
  }
};

}  // namespace dae
