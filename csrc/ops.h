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

// clamp(c0*x + c1*y, lo, hi): the clipped x0 estimate. NaN compares false and so passes through.
template <class R>
struct ClampedAffine {
  Affine<R> map;
  R lo, hi;
  DAE_FN R operator()(R x, R y, R z) const {
    const R v = map(x, y, z);
    return v < lo ? lo : (v > hi ? hi : v);
  }
};

}  // namespace dae
