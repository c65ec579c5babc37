// How a batch is cut among thread blocks, and where the values of one thread lie.
#pragma once

#include "../args.h"
#include "elements.cuh"

namespace dae::cuda {

constexpr int kThreads = 256;
constexpr int kMaxIterations = 16;      // groups that one thread handles, at most
constexpr int kMaxTile = kThreads * 4;  // groups of a unit of several rows, at most
constexpr int kMaxRows = 256;           // of one unit

// Thread blocks that a multiprocessor must hold: so a thread has at most so many registers, a multiple of 8.
// None is asked of AMD's, which have other registers: the numbers given here made hipcc spill.
#if defined(__HIP__)
constexpr int blocks_of(int) { return 1; }
#else
constexpr int blocks_of(int registers) { return 65536 / (kThreads * registers); }
#endif

// A row is cut into groups, the values a thread handles at a time: 16 bytes, and whole Philox blocks. A
// unit, the work of one thread block, is a stretch of one long row, or as many short rows as it holds.
struct Cut {
  int64_t B, D, groups_per_row;
  uint32_t units, segments_per_row;  // units along a long row
  int rows_per_unit, tile;           // groups of a unit within one row, at most
  uint32_t reciprocal;               // 2^20 / groups_per_row, rounded up: exact quotients of numbers below kMaxTile

  Cut() = default;
  Cut(int64_t B, int64_t D, int group, int iterations) : B(B), D(D), tile(kThreads * iterations) {
    groups_per_row = (D + group - 1) / group;
    segments_per_row = groups_per_row > tile ? static_cast<uint32_t>((groups_per_row + tile - 1) / tile) : 1;
    const int64_t most = tile < kMaxTile ? tile : kMaxTile, fit = groups_per_row ? most / groups_per_row : kMaxRows;
    rows_per_unit = static_cast<int>(fit < 1 ? 1 : (fit < kMaxRows ? fit : kMaxRows));
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

// A mask's bytes of a group, each 0 or 1, as they lie in memory.
template <int N>
struct Bytes {
  uint32_t word[N / 4];

  __device__ __forceinline__ bool operator[](int i) const { return (word[i / 4] & 0xffu << 8 * (i % 4)) != 0; }
  __device__ __forceinline__ void set(int i, uint8_t byte) { word[i / 4] |= static_cast<uint32_t>(byte) << 8 * (i % 4); }
  __device__ __forceinline__ int count() const {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) sum += word[i];
    return static_cast<int>(sum * 0x01010101u >> 24);
  }
};

// Contiguous operands whose rows are whole groups, 16-byte aligned: the unit is one stretch of memory.
template <int K>
struct Whole {
  void* data[K];

  template <class T>
  static constexpr int group = sizeof(T) == 8 ? 4 : 16 / sizeof(T);
  static constexpr bool kRagged = false;  // whether a row's last group may reach past its end

  __device__ bool has(int k) const { return data[k] != nullptr; }

  // A thread's way through a unit: its groups, one after the other.
  template <class T>
  class Cursor {
   public:
    static constexpr int N = group<T>;

    __device__ __forceinline__ Cursor(const Whole& whole, const Cut& cut, const Unit& unit)
        : g(static_cast<int>(threadIdx.x)), whole_(&whole) {
      const int64_t first = unit.row * cut.D + (unit.begin + g) * N;
#pragma unroll
      for (int k = 0; k < K; ++k) at_[k] = static_cast<T*>(whole.data[k]) + first;
    }
    __device__ __forceinline__ void step() {
      g += kThreads;
#pragma unroll
      for (int k = 0; k < K; ++k) at_[k] += kThreads * N;
    }
    // The first of the group's Philox blocks, in its row.
    __device__ __forceinline__ uint64_t block(const Place& at) const { return static_cast<uint64_t>(at.group) * (N / 4); }
    __device__ __forceinline__ void read(int k, Pack<T, N>& pack) const { pack = load_pack<T, N>(at_[k]); }
    __device__ __forceinline__ void write(int k, const Pack<T, N>& pack) const { store_pack(at_[k], pack); }
    __device__ __forceinline__ void read_mask(int k, Bytes<N>& kept) const {
      const uint8_t* from = static_cast<const uint8_t*>(whole_->data[k]) + (at_[0] - static_cast<T*>(whole_->data[0]));
      if constexpr (N == 16) {
        memcpy(kept.word, load_pack<uint8_t, N>(from).word, sizeof(kept));
      } else if constexpr (N == 8) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);  // a memcpy would load byte by byte
        kept.word[0] = two.x, kept.word[1] = two.y;
      } else {
        kept.word[0] = *reinterpret_cast<const uint32_t*>(from);
      }
    }

