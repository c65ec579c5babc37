// Noise of one unit of work, written to a contiguous block of floats.
#pragma once

#include "units.h"
#include "philox.h"

namespace dae::cpu::DAE_ISA {

constexpr int kLanes = 16;  // blocks at a time for a short row, and for the end of a long one
constexpr int kValues = 4 * kLanes;

// Written over the whole array in one loop each, so that the stores are vectors: a vector load of
// sixteen scalar stores stalls.
template <int N>
static DAE_FN void fill_key(Lanes<N>& key0, Lanes<N>& key1, uint64_t seed) {
  for (int j = 0; j < N; ++j) key0.v[j] = static_cast<uint32_t>(seed);
  for (int j = 0; j < N; ++j) key1.v[j] = static_cast<uint32_t>(seed >> 32);
}

// Lane j: counter first + j.
template <int N>
static DAE_FN void fill_counters(Lanes<N> (&r)[4], uint64_t first) {
  for (int j = 0; j < N; ++j) r[0].v[j] = static_cast<uint32_t>(first + static_cast<uint64_t>(j));
  for (int j = 0; j < N; ++j) r[1].v[j] = static_cast<uint32_t>((first + static_cast<uint64_t>(j)) >> 32);
}

// What a block of words becomes: z[i][lane] is element i of that lane's block.
struct ToNormal {
  using type = float;
  template <int N>
  static DAE_FN void apply(const Lanes<N> (&r)[4], float (&z)[4][N]) {
    for (int j = 0; j < N; ++j) normal_pair(r[0].v[j], r[1].v[j], z[0][j], z[1][j]);
    for (int j = 0; j < N; ++j) normal_pair(r[2].v[j], r[3].v[j], z[2][j], z[3][j]);
  }
};

template <class Word>
struct ToWord {
  using type = Word;
  template <int N>
  static DAE_FN void apply(const Lanes<N> (&r)[4], Word (&z)[4][N]) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < N; ++j) z[i][j] = r[i].v[j];
  }
};

// N blocks of one key from block `first`: 4N values.
template <class To, int N>
static DAE_FN void fill_blocks(const Lanes<N>& key0, const Lanes<N>& key1, uint64_t first, typename To::type* out) {
  alignas(64) Lanes<N> r[4];
  alignas(64) typename To::type z[4][N];
  fill_counters(r, first);
  philox(key0, key1, r);
  To::apply(r, z);
  for (int j = 0; j < N; ++j)
    for (int i = 0; i < 4; ++i) out[4 * j + i] = z[i][j];
}

// Elements [begin, begin + n) of one row; begin is a multiple of 4.
template <class To>
static inline void fill_row(const Noise& noise, int64_t row, int64_t begin, int64_t n, typename To::type* out) {
  const Key key = noise.key_of(noise.key, row);
  uint64_t block = key.offset + static_cast<uint64_t>(begin / 4);
  int64_t done = 0;
  alignas(64) Lanes<2 * kLanes> key0, key1;
  fill_key(key0, key1, key.seed);
  for (; n - done >= 2 * kValues; done += 2 * kValues, block += 2 * kLanes)
    fill_blocks<To>(key0, key1, block, out + done);
  alignas(64) Lanes<kLanes> half0, half1;
  fill_key(half0, half1, key.seed);
  for (; done < n; done += kValues, block += kLanes) {
    if (n - done >= kValues) {
      fill_blocks<To>(half0, half1, block, out + done);
    } else {
      alignas(64) typename To::type last[kValues];
      fill_blocks<To>(half0, half1, block, last);
      for (int64_t e = 0; e < n - done; ++e) out[done + e] = last[e];
    }
  }
}

// `rows` whole rows of D elements, a row to a lane: short rows would leave most lanes of fill_row idle.
template <class To>
static inline void fill_short_rows(const Noise& noise, int64_t row, int64_t rows, int64_t D,
                                   typename To::type* out) {
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t live = rows - first < kLanes ? rows - first : kLanes;
    alignas(64) Lanes<kLanes> key0, key1, low, high, r[4];
    uint64_t counter[kLanes];
    for (int64_t j = 0; j < kLanes; ++j)
      counter[j] = noise.fold && j < live ? noise.key.offset + noise.sample_of(row + first + j) : 0;
    if (noise.fold) {
      fill_key(key0, key1, noise.key.seed);
      for (int j = 0; j < kLanes; ++j) {
        r[0].v[j] = static_cast<uint32_t>(counter[j]);
        r[1].v[j] = static_cast<uint32_t>(counter[j] >> 32);
      }
      philox(key0, key1, r);
      key0 = r[0], key1 = r[1], low = r[2], high = r[3];
      if (noise.rows_per_sample != 1 || noise.first_block) {
        for (int64_t j = 0; j < live; ++j) {
          const uint64_t offset = (low.v[j] | static_cast<uint64_t>(high.v[j]) << 32) + noise.block_of(row + first + j);
          low.v[j] = static_cast<uint32_t>(offset), high.v[j] = static_cast<uint32_t>(offset >> 32);
        }
      }
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
      philox(key0, key1, r);
      To::apply(r, z);
      const int64_t width = D - begin < 4 ? D - begin : 4;
      for (int64_t j = 0; j < live; ++j)
        for (int64_t i = 0; i < width; ++i) out[(first + j) * D + begin + i] = z[i][j];
    }
  }
}

}  // namespace dae::cpu::DAE_ISA
