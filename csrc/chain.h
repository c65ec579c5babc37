// Langevin chains of a known score, every step in one launch: a mixture of Gaussians with diagonal covariances, or a
// double well in each element.
#pragma once

#include "args.h"

namespace dae {

constexpr int kOfLane = 4;         // elements, and normals of one Philox block
constexpr int kMaxChainLanes = 32;  // of a row: it is within a warp

// x + h*score(x) + s*z, `steps` times, in fp32; step i has the noise of noise.fold_in(i). Rows of the mixture's tables are
// filled up to whole lanes with zeros.
struct ChainArgs {
  int64_t B, D;
  const float* x;
  float* out;
  int components;                   // of the mixture; 0: a double well
  const float *means, *precisions;  // (components, kOfLane * chain_lanes(D))
  const float* log_weights;         // (components,): of the weights, with half the logarithm of the precisions' product
  float slope, square;              // of the double well, whose score is slope * x * (x^2 - square)
  float step, spread;               // h, s
  int64_t steps;
  Noise noise;
};

// Lanes of a row: a power of two, so that sums over them are a butterfly.
DAE_FN int chain_lanes(int64_t D) {
  int lanes = 1;
  while (kOfLane * lanes < D) lanes *= 2;
  return lanes;
}

constexpr int kMaxTerms = 128;

// A weighted sum of normals, in fp32, from the first term to the last: that of a term is of noise.fold_in(its node).
struct NormalSumArgs {
  int64_t B, D;
  float* out;
  Noise noise;
  int terms;
  uint64_t nodes[kMaxTerms];
  float weights[kMaxTerms];
};

}  // namespace dae