    int g;  // the group's number within the unit

   private:
    const Whole* whole_;
    T* at_[K];
  };
};

// Quotients of numbers below 2^31 by one known to the host, without a division.
struct Divisor {
  uint32_t by, multiplier, shift;

  Divisor() = default;
  explicit Divisor(uint32_t by) : by(by), multiplier(0), shift(0) {
    while (uint64_t{1} << shift < by) ++shift;  // 31 + shift bits make the quotient exact: Granlund and Montgomery 1994
    if (shift) multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + by - 1) / by);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return multiplier ? static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> 32) >> (shift - 1) : n;
  }
};

// Where the elements of an operand lie: distances from sample to sample, from element to element of a group, and along
// each dimension.
struct Way {
  int64_t batch, step, strides[kMaxDims];
};

// Any strides. The host lists the dimensions in the order in which neighbouring threads take them. Grouped:
// a group is four neighbours along the last dimension, `step` apart in memory (channels_last: threads go
// along the channels). Not grouped: dimensions in logical order, and each element is looked up by itself.
template <int K>
struct Strided {
  void* data[K];
  Way common, ways[K];
  bool alike[K];  // whether an operand lies as `common` says: most do, and are looked up together
  int64_t logical[kMaxDims];
  Divisor sizes[kMaxDims];
  int ndim;
  bool grouped;

  template <class T>
  static constexpr int group = 4;
  static constexpr bool kRagged = true;

  __device__ bool has(int k) const { return data[k] != nullptr; }

  // Calls found(d, i) with the index along each dimension. What the others leave of the last is not divided: so a row
  // of one dimension may have any length.
  template <class Found>
  __device__ __forceinline__ void locate(int64_t index, Found found) const {
    const int last = ndim - 1;
#pragma unroll 1
    for (int d = 0; d < last; ++d) {
      const uint32_t here = static_cast<uint32_t>(index), next = sizes[d].divide(here);
      found(d, static_cast<int64_t>(here - next * sizes[d].by));
      index = next;
    }
    found(last, index);
  }

  template <class T>
  class Cursor {
   public:
    static constexpr int N = group<T>;

    __device__ __forceinline__ Cursor(const Strided& strided, const Cut& cut, const Unit& unit)
        : g(static_cast<int>(threadIdx.x)), s_(&strided), cut_(&cut), unit_(&unit) {
      look();
    }
    __device__ __forceinline__ void step() {
      g += kThreads;
      look();
    }
    __device__ __forceinline__ uint64_t block(const Place&) const { return static_cast<uint64_t>(first_) / N; }
    __device__ void read(int k, Pack<T, N>& pack) const {
      T v[N];
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = T(0.0f);  // past the end of the row: adds nothing to a sum
      for_each<T>(k, [&](int i, const T* from) { v[i] = *from; });
      pack = Pack<T, N>(v);
    }
    __device__ void write(int k, const Pack<T, N>& pack) const {
      T v[N];
      pack.values(v);
      for_each<T>(k, [&](int i, T* to) { *to = v[i]; });
    }
    __device__ void read_mask(int k, Bytes<N>& kept) const {
      kept = {};
      for_each<uint8_t>(k, [&](int i, const uint8_t* from) { kept.set(i, *from); });
    }

