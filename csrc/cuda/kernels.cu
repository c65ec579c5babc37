// The CUDA kernels of one element type, DAE_ELEMENT, in a namespace DAE_NAME of their own; compiled once for
// each, with -fmad=false: fused where math.h says so and nowhere else.

#include <utility>

#include "../ops.h"
#include "kernels.h"
#include "reduce.cuh"

#define DAE_JOIN_(a, b) a##b
#define DAE_JOIN(a, b) DAE_JOIN_(a, b)

namespace dae::cuda {

namespace DAE_NAME {

using T = DAE_ELEMENT;
using R = ComputeType<T>::type;

// What all kernels know of their rows.
struct Rows {
  Cut cut;
  Noise noise;
  Table table;
};

__device__ __forceinline__ Key to_key(const uint4& k) {
  return {k.x | static_cast<uint64_t>(k.y) << 32, k.z | static_cast<uint64_t>(k.w) << 32};
}

// The last threads make the keys while the first ones fetch coefficients.
__device__ __forceinline__ void prepare_keys(const Rows& p, const Unit& unit, uint4 (&keys)[kMaxRows]) {
  for (int r = kThreads - 1 - static_cast<int>(threadIdx.x); r < unit.rows; r += kThreads) {
    const Key key = row_key(p.noise, unit.row + r);
    keys[r] = make_uint4(static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32),
                         static_cast<uint32_t>(key.offset), static_cast<uint32_t>(key.offset >> 32));
  }
}

template <int C>
__device__ __forceinline__ void prepare_coefficients(const Rows& p, const Unit& unit, const int (&columns)[C],
                                                     R (&c)[kMaxRows][C]) {
  for (int i = threadIdx.x; i < unit.rows * C; i += kThreads)
    c[i / C][i % C] = coefficient<R>(p.table, unit.row + i / C, columns[i % C]);
}

template <int N, class Memory>
__device__ __forceinline__ void make_normals(const Memory& memory, const Key& key, const Place& at, R (&z)[N]) {
  float master[N];
  normals(key, memory.element(at), master);
#pragma unroll
  for (int i = 0; i < N; ++i) z[i] = master[i];
}

// What a thread knows of its group.
template <int C>
struct InRow {
  Place at;
  const R* c;  // the row's coefficients
  Key key;
};

// Calls walk(place), place(g) being the InRow of group g. A unit within one row has a loop of its own, which
// keeps key and coefficients in registers.
template <bool kOwnLoop, int C, int K, class Walk>
__device__ __forceinline__ void walk_rows(const Cut& cut, const Unit& unit, const R (&coefficients)[kMaxRows][C],
                                          const uint4 (&keys)[K], Walk walk) {
  constexpr bool kFresh = K == kMaxRows;
  if constexpr (kOwnLoop) {
    if (unit.rows == 1) {
      R c[C];
#pragma unroll
      for (int i = 0; i < C; ++i) c[i] = coefficients[0][i];
      const Key key = kFresh ? to_key(keys[0]) : Key{};
      return walk([&](int g) { return InRow<C>{{0, unit.begin + g}, c, key}; });
    }
  }
  walk([&](int g) {
    const Place at = place_of(cut, unit, g);
    return InRow<C>{at, coefficients[at.row], kFresh ? to_key(keys[at.row]) : Key{}};
  });
}

enum { kX, kY, kZ, kOut, kOut2 };

struct AffineParams : Rows {
  int columns[8];  // c0 c1 c2 of out, of out2, then a0, a1
  bool clamped;
  R lo, hi;
};

// One output of a group. Where operands have other uses too, one whose column is absent counts as 0 here,
// whatever it holds.
template <bool kSeveralUses, int N>
__device__ __forceinline__ Pack<T, N> map_group(const int* columns, const R* c, const R (&x)[N], const R (&y)[N],
                                                const R (&z)[N]) {
  const auto used = [&](int k, R v) { return kSeveralUses && columns[k] == kAbsent ? R(0) : v; };
  const Affine<R> f = {c[0], c[1], c[2]};
  R v[N];
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = f(used(0, x[i]), used(1, y[i]), used(2, z[i]));
  Pack<T, N> out;
  narrow(v, out);
  return out;
}

// kInputs: how many of x, y, z are read, x first, with one output and no clamp; kAnyInputs: everything else.
constexpr int kAnyInputs = -1;

template <bool kFresh, int kInputs, class Access>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, Access>))
    affine_kernel(const __grid_constant__ AffineParams p, const __grid_constant__ Access access) {
  using Memory = typename Access::template InUnit<T>;
  constexpr int N = Memory::N;
  constexpr bool kGeneral = kInputs == kAnyInputs;
  __shared__ R coefficients[kMaxRows][8];
  __shared__ uint4 keys[kFresh ? kMaxRows : 1];
  const Unit unit = unit_at(p.cut, blockIdx.x);
  const Memory memory(access, p.cut, unit);
  const auto reads = [&](int k) { return kGeneral ? access.has(k) : k < kInputs; };
  Pack<T, N> xs = {}, ys = {}, zs = {};
  const auto fetch = [&](int g) {
    if (reads(kX)) memory.read(kX, g, xs);
    if (reads(kY)) memory.read(kY, g, ys);
    if (!kFresh && reads(kZ)) memory.read(kZ, g, zs);
  };
  if (threadIdx.x < unit.groups) fetch(threadIdx.x);  // under way while the rows are prepared
  prepare_coefficients(p, unit, p.columns, coefficients);
  if constexpr (kFresh) prepare_keys(p, unit, keys);
  __syncthreads();

  const auto walk = [&](auto place) {
#pragma unroll 1
    for (int g = threadIdx.x, next; g < unit.groups; g = next) {
      R x[N], y[N], z[N];
      widen(xs, x), widen(ys, y);
      if constexpr (!kFresh) widen(zs, z);
      next = g + kThreads;
      if (next < unit.groups) fetch(next);
      const auto [at, c, key] = place(g);
      if constexpr (kFresh) make_normals(memory, key, at, z);
      if (kGeneral && p.clamped) {
        const Affine<R> f = {c[6], c[7], R(0)};
        const Clamp<R> clamp = {p.lo, p.hi};
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = clamp(f(p.columns[6] == kAbsent ? R(0) : x[i], y[i], R(0)));
      }
      memory.write(kOut, g, map_group<kGeneral>(p.columns, c, x, y, z));
      if (kGeneral && access.has(kOut2)) memory.write(kOut2, g, map_group<true>(p.columns + 3, c + 3, x, y, z));
    }
  };
  walk_rows<!kGeneral>(p.cut, unit, coefficients, keys, walk);
}

