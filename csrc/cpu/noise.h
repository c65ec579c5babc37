// Noise of one unit of work, written to a contiguous block of floats.
#pragma once

#include "args.h"
#include "philox16.h"

namespace dae::cpu::DAE_ISA {

constexpr int kValues = 4 * kLanes;  // of sixteen blocks

static inline uint64_t sample_of(const Noise& noise, int64_t row) {
  return noise.sample ? static_cast<uint64_t>(noise.sample[row]) : noise.first_sample + static_cast<uint64_t>(row);
}

static inline Key row_key(const Noise& noise, int64_t row) {
  return noise.fold ? fold_in(noise.key, sample_of(noise, row)) : noise.key;
}

// Written over the whole array in one loop each, so that the stores are vectors: a vector load of
// sixteen scalar stores stalls.
static DAE_FN void fill_key(Lanes& key0, Lanes& key1, uint64_t seed) {
  for (int j = 0; j < kLanes; ++j) key0.v[j] = static_cast<uint32_t>(seed);
  for (int j = 0; j < kLanes; ++j) key1.v[j] = static_cast<uint32_t>(seed >> 32);
}

// Lane j: counter first + j.
static DAE_FN void fill_counters(Lanes (&r)[4], uint64_t first) {
  for (int j = 0; j < kLanes; ++j) r[0].v[j] = static_cast<uint32_t>(first + static_cast<uint64_t>(j));
  for (int j = 0; j < kLanes; ++j) r[1].v[j] = static_cast<uint32_t>((first + static_cast<uint64_t>(j)) >> 32);
}

// What a block of words becomes: z[i][lane] is element i of that lane's block.
struct ToNormal {
  using type = float;
  static DAE_FN void apply(const Lanes (&r)[4], float (&z)[4][kLanes]) {
    for (int j = 0; j < kLanes; ++j) normal_pair(r[0].v[j], r[1].v[j], z[0][j], z[1][j]);
    for (int j = 0; j < kLanes; ++j) normal_pair(r[2].v[j], r[3].v[j], z[2][j], z[3][j]);
  }
};

struct ToWord {
  using type = int64_t;
  static DAE_FN void apply(const Lanes (&r)[4], int64_t (&z)[4][kLanes]) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < kLanes; ++j) z[i][j] = r[i].v[j];
  }
};

template <class To>
static DAE_FN void sixteen_blocks(const Lanes& key0, const Lanes& key1, Lanes (&r)[4],
                                  typename To::type (&z)[4][kLanes]) {
  philox16(key0, key1, r);
  To::apply(r, z);
}

// Elements [begin, begin + n) of one row; begin is a multiple of 4.
template <class To>
static inline void fill_row(const Noise& noise, int64_t row, int64_t begin, int64_t n, typename To::type* out) {
  const Key key = row_key(noise, row);
  alignas(64) Lanes key0, key1, r[4];
  fill_key(key0, key1, key.seed);
  for (int64_t done = 0; done < n; done += kValues) {
    alignas(64) typename To::type z[4][kLanes];
    fill_counters(r, key.offset + static_cast<uint64_t>((begin + done) / 4));
    sixteen_blocks<To>(key0, key1, r, z);
    if (n - done >= kValues) {
      for (int j = 0; j < kLanes; ++j)
        for (int i = 0; i < 4; ++i) out[done + 4 * j + i] = z[i][j];
    } else {
      for (int64_t e = done; e < n; ++e) out[e] = z[(e - done) % 4][(e - done) / 4];
    }
  }
}

// `rows` whole rows of D elements, a row to a lane: short rows would leave most lanes of fill_row idle.
template <class To>
static inline void fill_short_rows(const Noise& noise, int64_t row, int64_t rows, int64_t D,
                                   typename To::type* out) {
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t live = rows - first < kLanes ? rows - first : kLanes;
    alignas(64) Lanes key0, key1, low, high, r[4];
    uint64_t counter[kLanes];
    for (int64_t j = 0; j < kLanes; ++j)
      counter[j] = noise.fold && j < live ? noise.key.offset + sample_of(noise, row + first + j) : 0;
    if (noise.fold) {
      fill_key(key0, key1, noise.key.seed);
      for (int j = 0; j < kLanes; ++j) {
        r[0].v[j] = static_cast<uint32_t>(counter[j]);
        r[1].v[j] = static_cast<uint32_t>(counter[j] >> 32);
      }
      philox16(key0, key1, r);
      key0 = r[0], key1 = r[1], low = r[2], high = r[3];
    } else {
      fill_key(key0, key1, noise.key.seed);
      fill_key(low, high, noise.key.offset);
    }
    for (int64_t begin = 0; begin < D; begin += 4) {
      const uint32_t block = static_cast<uint32_t>(begin / 4);
      for (int j = 0; j < kLanes; ++j) {
        r[0].v[j] = low.v[j] + block;
        r[1].v[j] = high.v[j] + (r[0].v[j] < block ? 1u : 0u);
      }
      alignas(64) typename To::type z[4][kLanes];
      sixteen_blocks<To>(key0, key1, r, z);
      const int64_t width = D - begin < 4 ? D - begin : 4;
      for (int64_t j = 0; j < live; ++j)
        for (int64_t i = 0; i < width; ++i) out[(first + j) * D + begin + i] = z[i][j];
    }
  }
}

}  // namespace dae::cpu::DAE_ISA
