// Noise of one unit of work, written to a contiguous block of floats.
#pragma once

#include "units.h"
#include "philox.h"

namespace dae::cpu::DAE_ISA {

constexpr int kLanes = 16;  // blocks at a time for a short row, and for the end of a long one
constexpr int kValues = 4 * kLanes;

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
static DAE_FN void fill_blocks(const OneKey& key, uint64_t first, typename To::type* out) {
  alignas(64) Lanes<N> r[4];
  alignas(64) typename To::type z[4][N];
  philox(Consecutive{first}, key, r);
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
  const OneKey rounds(key.seed);
  for (; n - done >= 2 * kValues; done += 2 * kValues, block += 2 * kLanes)
    fill_blocks<To, 2 * kLanes>(rounds, block, out + done);
  for (; done < n; done += kValues, block += kLanes) {
    if (n - done >= kValues) {
      fill_blocks<To, kLanes>(rounds, block, out + done);
    } else {
      alignas(64) typename To::type last[kValues];
      fill_blocks<To, kLanes>(rounds, block, last);
      for (int64_t e = 0; e < n - done; ++e) out[done + e] = last[e];
    }
  }
}

// `rows` whole rows of D elements, a row to a lane: short rows would leave most lanes of fill_row idle.
template <class To>
static inline void fill_short_rows(const Noise& noise, int64_t row, int64_t rows, int64_t D,
                                   typename To::type* out) {
  const OneKey key(noise.key.seed);
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t live = rows - first < kLanes ? rows - first : kLanes;
    alignas(64) Lanes<kLanes> r[4];
    Wide<kLanes> counters;
    LaneKeys<kLanes> keys;
    if (noise.fold) {
      if (noise.sample || noise.rows_per_sample != 1) {
        for (int j = 0; j < kLanes; ++j)
          counters[j] = j < live ? noise.key.offset + noise.sample_of(row + first + j) : 0;
        philox(Apart<kLanes>{counters, 0}, key, r);
      } else {
        philox(Consecutive{noise.key.offset + noise.sample_of(row + first)}, key, r);
      }
      keys.k[0].spread(r[0]), keys.k[1].spread(r[1]);
      counters.join(r[2], r[3]);
      if (noise.rows_per_sample != 1 || noise.first_block)
        for (int j = 0; j < live; ++j) counters[j] += noise.block_of(row + first + j);
    } else {
      for (int j = 0; j < kLanes; ++j)
        counters[j] = noise.key.offset, keys.k[0][j] = key.k[0][0], keys.k[1][j] = key.k[1][0];
    }
    for (int64_t begin = 0; begin < D; begin += 4) {
      alignas(64) typename To::type z[4][kLanes];
      philox(Apart<kLanes>{counters, static_cast<uint64_t>(begin / 4)}, keys, r);
      To::apply(r, z);
      const int64_t width = D - begin < 4 ? D - begin : 4;
      for (int64_t j = 0; j < live; ++j)
        for (int64_t i = 0; i < width; ++i) out[(first + j) * D + begin + i] = z[i][j];
    }
  }
}

}  // namespace dae::cpu::DAE_ISA