enum { kPred, kTargetY, kTargetZ, kMask, kGrad };

struct ResidualParams : Rows {
  int columns[2];
  LossArgs loss;
  Scratch scratch;
};

// The last thread block: means of the samples, and the loss.
__device__ __forceinline__ void finish_loss(const ResidualParams& p) {
  double total = 0;
  sum_rows(
      p.cut.B, p.cut.segments_per_row, [&](int64_t i) { return read_sum(p.scratch.sums, i); },
      [&](int64_t row, double sum) {
        const double mean = row_mean(sum, p.loss.kept_of(row, p.cut.D));
        if (p.loss.per_sample) static_cast<R*>(p.loss.per_sample)[row] = static_cast<R>(mean);
        total += loss_term(p.loss.weight_of(row), sum, mean, p.loss.reduction);
      });
  total = block_sum(total);
  if (p.loss.loss && threadIdx.x == 0)
    *static_cast<R*>(p.loss.loss) =
        static_cast<R>(p.loss.reduction == Reduction::mean ? total / static_cast<double>(p.cut.B) : total);
}

// kInputs: how many of pred, y, z are read, in that order; kAnyInputs: asked for each.
template <bool kFresh, int kInputs, class Access>
__global__ void __launch_bounds__(kThreads, 3)
    residual_kernel(const __grid_constant__ ResidualParams p, const __grid_constant__ Access access) {
  using Memory = typename Access::template InUnit<T>;
  constexpr int N = Memory::N;
  __shared__ R coefficients[kMaxRows][2], scales[kMaxRows], groups[1][kMaxTile];
  __shared__ uint4 keys[kFresh ? kMaxRows : 1];
  if (p.loss.only_if_scaled && p.loss.upstream_as<R>() == 1) return;
  const Unit unit = unit_at(p.cut, blockIdx.x);
  const Memory memory(access, p.cut, unit);
  const auto reads = [&](int k) { return kInputs == kAnyInputs ? access.has(k) : k < kInputs; };
  Pack<T, N> preds = {}, ys = {}, zs = {};
  const auto fetch = [&](int g) {
    memory.read(kPred, g, preds);
    if (reads(kTargetY)) memory.read(kTargetY, g, ys);
    if (!kFresh && reads(kTargetZ)) memory.read(kTargetZ, g, zs);
  };
  if (threadIdx.x < unit.groups) fetch(threadIdx.x);
  prepare_coefficients(p, unit, p.columns, coefficients);
  if (access.has(kGrad))
    for (int r = threadIdx.x; r < unit.rows; r += kThreads)
      scales[r] = static_cast<R>(gradient_scale(p.loss.weight_of(unit.row + r), p.loss.upstream_as<R>(),
                                                p.loss.kept_of(unit.row + r, p.cut.D), p.loss.reduction, p.cut.B));
  if constexpr (kFresh) prepare_keys(p, unit, keys);
  __syncthreads();
  RowSums<R, 1> sums;
  const auto walk = [&](auto place) {
#pragma unroll 1
    for (int g = threadIdx.x, next; g < unit.groups; g = next) {
      R pred[N], y[N], z[N];
      widen(preds, pred), widen(ys, y);
      if constexpr (!kFresh) widen(zs, z);
      next = g + kThreads;
      if (next < unit.groups) fetch(next);
      const auto [at, c, key] = place(g);
      if constexpr (kFresh) make_normals(memory, key, at, z);
      const Affine<R> f = {R(1), c[0], c[1]};
      R r[N], squares[1] = {R(0)};
#pragma unroll
      for (int i = 0; i < N; ++i) r[i] = f(pred[i], y[i], z[i]);
      // Selects, not products: what is masked out may be NaN, and past the row's end there is noise.
      if (access.has(kMask)) {
        bool kept[N];
        memory.read_mask(kMask, g, kept);
#pragma unroll
        for (int i = 0; i < N; ++i) r[i] = kept[i] ? r[i] : R(0);
      }
      if constexpr (Access::kRagged) {
#pragma unroll
        for (int i = 0; i < N; ++i) r[i] = N * at.group + i < p.cut.D ? r[i] : R(0);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) squares[0] = mul_add(r[i], r[i], squares[0]);
      sums.add(unit, g, squares, groups);
      if (access.has(kGrad)) {
        const R scale = scales[at.row];
        R gradient[N];
#pragma unroll
        for (int i = 0; i < N; ++i) gradient[i] = scale * r[i];
        Pack<T, N> grad;
        narrow(gradient, grad);
        memory.write(kGrad, g, grad);
      }
    }
  };
  walk_rows<!Access::kRagged>(p.cut, unit, coefficients, keys, walk);
  if (!p.loss.per_sample && !p.loss.loss) return;
  sums.store(p.cut, unit, groups, p.scratch.sums);
  if (is_last_block(p.scratch.counter)) finish_loss(p);
}