    int g;

   private:
    __device__ __forceinline__ void look() {
      if (g >= unit_->groups) return;
      const Place at = place_of(*cut_, *unit_, g);
      at_ = (unit_->row + at.row) * s_->common.batch;
      first_ = s_->grouped ? 0 : N * at.group;
      if (s_->grouped)
        s_->locate(at.group, [&](int d, int64_t i) {
          first_ += i * s_->logical[d];
          at_ += i * s_->common.strides[d];
        });
    }
    __device__ __forceinline__ int64_t offset_of(const Way& way) const {
      const Place at = place_of(*cut_, *unit_, g);
      int64_t found = (unit_->row + at.row) * way.batch;
      if (s_->grouped) s_->locate(at.group, [&](int d, int64_t i) { found += i * way.strides[d]; });
      return found;
    }
    template <class Element, class Each>
    __device__ __forceinline__ void for_each(int k, Each each) const {
      Element* from = static_cast<Element*>(s_->data[k]) + (s_->alike[k] ? at_ : offset_of(s_->ways[k]));
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (s_->grouped) {
          each(i, from + i * s_->ways[k].step);
        } else if (first_ + i < cut_->D) {
          int64_t further = 0;
          s_->locate(first_ + i, [&](int d, int64_t index) { further += index * s_->ways[k].strides[d]; });
          each(i, from + further);
        }
      }
    }

    const Strided* s_;
    const Cut* cut_;
    const Unit* unit_;
    int64_t at_, first_;  // the first element's, as `common` says and in its row
  };
};

__device__ __forceinline__ Key row_key(const Noise& noise, int64_t row) {
  return noise.key_of(noise.key_at ? *noise.key_at : noise.key, row);
}

__device__ __forceinline__ Key to_key(const uint4& k) {
  return {k.x | static_cast<uint64_t>(k.y) << 32, k.z | static_cast<uint64_t>(k.w) << 32};
}

// The keys of a unit's rows. The last threads make them while the first ones fetch coefficients.
__device__ __forceinline__ void prepare_keys(const Noise& noise, const Unit& unit, uint4 (&keys)[kMaxRows]) {
#pragma unroll 1
  for (int r = kThreads - 1 - static_cast<int>(threadIdx.x); r < unit.rows; r += kThreads) {
    const Key key = row_key(noise, unit.row + r);
    keys[r] = make_uint4(static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32),
                         static_cast<uint32_t>(key.offset), static_cast<uint32_t>(key.offset >> 32));
  }
}

// Makes a value one that the compiler cannot work out again.
__device__ __forceinline__ void keep(uint32_t& value) {
#if defined(__AMDGCN__)
  asm volatile("" : "+v"(value));  // a thread's register, where "r" is one of the whole wave
#else
  asm volatile("" : "+r"(value));
#endif
}

// The Philox blocks of a thread's group.
struct Blocks {
  Key key;
  uint64_t first;

  __device__ __forceinline__ Block operator[](int i) const { return block_at(key, first + i); }
};

// The same along one row: the keys of the rounds are worked out once, and a counter goes from group to group.
struct BlocksOfRow {
  Rounds rounds;
  uint64_t counter;

  __device__ __forceinline__ explicit BlocksOfRow(const Blocks& start)
      : rounds(rounds_of(start.key.seed)), counter(start.key.offset + start.first) {
    // The compiler would otherwise add them up again for every block, rather than spend twenty registers.
#pragma unroll
    for (int i = 0; i < kPhiloxRounds; ++i) keep(rounds.k0[i]), keep(rounds.k1[i]);
  }
  __device__ __forceinline__ Block operator[](int i) const { return block_of(rounds, counter + i); }
};

// What a thread knows of its group.
template <class B>
struct Group {
  Place at;
  B blocks;  // of noise
};

// The groups of a unit within one row, each to be asked for once, in turn.
template <class Cursor>
class GroupsOfRow {
 public:
  static constexpr bool kOneRow = true;

