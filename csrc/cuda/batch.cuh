// How a batch is cut among thread blocks, and where the values of one thread lie.
#pragma once

#include "../args.h"
#include "elements.cuh"

namespace dae::cuda {

constexpr int kThreads = 256;
constexpr int kMaxIterations = 4;  // groups that one thread handles, at most
constexpr int kMaxTile = kThreads * kMaxIterations;
constexpr int kMaxRows = 256;  // of one unit

// Thread blocks that a multiprocessor must hold: as many as leave the registers that a thread needs, 64 or 80.
template <class T, class Access>
constexpr int kBlocks = sizeof(T) == 8 || Access::kRagged ? 3 : 4;

// A row is cut into groups, the values a thread handles at a time: 16 bytes, and whole Philox blocks. A
// unit, the work of one thread block, is a stretch of one long row, or as many short rows as it holds.
struct Cut {
  int64_t B, D, groups_per_row;
  uint32_t units, segments_per_row;  // units along a long row
  int rows_per_unit, tile;           // groups of a unit, at most
  uint32_t reciprocal;               // 2^20 / groups_per_row, rounded up: exact quotients of numbers below kMaxTile

  Cut(int64_t B, int64_t D, int group, int iterations) : B(B), D(D), tile(kThreads * iterations) {
    groups_per_row = (D + group - 1) / group;
    segments_per_row = groups_per_row > tile ? static_cast<uint32_t>((groups_per_row + tile - 1) / tile) : 1;
    const int64_t fit = groups_per_row ? tile / groups_per_row : kMaxRows;
    rows_per_unit = segments_per_row > 1 ? 1 : static_cast<int>(fit < kMaxRows ? fit : kMaxRows);
    const int64_t count = segments_per_row * ((B + rows_per_unit - 1) / rows_per_unit);
    units = static_cast<uint32_t>(count ? count : 1);  // an empty batch has sums too
    reciprocal = groups_per_row ? static_cast<uint32_t>(((1 << 20) + groups_per_row - 1) / groups_per_row) : 0;
  }
};

struct Unit {
  int64_t row, begin;  // first row; first group within the row, of a long one
  int rows, groups;    // of all rows together
};

__device__ __forceinline__ Unit unit_at(const Cut& cut, uint32_t u) {
  if (cut.segments_per_row > 1) {
    const int64_t begin = static_cast<int64_t>(u % cut.segments_per_row) * cut.tile, left = cut.groups_per_row - begin;
    return {u / cut.segments_per_row, begin, 1, static_cast<int>(left < cut.tile ? left : cut.tile)};
  }
  const int64_t row = static_cast<int64_t>(u) * cut.rows_per_unit, left = cut.B - row;
  const int rows = static_cast<int>(left < cut.rows_per_unit ? left : cut.rows_per_unit);
  return {row, 0, rows, rows * static_cast<int>(cut.groups_per_row)};
}

// The thread's group: a row of the unit and the group's number within it.
struct Place {
  int row;
  int64_t group;
};

__device__ __forceinline__ Place place_of(const Cut& cut, const Unit& unit, int g) {
  if (unit.rows == 1) return {0, unit.begin + g};
  const int row = static_cast<int>(static_cast<uint32_t>(g) * cut.reciprocal >> 20);
  return {row, g - row * static_cast<int>(cut.groups_per_row)};
}

// Contiguous operands whose rows are whole groups, 16-byte aligned: the unit is one stretch of memory.
template <int K>
struct Whole {
  void* data[K];

  template <class T>
  static constexpr int group = sizeof(T) == 8 ? 4 : 16 / sizeof(T);
  static constexpr bool kRagged = false;  // whether a row's last group may reach past its end

  __device__ bool has(int k) const { return data[k] != nullptr; }

  // The operands of one unit.
  template <class T>
  class InUnit {
   public:
    static constexpr int N = group<T>;

    __device__ __forceinline__ InUnit(const Whole& whole, const Cut& cut, const Unit& unit) : whole_(whole) {
      first_ = unit.row * cut.D + unit.begin * N;
#pragma unroll
      for (int k = 0; k < K; ++k) at_[k] = static_cast<T*>(whole.data[k]) + first_;
    }
    // Of the group's first element, in its row.
    __device__ __forceinline__ int64_t element(const Place& at) const { return at.group * N; }
    __device__ __forceinline__ void read(int k, int g, Pack<T, N>& pack) const { pack = load_pack<T, N>(at_[k] + g * N); }
    __device__ __forceinline__ void write(int k, int g, const Pack<T, N>& pack) const { store_pack(at_[k] + g * N, pack); }
    // A mask's N bytes, each 0 or 1.
    __device__ __forceinline__ void read_mask(int k, int g, bool (&kept)[N]) const {
      const uint8_t* from = static_cast<const uint8_t*>(whole_.data[k]) + first_ + g * N;
      uint32_t words[N / 4];
      if constexpr (N == 8) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        words[0] = two.x, words[1] = two.y;
      } else {
        words[0] = *reinterpret_cast<const uint32_t*>(from);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) kept[i] = (words[i / 4] >> 8 * (i % 4) & 0xffu) != 0;
    }

   private:
    const Whole& whole_;
    int64_t first_;
    T* at_[K];
  };
};