enum { kG, kDotX, kDotY, kDotZ };

struct RowDotsParams : Rows {
  double* out;  // (B, 3)
  Scratch scratch;
};

template <bool kFresh, class Access>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, Access>))
    row_dots_kernel(const __grid_constant__ RowDotsParams p, const __grid_constant__ Access access) {
  using Memory = typename Access::template InUnit<T>;
  constexpr int N = Memory::N;
  __shared__ R groups[3][kMaxTile];
  __shared__ uint4 keys[kFresh ? kMaxRows : 1];
  const Unit unit = unit_at(p.cut, blockIdx.x);
  const Memory memory(access, p.cut, unit);
  if constexpr (kFresh) prepare_keys(p, unit, keys);
  __syncthreads();
  RowSums<R, 3> sums;
  for (int g = threadIdx.x; g < unit.groups; g += kThreads) {
    Pack<T, N> gs, xs = {}, ys = {}, zs = {};
    memory.read(kG, g, gs);
    if (access.has(kDotX)) memory.read(kDotX, g, xs);
    if (access.has(kDotY)) memory.read(kDotY, g, ys);
    if (!kFresh && access.has(kDotZ)) memory.read(kDotZ, g, zs);
    R v[N], other[3][N], dots[3] = {R(0), R(0), R(0)};
    widen(gs, v), widen(xs, other[0]), widen(ys, other[1]);
    if constexpr (kFresh)
    {
      const Place at = place_of(p.cut, unit, g);
      make_normals(memory, to_key(keys[at.row]), at, other[2]);
    } else
      widen(zs, other[2]);
#pragma unroll
    for (int k = 0; k < 3; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) dots[k] = mul_add(v[i], other[k][i], dots[k]);
    sums.add(unit, g, dots, groups);
  }
  sums.store(p.cut, unit, groups, p.scratch.sums);
  if (!is_last_block(p.scratch.counter)) return;
  for (int k = 0; k < 3; ++k)
    sum_rows(
        p.cut.B, p.cut.segments_per_row,
        [&](int64_t i) { return read_sum(p.scratch.sums, k * p.cut.B * p.cut.segments_per_row + i); },
        [&](int64_t row, double sum) { p.out[3 * row + k] = sum; });
}