  __device__ __forceinline__ GroupsOfRow(const Unit& unit, const Cursor& start, const Key& key)
      : begin_(unit.begin), blocks_(Blocks{key, start.block({0, unit.begin + start.g}) - kStep}) {}
  __device__ __forceinline__ Group<const BlocksOfRow&> operator()(const Cursor& cursor) {
    blocks_.counter += kStep;
    return {{0, begin_ + cursor.g}, blocks_};
  }

 private:
  static constexpr uint64_t kStep = kThreads * (Cursor::N / 4);
  int64_t begin_;
  BlocksOfRow blocks_;
};

// The groups of any unit.
template <class Cursor, int K>
struct Groups {
  static constexpr bool kOneRow = false;
  const Cut& cut;
  const Unit& unit;
  const uint4 (&keys)[K];
  bool fresh;

  __device__ __forceinline__ Group<Blocks> operator()(const Cursor& cursor) const {
    const Place at = place_of(cut, unit, cursor.g);
    return {at, {fresh ? to_key(keys[at.row]) : Key{}, cursor.block(at)}};
  }
};

// Calls walk(groups). A unit within one row has a loop of its own, which keeps what belongs to the row in registers.
template <bool kOwnLoop, class Cursor, int K, class Walk>
__device__ __forceinline__ void walk_unit(const Cut& cut, const Unit& unit, const Cursor& start,
                                          const uint4 (&keys)[K], bool fresh, Walk walk) {
  if constexpr (kOwnLoop)
    if (unit.rows == 1) return walk(GroupsOfRow<Cursor>(unit, start, fresh ? to_key(keys[0]) : Key{}));
  walk(Groups<Cursor, K>{cut, unit, keys, fresh});
}

// C numbers of each row of a unit, from shared memory.
template <bool kOneRow, class E, int C>
class OfRow {
 public:
  __device__ __forceinline__ explicit OfRow(const E (&rows)[kMaxRows][C]) : rows_(rows) {
    if constexpr (kOneRow) {
#pragma unroll
      for (int i = 0; i < C; ++i) own_[i] = rows[0][i];
    }
  }
  __device__ __forceinline__ const E* operator[](int row) const { return kOneRow ? own_ : rows_[row]; }

 private:
  const E (&rows_)[kMaxRows][C];
  E own_[C];
};

template <int N, class B>
__device__ __forceinline__ void words(const B& blocks, uint32_t (&w)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) memcpy(w + i, blocks[i / 4].r, 4 * sizeof(uint32_t));
}

// Which elements of a group a drawn mask counts.
template <int N, class B>
__device__ __forceinline__ void draw(const Choice& choice, int64_t row, const B& blocks, bool (&counts)[N]) {
  const int64_t second = choice.threshold(row, 1);
  uint32_t w[N];
  words(blocks, w);
#pragma unroll
  for (int i = 0; i < N; ++i) counts[i] = choice.counts(w[i], second);
}

// The constants, kept in registers where zero is 0 but comes with the launch, so that the compiler cannot know them.
__device__ __forceinline__ Pinned pin(uint32_t zero) {
  const auto kept = [zero](float value) {
    uint32_t bits = bits_as<uint32_t>(value) + zero;
    keep(bits);
    return bits_as<float>(bits);
  };
  const Pinned known;
  return {kept(known.scale), kept(known.log), kept(known.sine), kept(known.cosine)};
}

template <int N, class R, class B>
__device__ __forceinline__ void normals(const B& blocks, R (&z)[N], const Pinned& pinned) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const Block b = blocks[i / 4];
    float master[4];
    normal_pair(b.r[0], b.r[1], master[0], master[1], pinned);
    normal_pair(b.r[2], b.r[3], master[2], master[3], pinned);
#pragma unroll
    for (int j = 0; j < 4; ++j) z[i + j] = master[j];
  }
}

}  // namespace dae::cuda