// Any strides. The host lists the dimensions in the order in which neighbouring threads take them. Grouped:
// a group is four neighbours along the last dimension, `step` apart in memory (channels_last: threads go
// along the channels). Not grouped: dimensions in logical order, and each element is looked up by itself.
template <int K>
struct Strided {
  void* data[K];
  int64_t batch_stride[K], strides[K][kMaxDims], step[K];
  int64_t logical[kMaxDims];
  uint32_t sizes[kMaxDims];
  int ndim;
  bool grouped;

  template <class T>
  static constexpr int group = 4;
  static constexpr bool kRagged = true;

  __device__ bool has(int k) const { return data[k] != nullptr; }

  // 32 bits, because a division of 64 costs some hundred instructions.
  __device__ int64_t locate(uint32_t index, const int64_t (&stride)[kMaxDims]) const {
    int64_t at = 0;
#pragma unroll 1
    for (int d = 0; d < ndim; ++d) {
      const uint32_t next = index / sizes[d];
      at += (index - next * sizes[d]) * stride[d];
      index = next;
    }
    return at;
  }

  template <class T>
  class InUnit {
   public:
    static constexpr int N = group<T>;

    __device__ InUnit(const Strided& strided, const Cut& cut, const Unit& unit) : s_(strided), cut_(cut), unit_(unit) {}
    __device__ int64_t element(const Place& at) const {
      return s_.grouped ? s_.locate(static_cast<uint32_t>(at.group), s_.logical) : at.group * N;
    }
    __device__ void read(int k, int g, Pack<T, N>& pack) const {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.v[i] = T(0.0f);  // past the end of the row: adds nothing to a sum
      for_each<T>(k, g, [&](int i, const T* from) { pack.v[i] = *from; });
    }
    __device__ void write(int k, int g, const Pack<T, N>& pack) const {
      for_each<T>(k, g, [&](int i, T* to) { *to = pack.v[i]; });
    }
    __device__ void read_mask(int k, int g, bool (&kept)[N]) const {
#pragma unroll
      for (int i = 0; i < N; ++i) kept[i] = false;
      for_each<uint8_t>(k, g, [&](int i, const uint8_t* from) { kept[i] = *from != 0; });
    }

   private:
    template <class Element, class Each>
    __device__ __forceinline__ void for_each(int k, int g, Each each) const {
      const Place at = place_of(cut_, unit_, g);
      Element* row = static_cast<Element*>(s_.data[k]) + (unit_.row + at.row) * s_.batch_stride[k];
      const uint32_t group = static_cast<uint32_t>(at.group);
      const int64_t first = s_.grouped ? s_.locate(group, s_.strides[k]) : 0;
#pragma unroll
      for (uint32_t i = 0; i < N; ++i) {
        if (s_.grouped)
          each(i, row + first + i * s_.step[k]);
        else if (N * group + i < cut_.D)
          each(i, row + s_.locate(N * group + i, s_.strides[k]));
      }
    }

    const Strided& s_;
    const Cut& cut_;
    const Unit& unit_;
  };
};

__device__ __forceinline__ Key row_key(const Noise& noise, int64_t row) {
  const Key key = noise.key_at ? *noise.key_at : noise.key;
  if (!noise.fold) return key;
  return fold_in(key, noise.sample ? static_cast<uint64_t>(noise.sample[row])
                                   : noise.first_sample + static_cast<uint64_t>(row));
}

__device__ __forceinline__ Key to_key(const uint4& k) {
  return {k.x | static_cast<uint64_t>(k.y) << 32, k.z | static_cast<uint64_t>(k.w) << 32};
}

// The keys of a unit's rows. The last threads make them while the first ones fetch coefficients.
__device__ __forceinline__ void prepare_keys(const Noise& noise, const Unit& unit, uint4 (&keys)[kMaxRows]) {
  for (int r = kThreads - 1 - static_cast<int>(threadIdx.x); r < unit.rows; r += kThreads) {
    const Key key = row_key(noise, unit.row + r);
    keys[r] = make_uint4(static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32),
                         static_cast<uint32_t>(key.offset), static_cast<uint32_t>(key.offset >> 32));
  }
}

// The words of elements element .. element + N of a row; element is a multiple of 4.
template <int N>
__device__ __forceinline__ void words(Key key, int64_t element, uint32_t (&w)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i % 4 == 0) memcpy(w + i, block_at(key, static_cast<uint64_t>(element + i) >> 2).r, 4 * sizeof(uint32_t));
  }
}

// Which of them a drawn mask counts.
template <int N>
__device__ __forceinline__ void draw(const Choice& choice, int64_t row, Key key, int64_t element, bool (&counts)[N]) {
  const int64_t second = choice.of_row(row)[1];
  uint32_t w[N];
  words(key, element, w);
#pragma unroll
  for (int i = 0; i < N; ++i) counts[i] = choice.counts(w[i], second);
}

// The normals of elements element .. element + N of a row; element is a multiple of 4.
template <int N>
__device__ __forceinline__ void normals(Key key, int64_t element, float (&z)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const Block b = block_at(key, static_cast<uint64_t>(element + i) >> 2);
    normal_pair(b.r[0], b.r[1], z[i], z[i + 1]);
    normal_pair(b.r[2], b.r[3], z[i + 2], z[i + 3]);
  }
}

}  // namespace dae::cuda