template <bool kFresh>
const char* launch_affine(const AffineArgs& a, const Launch& how) {
  Operand operands[] = {a.x, a.y, a.z, a.out, a.out2};
  for (int k = 0; k < 3; ++k)  // not read where no coefficient wants it
    if (!a.clamped && a.columns[k] == kAbsent && a.columns[4 + k] == kAbsent) operands[k] = {};
  return how.with_access<T>(a.batch, operands, [&](const auto& access, const Cut& cut) {
    AffineParams p{{cut, a.noise, a.table}, {}, a.clamped, static_cast<R>(a.lo), static_cast<R>(a.hi)};
    for (int i = 0; i < 3; ++i) p.columns[i] = a.columns[i], p.columns[3 + i] = a.columns[4 + i];
    for (int i = 0; i < 2; ++i) p.columns[6 + i] = a.clamped ? a.inner[i] : kAbsent;
    using Access = std::decay_t<decltype(access)>;
    const auto with = [&](auto kernel) { return launch(how.stream, cut.units, kThreads, kernel, p, access); };
    // Strides cost more than a few selects: there the general kernel is the only one.
    if constexpr (!Access::kRagged) {
      const bool x = access.data[kX], y = access.data[kY], z = access.data[kZ];
      if (!a.clamped && !a.out2.data && x) {
        if (!y && !z) return with(affine_kernel<kFresh, 1, Access>);
        if (y && !z) return with(affine_kernel<kFresh, 2, Access>);
        if constexpr (!kFresh)
          if (y) return with(affine_kernel<kFresh, 3, Access>);
      }
    }
    return with(affine_kernel<kFresh, kAnyInputs, Access>);
  });
}

template <bool kFresh>
const char* launch_residual(const ResidualArgs& a, const LossArgs& loss, Scratch scratch, const Launch& how) {
  Operand operands[] = {a.pred, a.y, a.z, a.mask, a.grad};
  int columns[] = {a.columns[0], a.columns[1]};
  if (!kFresh && !a.y.data) {  // the same sum with z in y's place
    std::swap(operands[kTargetY], operands[kTargetZ]);
    std::swap(columns[0], columns[1]);
  }
  return how.with_access<T>(a.batch, operands, [&](const auto& access, const Cut& cut) {
    using Access = std::decay_t<decltype(access)>;
    const ResidualParams p{{cut, a.noise, a.table}, {columns[0], columns[1]}, loss, scratch};
    const auto with = [&](auto kernel) { return launch(how.stream, cut.units, kThreads, kernel, p, access); };
    if constexpr (Access::kRagged) return with(residual_kernel<kFresh, kAnyInputs, Access>);
    // With fresh noise z is not read; without, something is.
    constexpr int kLeast = kFresh ? 1 : 2;
    const bool more = access.data[kFresh ? kTargetY : kTargetZ];
    return more ? with(residual_kernel<kFresh, kLeast + 1, Access>) : with(residual_kernel<kFresh, kLeast, Access>);
  });
}

template <bool kFresh>
const char* launch_row_dots(const RowDotsArgs& a, double* out, Scratch scratch, const Launch& how) {
  const Operand operands[] = {a.g, a.x, a.y, a.z};
  return how.with_access<T>(a.batch, operands, [&](const auto& access, const Cut& cut) {
    const RowDotsParams p{{cut, a.noise, {}}, out, scratch};
    return launch(how.stream, cut.units, kThreads, row_dots_kernel<kFresh, std::decay_t<decltype(access)>>, p, access);
  });
}

}  // namespace DAE_NAME

const Kernels DAE_JOIN(kernels_, DAE_NAME) = {
    [](const AffineArgs& a, const Launch& how) {
      using namespace DAE_NAME;
      return a.noise.present ? launch_affine<true>(a, how) : launch_affine<false>(a, how);
    },
    [](const ResidualArgs& a, const LossArgs& loss, Scratch scratch, const Launch& how) {
      using namespace DAE_NAME;
      return a.noise.present ? launch_residual<true>(a, loss, scratch, how)
                             : launch_residual<false>(a, loss, scratch, how);
    },
    [](const RowDotsArgs& a, double* out, Scratch scratch, const Launch& how) {
      using namespace DAE_NAME;
      return a.noise.present ? launch_row_dots<true>(a, out, scratch, how)
                             : launch_row_dots<false>(a, out, scratch, how);
    },
};

}  // namespace dae::cuda
