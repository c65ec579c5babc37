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
  uint32_t zero = 0;  // for pin
};

// The first C of the columns, of each row.
template <int C>
__device__ __forceinline__ void prepare_coefficients(const Rows& p, const Unit& unit, const int* columns,
                                                     R (&c)[kMaxRows][C]) {
#pragma unroll 1
  for (int i = threadIdx.x; i < unit.rows * C; i += kThreads)
    c[i / C][i % C] = coefficient<R>(p.table, unit.row + i / C, columns[i % C]);
}

enum { kX, kY, kZ, kW, kOut, kOut2, kV };

// Columns of the coefficients of x, y, z, w: for out, for out2, for the estimate that the clamp is about; then those of v.
constexpr int kOfOut = 0, kOfOut2 = 4, kOfEstimate = 8, kColumns = 12, kOfFifth = 12, kAllColumns = 14;

struct AffineParams : Rows {
  int columns[kAllColumns];
  bool clamped;
  R lo, hi;
};

// kInputs: with one output, how many of x, y, z, w are read, in this order; fresh noise takes z's place and is none of
// them. A clamp is about x and y. kAnyInputs: everything else, with fresh noise or without; compiled as fresh it is that
// of five streams, whose noise, drawn or read, has v's place.
// kBlended: x and z summed and blended into w by y.
constexpr int kAnyInputs = -1, kBlended = -2;
// Of a kernel's loop, in one.
template <int kInputs>
constexpr int kTurns = kInputs < 0 ? 1 : 2;
template <bool kFresh>
constexpr int kAllInputs = kFresh ? 3 : 4;

// One output of a group, or its estimate. Where operands are shared with other uses, one whose column is absent counts
// as 0 here, whatever it holds.
template <bool kFresh, int kInputs, bool kShared, int N>
__device__ __forceinline__ void map_group(const int* columns, const R* c, const R (&x)[N], const R (&y)[N],
                                          const R (&z)[N], const R (&w)[N], R (&v)[N]) {
  constexpr bool kGeneral = kInputs == kAnyInputs;
  const auto used = [&](int k, R value) { return kShared && columns[k] == kAbsent ? R(0) : value; };
  const bool four = kGeneral ? columns[kW] != kAbsent : kInputs == kAllInputs<kFresh>;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (kFresh && kInputs == 0)
      v[i] = affine(c[kZ], z[i]);
    else if (kFresh && kInputs == 1)
      v[i] = affine(c[kX], x[i], c[kZ], z[i]);
    else if (four)
      v[i] = affine(c[kX], used(kX, x[i]), c[kY], used(kY, y[i]), c[kZ], used(kZ, z[i]), c[kW], w[i]);
    else
      v[i] = affine(c[kX], used(kX, x[i]), c[kY], used(kY, y[i]), c[kZ], used(kZ, z[i]));
  }
}

// As few as leave no value in local memory, where more threads were seen to pay (docs/notes.md).
template <bool kFresh, int kInputs>
constexpr int map_registers() {
  if (kInputs == kBlended) return sizeof(T) == 8 ? 128 : 80;
  if (kFresh && kInputs == kAnyInputs) return 128;
  if (sizeof(T) == 8) return kInputs == kAnyInputs || kInputs > 2 ? 128 : 80;
  if (kInputs == kAnyInputs || kInputs > 3) return 80;
  return kFresh && kInputs <= 1 ? 48 : 64;
}

template <bool kFresh, int kInputs, bool kClamped, class Access>
__global__ void __launch_bounds__(kThreads, blocks_of(map_registers<kFresh, kInputs>()))
    affine_kernel(const __grid_constant__ AffineParams p, const __grid_constant__ Access access) {
  using Cursor = typename Access::template Cursor<T>;
  constexpr int N = Cursor::N;
  constexpr bool kGeneral = kInputs == kAnyInputs, kFive = kGeneral && kFresh;
  constexpr int kHeld = kFive ? kAllColumns : (kGeneral || kClamped ? kColumns : kOfOut2);
  __shared__ R coefficients[kMaxRows][kHeld];
  __shared__ uint4 keys[kFresh || kGeneral ? kMaxRows : 1];
  const bool fresh = kGeneral ? p.noise.present : kFresh;
  const Unit unit = unit_at(p.cut, blockIdx.x);
  Cursor cursor(access, p.cut, unit);
  const auto reads = [&](int k) {
    if (kInputs == kBlended) return !(kFresh && k == kZ) && access.has(k);
    return kGeneral ? access.has(k) : (k == kW ? kInputs == kAllInputs<kFresh> : k < kInputs && !(kFresh && k == kZ));
  };
  Pack<T, N> xs = {}, ys = {}, zs = {}, ws = {}, vs = {};
  const auto fetch = [&](const Cursor& from) {
    if (from.g >= unit.groups) return;
    if (reads(kX)) from.read(kX, xs);
    if (reads(kY)) from.read(kY, ys);
    if (reads(kZ)) from.read(kZ, zs);
    if (reads(kW)) from.read(kW, ws);
    if constexpr (kFive)
      if (reads(kV)) from.read(kV, vs);
  };
  fetch(cursor);  // under way while the rows are prepared
  prepare_coefficients(p, unit, p.columns, coefficients);
  if constexpr (kFresh || kGeneral)
    if (fresh) prepare_keys(p.noise, unit, keys);
  __syncthreads();

  const auto walk = [&](auto groups) {
    const OfRow<groups.kOneRow, R, kHeld> row(coefficients);
    const Pinned pinned = pin(p.zero);
#pragma unroll kTurns<kInputs>
    while (cursor.g < unit.groups) {
      R x[N], y[N], z[N], w[N], v[N], fifth[N];
      const auto [at, blocks] = groups(cursor);
      const R* c = row[at.row];
      if (fresh) normals(blocks, kFive ? fifth : z, pinned);
      widen(xs, x), widen(ys, y), widen(ws, w);
      if (kFive || !fresh) widen(zs, z);
      if (kFive && !fresh) widen(vs, fifth);
      Cursor ahead = cursor;
      ahead.step();
      // While normals are made the next group has time to come, and is fetched when this one's registers are free.
      if (!kFresh) fetch(ahead);
      const auto map = [&](int first) { map_group<kFresh, kInputs, kGeneral || kClamped>(p.columns + first, c + first, x, y, z, w, v); };
      const auto write = [&](int k) {
        Pack<T, N> out;
        narrow(v, out);
        cursor.write(k, out);
      };
      if (kClamped || (kGeneral && p.clamped)) {
        const Clamp<R> clamp = {p.lo, p.hi};
        map(kOfEstimate);
#pragma unroll
        for (int i = 0; i < N; ++i) y[i] = clamp(v[i]);
      }
      const auto add_fifth = [&](int k) {
        if (!kFive || p.columns[kOfFifth + k] == kAbsent) return;
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = mul_add(c[kOfFifth + k], fifth[i], v[i]);
      };
      if constexpr (kInputs == kBlended) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = blend(y[i], affine(c[kX], x[i], c[kZ], z[i]), w[i]);
      } else {
        map(kOfOut);
        add_fifth(0);
      }
      write(kOut);
      if (kGeneral && access.has(kOut2)) {
        map(kOfOut2);
        add_fifth(1);
        write(kOut2);
      }
      if (kFresh) fetch(ahead);
      cursor = ahead;
    }
  };
  walk_unit<!kGeneral>(p.cut, unit, cursor, keys, fresh, walk);
}

enum { kPred, kTargetY, kTargetZ, kMask, kGrad };

struct ResidualParams : Rows {
  int columns[3];  // n1, n2, delta
  Penalty penalty;
  Choice choice;
  LossArgs loss;
  Scratch scratch;
};

// The means of the samples, the loss, and the two further means.
__device__ __forceinline__ void finish_loss(const ResidualParams& p, const Unit& unit, RowSums<R, 1>& sums,
                                            R (&groups)[1][kMaxTile]) {
  constexpr int kTotals = 3;
  const int64_t units = p.cut.units;
  double total[kTotals] = {};
  const bool has_rows = sums.finish(p.cut, unit, groups, p.scratch, [&](int64_t row, const double (&sum)[1]) {
    const double mean = row_mean(sum[0], p.loss.kept_of(row, p.cut.D));
    if (p.loss.per_sample) static_cast<R*>(p.loss.per_sample)[row] = static_cast<R>(mean);
    total[0] += loss_term(p.loss.weight_of<R>(p.table, row), sum[0], mean, p.loss.reduction);
#pragma unroll
    for (int k = 1; k < kTotals; ++k)
      total[k] += mean * static_cast<double>(coefficient<R>(p.table, row, p.loss.also_columns[k - 1]));
  });
  if (!has_rows || !(p.loss.loss || p.loss.also)) return;
  const bool whole = p.cut.segments_per_row == 1;
  if (!whole || unit.rows > 1) block_sum(total);  // of one row thread 0 has them
  if (whole) {  // of the unit's rows
    if (threadIdx.x == 0)
      for (int k = 0; k < kTotals; ++k) p.scratch.sums[k * units + blockIdx.x] = total[k];
    if (!is_last_block(p.scratch.counter)) return;
    sum_rows<kTotals>(
        1, units, [&](int k, int64_t i) { return read_sum(p.scratch.sums, k * units + i); },
        [&](int64_t, const double (&sum)[kTotals]) { memcpy(total, sum, sizeof(total)); });
  }
  if (threadIdx.x) return;
  const double count = static_cast<double>(p.cut.B);
  if (p.loss.loss)
    *static_cast<R*>(p.loss.loss) = static_cast<R>(p.loss.reduction == Reduction::mean ? total[0] / count : total[0]);
  if (p.loss.also)
    for (int k = 1; k < kTotals; ++k) static_cast<R*>(p.loss.also)[k - 1] = static_cast<R>(total[k] / count);
}

template <int N>
__device__ __forceinline__ R squares(const R (&r)[N]) {
  R sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum = mul_add(r[i], r[i], sum);
  return sum;
}

// The sum of rho over a group's residuals, which become rho'(r) / 2.
template <Penalty kPenalty, int N>
__device__ __forceinline__ R penalise(R delta, R (&r)[N]) {
  if constexpr (kPenalty == Penalty::mse) return squares(r);  // its own half slope
  const Rho<kPenalty, R> rho = {delta};
  R sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum += rho.value(r[i]);
    r[i] = rho.half_slope(r[i]);
  }
  return sum;
}

template <int N>
__device__ __forceinline__ R penalise(Penalty penalty, R delta, R (&r)[N]) {
  switch (penalty) {
#define DAE_CASE(X) \
  case Penalty::X: return penalise<Penalty::X>(delta, r);
    DAE_PENALTIES(DAE_CASE)
#undef DAE_CASE
  }
  return 0;
}

// kInputs: of squares, how many of pred, y, z are read, in that order; kMasked: with a mask in memory. kAnyInputs:
// everything else, drawn masks too, with fresh noise or without.
template <bool kFresh, int kInputs, bool kMasked>
constexpr int loss_registers() {
  if (sizeof(T) == 8) return kInputs == kAnyInputs ? 128 : 80;
  if (kInputs == kAnyInputs) return 80;
  return kFresh || kMasked || kInputs > 2 ? 64 : 48;
}

template <bool kFresh, int kInputs, bool kMasked, class Access>
__global__ void __launch_bounds__(kThreads, blocks_of(loss_registers<kFresh, kInputs, kMasked>()))
    residual_kernel(const __grid_constant__ ResidualParams p, const __grid_constant__ Access access) {
  using Cursor = typename Access::template Cursor<T>;
  constexpr int N = Cursor::N;
  constexpr bool kGeneral = kInputs == kAnyInputs;
  __shared__ R coefficients[kMaxRows][kGeneral ? 3 : 2], scales[kMaxRows][1], sums_of_groups[1][kMaxTile];
  __shared__ uint4 keys[kFresh || kGeneral ? kMaxRows : 1], mask_keys[kGeneral ? kMaxRows : 1];
  const bool fresh = kGeneral ? p.noise.present : kFresh;
  if (p.loss.only_if_scaled && p.loss.upstream_as<R>() == 1) return;
  const Unit unit = unit_at(p.cut, blockIdx.x);
  Cursor cursor(access, p.cut, unit);
  const auto reads = [&](int k) { return kGeneral ? access.has(k) : k < kInputs && !(kFresh && k == kTargetZ); };
  const bool drawn = kGeneral && p.choice.noise.present;
  const bool masked = kGeneral ? access.has(kMask) : kMasked;
  Pack<T, N> preds = {}, ys = {}, zs = {};
  Bytes<N> kept = {};
  const auto fetch = [&](const Cursor& from) {
    if (from.g >= unit.groups) return;
    from.read(kPred, preds);
    if (reads(kTargetY)) from.read(kTargetY, ys);
    if (reads(kTargetZ)) from.read(kTargetZ, zs);
    if (masked) from.read_mask(kMask, kept);
  };
  fetch(cursor);
  prepare_coefficients(p, unit, p.columns, coefficients);
  if (access.has(kGrad)) {
#pragma unroll 1
    for (int r = threadIdx.x; r < unit.rows; r += kThreads)
      scales[r][0] = static_cast<R>(gradient_scale(p.loss.weight_of<R>(p.table, unit.row + r), p.loss.upstream_as<R>(),
                                                   p.loss.kept_of(unit.row + r, p.cut.D), p.loss.reduction, p.cut.B));
  }
  if constexpr (kFresh || kGeneral)
    if (fresh) prepare_keys(p.noise, unit, keys);
  if constexpr (kGeneral)
    if (drawn) prepare_keys(p.choice.noise, unit, mask_keys);
  __syncthreads();
  RowSums<R, 1> sums;
  const auto walk = [&](auto groups) {
    const OfRow<groups.kOneRow, R, kGeneral ? 3 : 2> row(coefficients);
    const OfRow<groups.kOneRow, R, 1> scale(scales);
    const Pinned pinned = pin(p.zero);
#pragma unroll kTurns<kInputs>
    while (cursor.g < unit.groups) {
      R pred[N], y[N], z[N], r[N];
      const auto [at, blocks] = groups(cursor);
      const R* c = row[at.row];
      if (fresh) normals(blocks, z, pinned);
      widen(preds, pred), widen(ys, y);
      if (!fresh) widen(zs, z);
#pragma unroll
      for (int i = 0; i < N; ++i)
        r[i] = kFresh && kInputs == 1 ? affine(R(1), pred[i], c[1], z[i])
                                      : affine(R(1), pred[i], c[0], y[i], c[1], z[i]);
      // Selects, not products: what is masked out may be NaN, and past the row's end there is noise.
      if (masked) {
#pragma unroll
        for (int i = 0; i < N; ++i) r[i] = kept[i] ? r[i] : R(0);
      }
      if (drawn) {
        bool counts[N];
        draw(p.choice, unit.row + at.row, Blocks{to_key(mask_keys[at.row]), cursor.block(at)}, counts);
#pragma unroll
        for (int i = 0; i < N; ++i) r[i] = counts[i] ? r[i] : R(0);
      }
      Cursor ahead = cursor;
      ahead.step();
      fetch(ahead);
      if constexpr (Access::kRagged) {
#pragma unroll
        for (int i = 0; i < N; ++i) r[i] = N * at.group + i < p.cut.D ? r[i] : R(0);
      }
      const R sum[1] = {kGeneral ? penalise(p.penalty, c[2], r) : squares(r)};
      sums.template add<groups.kOneRow>(unit, cursor.g, sum, sums_of_groups);
      if (access.has(kGrad)) {
        const R by = scale[at.row][0];
        R gradient[N];
#pragma unroll
        for (int i = 0; i < N; ++i) gradient[i] = by * r[i];
        Pack<T, N> grad;
        narrow(gradient, grad);
        cursor.write(kGrad, grad);
      }
      cursor = ahead;
    }
  };
  walk_unit<!kGeneral>(p.cut, unit, cursor, keys, fresh, walk);
  if (!p.loss.per_sample && !p.loss.loss) return;
  finish_loss(p, unit, sums, sums_of_groups);
}

enum { kG, kDotX, kDotY, kDotZ };

struct RowDotsParams : Rows {
  double* out;  // (B, 3)
  Scratch scratch;
};

template <bool kFresh, class Access>
__global__ void __launch_bounds__(kThreads, blocks_of(sizeof(T) == 8 ? 80 : 64))
    row_dots_kernel(const __grid_constant__ RowDotsParams p, const __grid_constant__ Access access) {
  using Cursor = typename Access::template Cursor<T>;
  constexpr int N = Cursor::N;
  __shared__ R sums_of_groups[3][kMaxTile];
  __shared__ uint4 keys[kFresh ? kMaxRows : 1];
  const Unit unit = unit_at(p.cut, blockIdx.x);
  Cursor cursor(access, p.cut, unit);
  if constexpr (kFresh) prepare_keys(p.noise, unit, keys);
  __syncthreads();
  RowSums<R, 3> sums;
  const auto walk = [&](auto groups) {
    const Pinned pinned = pin(p.zero);
#pragma unroll 1
    for (; cursor.g < unit.groups; cursor.step()) {
      Pack<T, N> gs, xs = {}, ys = {}, zs = {};
      cursor.read(kG, gs);
      if (access.has(kDotX)) cursor.read(kDotX, xs);
      if (access.has(kDotY)) cursor.read(kDotY, ys);
      if (!kFresh && access.has(kDotZ)) cursor.read(kDotZ, zs);
      R v[N], other[3][N], dots[3] = {R(0), R(0), R(0)};
      widen(gs, v), widen(xs, other[0]), widen(ys, other[1]);
      if constexpr (kFresh)
        normals(groups(cursor).blocks, other[2], pinned);
      else
        widen(zs, other[2]);
#pragma unroll
      for (int k = 0; k < 3; ++k)
#pragma unroll
        for (int i = 0; i < N; ++i) dots[k] = mul_add(v[i], other[k][i], dots[k]);
      sums.template add<groups.kOneRow>(unit, cursor.g, dots, sums_of_groups);
    }
  };
  walk_unit<!Access::kRagged>(p.cut, unit, cursor, keys, kFresh, walk);
  sums.finish(p.cut, unit, sums_of_groups, p.scratch, [&](int64_t row, const double (&sum)[3]) {
#pragma unroll
    for (int k = 0; k < 3; ++k) p.out[3 * row + k] = sum[k];
  });
}

enum { kClean, kCorrupted };

struct CorruptParams {
  Cut cut;
  Choice choice;
  T low, high;
};

template <class Access>
__global__ void __launch_bounds__(kThreads, blocks_of(sizeof(T) == 8 ? 80 : 64))
    corrupt_kernel(const __grid_constant__ CorruptParams p, const __grid_constant__ Access access) {
  using Cursor = typename Access::template Cursor<T>;
  constexpr int N = Cursor::N;
  __shared__ int64_t thresholds[kMaxRows][2];
  __shared__ uint4 keys[kMaxRows];
  const Unit unit = unit_at(p.cut, blockIdx.x);
  Cursor cursor(access, p.cut, unit);
  Pack<T, N> fetched;
  if (cursor.g < unit.groups) cursor.read(kClean, fetched);
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * unit.rows; i += kThreads)
    thresholds[i / 2][i % 2] = p.choice.threshold(unit.row + i / 2, i % 2);
  prepare_keys(p.choice.noise, unit, keys);
  __syncthreads();
  const auto walk = [&](auto groups) {
    const OfRow<groups.kOneRow, int64_t, 2> row(thresholds);
#pragma unroll 1
    while (cursor.g < unit.groups) {
      const auto [at, blocks] = groups(cursor);
      const int64_t* threshold = row[at.row];
      uint32_t word[N];
      words(blocks, word);
      T v[N];
      fetched.values(v);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (word[i] < threshold[1]) v[i] = word[i] < threshold[0] ? p.low : p.high;
      cursor.write(kCorrupted, Pack<T, N>(v));
      cursor.step();
      if (cursor.g < unit.groups) cursor.read(kClean, fetched);
    }
  };
  walk_unit<!Access::kRagged>(p.cut, unit, cursor, keys, true, walk);
}

enum { kMu, kLogVar, kEps, kSample };

// What both directions read of a group. blocks: of eps, where it is fresh.
template <int N, class Cursor, class Access, class B>
__device__ __forceinline__ void read_gaussian(bool fresh, const Cursor& cursor, const Access& access, const B& blocks,
                                              const Pinned& pinned, R (&mu)[N], R (&log_var)[N], R (&eps)[N]) {
  Pack<T, N> mus, log_vars, epss = {};
  cursor.read(kMu, mus);
  cursor.read(kLogVar, log_vars);
  if (access.has(kEps)) cursor.read(kEps, epss);
  widen(mus, mu), widen(log_vars, log_var), widen(epss, eps);
  if (fresh) normals(blocks, eps, pinned);
}

struct GaussianParams : Rows {
  R* kl;  // (B,)
  Scratch scratch;
};

template <class Access>
__global__ void __launch_bounds__(kThreads, blocks_of(sizeof(T) == 8 ? 160 : 80))
    gaussian_kernel(const __grid_constant__ GaussianParams p, const __grid_constant__ Access access) {
  using Cursor = typename Access::template Cursor<T>;
  constexpr int N = Cursor::N;
  __shared__ R sums_of_groups[1][kMaxTile];
  __shared__ uint4 keys[kMaxRows];
  const Unit unit = unit_at(p.cut, blockIdx.x);
  Cursor cursor(access, p.cut, unit);
  if (p.noise.present) prepare_keys(p.noise, unit, keys);
  __syncthreads();
  RowSums<R, 1> sums;
  const auto walk = [&](auto groups) {
    const Pinned pinned = pin(p.zero);
#pragma unroll 1
    for (; cursor.g < unit.groups; cursor.step()) {
      R mu[N], log_var[N], eps[N], z[N], kl[1] = {R(0)};
      read_gaussian(p.noise.present, cursor, access, groups(cursor).blocks, pinned, mu, log_var, eps);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Gaussian<R> gaussian(mu[i], log_var[i]);
        kl[0] += gaussian.kl();  // 0 past the row's end, where mu and log_var are
        z[i] = gaussian.sample(eps[i]);
      }
      Pack<T, N> out;
      narrow(z, out);
      cursor.write(kSample, out);
      sums.template add<groups.kOneRow>(unit, cursor.g, kl, sums_of_groups);
    }
  };
  walk_unit<!Access::kRagged>(p.cut, unit, cursor, keys, p.noise.present, walk);
  sums.finish(p.cut, unit, sums_of_groups, p.scratch,
              [&](int64_t row, const double (&sum)[1]) { p.kl[row] = static_cast<R>(sum[0]); });
}

enum { kZGrad = kEps + 1, kMuGrad, kLogVarGrad };

struct GaussianGradParams : Rows {
  const R* kl_grad;  // (B,), or nullptr for 0
};

template <class Access>
__global__ void __launch_bounds__(kThreads, blocks_of(sizeof(T) == 8 ? 128 : 80))
    gaussian_grad_kernel(const __grid_constant__ GaussianGradParams p, const __grid_constant__ Access access) {
  using Cursor = typename Access::template Cursor<T>;
  constexpr int N = Cursor::N;
  __shared__ R kl_grads[kMaxRows][1];
  __shared__ uint4 keys[kMaxRows];
  const Unit unit = unit_at(p.cut, blockIdx.x);
  Cursor cursor(access, p.cut, unit);
#pragma unroll 1
  for (int r = threadIdx.x; r < unit.rows; r += kThreads) kl_grads[r][0] = p.kl_grad ? p.kl_grad[unit.row + r] : R(0);
  if (p.noise.present) prepare_keys(p.noise, unit, keys);
  __syncthreads();
  const auto walk = [&](auto groups) {
    const OfRow<groups.kOneRow, R, 1> row(kl_grads);
    const Pinned pinned = pin(p.zero);
#pragma unroll 1
    for (; cursor.g < unit.groups; cursor.step()) {
      const auto [at, blocks] = groups(cursor);
      const R kl_grad = row[at.row][0];
      Pack<T, N> pack = {};
      if (access.has(kZGrad)) cursor.read(kZGrad, pack);
      R mu[N], log_var[N], eps[N], z_grad[N], gradient[N];
      read_gaussian(p.noise.present, cursor, access, blocks, pinned, mu, log_var, eps);
      widen(pack, z_grad);
#pragma unroll
      for (int i = 0; i < N; ++i) gradient[i] = Gaussian<R>(mu[i], log_var[i]).mu_grad(z_grad[i], kl_grad);
      narrow(gradient, pack);
      cursor.write(kMuGrad, pack);
#pragma unroll
      for (int i = 0; i < N; ++i) gradient[i] = Gaussian<R>(mu[i], log_var[i]).log_var_grad(z_grad[i], kl_grad, eps[i]);
      narrow(gradient, pack);
      cursor.write(kLogVarGrad, pack);
    }
  };
  walk_unit<!Access::kRagged>(p.cut, unit, cursor, keys, p.noise.present, walk);
}

template <bool kFresh, bool kFive = false>
const char* launch_affine(const AffineArgs& a, const Launch& how) {
  Operand operands[kFive ? kV + 1 : kV] = {a.x, a.y, a.z, a.w, a.out, a.out2};
  if constexpr (kFive) operands[kV] = a.v;
  AffineParams p{{Cut{}, a.noise, a.table}, {}, a.clamped, static_cast<R>(a.lo), static_cast<R>(a.hi)};
  std::copy_n(a.columns, kOfEstimate, p.columns);
  std::copy_n(a.fifth, 2, p.columns + kOfFifth);
  const int estimate[] = {a.inner[0], a.inner[1], kAbsent, a.inner[2]};
  for (int k = 0; k < 4; ++k) {
    p.columns[kOfEstimate + k] = a.clamped ? estimate[k] : kAbsent;
    const bool outside = a.columns[kOfOut + k] != kAbsent || a.columns[kOfOut2 + k] != kAbsent;
    const bool inside = p.columns[kOfEstimate + k] != kAbsent;
    const bool blended = a.blends && (k == kY || k == kW);
    if (!(inside || blended || (outside && !(a.clamped && k == kY)))) operands[k] = {};  // not read where nothing wants it
  }
  return how.with_access<T>(a.batch, operands, [&](const auto& access) {
    using Access = std::decay_t<decltype(access)>;
    if constexpr (!kFive)
      if (a.blends) return how.units<affine_kernel<kFresh, kBlended, false, Access>, T>(a.batch, p, access);
    // Strides cost more than a few selects: there the general kernel is the only one.
    if constexpr (!Access::kRagged && !kFive) {
      const bool x = access.data[kX], y = access.data[kY], z = access.data[kZ], w = access.data[kW];
      if (!a.clamped && !a.out2.data) {
        if constexpr (kFresh)
          if (!x && !y && !w) return how.units<affine_kernel<kFresh, 0, false, Access>, T>(a.batch, p, access);
        if (x && !y && !z && !w) return how.units<affine_kernel<kFresh, 1, false, Access>, T>(a.batch, p, access);
        if (x && y && !z && !w) return how.units<affine_kernel<kFresh, 2, false, Access>, T>(a.batch, p, access);
        if constexpr (!kFresh)
          if (x && y && z && !w) return how.units<affine_kernel<kFresh, 3, false, Access>, T>(a.batch, p, access);
        if (x && y && (z || kFresh) && w)
          return how.units<affine_kernel<kFresh, kAllInputs<kFresh>, false, Access>, T>(a.batch, p, access);
      }
      if constexpr (!kFresh)
        if (a.clamped && !a.out2.data && x && y && !z && !w)
          return how.units<affine_kernel<kFresh, 2, true, Access>, T>(a.batch, p, access);
    }
    return how.units<affine_kernel<kFive, kAnyInputs, false, Access>, T>(a.batch, p, access);
  });
}

template <bool kFresh>
const char* launch_residual(const ResidualArgs& a, const LossArgs& loss, Scratch scratch, const Launch& how) {
  Operand operands[] = {a.pred, a.y, a.z, a.mask, a.grad};
  ResidualParams p{
      {Cut{}, a.noise, a.table}, {a.columns[0], a.columns[1], a.columns[2]}, a.penalty, a.choice, loss, scratch};
  if (!kFresh && !a.y.data) {  // the same sum with z in y's place
    std::swap(operands[kTargetY], operands[kTargetZ]);
    std::swap(p.columns[0], p.columns[1]);
  }
  return how.with_access<T>(a.batch, operands, [&](const auto& access) {
    using Access = std::decay_t<decltype(access)>;
    if constexpr (!Access::kRagged) {
      // With fresh noise z is not read; without, y is, or the general kernel runs, which needs neither.
      constexpr int kLeast = kFresh ? 1 : 2;
      const bool more = access.data[kFresh ? kTargetY : kTargetZ], masked = access.data[kMask];
      if (a.penalty == Penalty::mse && !a.choice.noise.present && (kFresh || access.data[kTargetY])) {
        if (more && masked) return how.units<residual_kernel<kFresh, kLeast + 1, true, Access>, T>(a.batch, p, access);
        if (more) return how.units<residual_kernel<kFresh, kLeast + 1, false, Access>, T>(a.batch, p, access);
        if (masked) return how.units<residual_kernel<kFresh, kLeast, true, Access>, T>(a.batch, p, access);
        return how.units<residual_kernel<kFresh, kLeast, false, Access>, T>(a.batch, p, access);
      }
    }
    return how.units<residual_kernel<false, kAnyInputs, true, Access>, T>(a.batch, p, access);
  });
}

template <bool kFresh>
const char* launch_row_dots(const RowDotsArgs& a, double* out, Scratch scratch, const Launch& how) {
  const Operand operands[] = {a.g, a.x, a.y, a.z};
  const RowDotsParams p{{Cut{}, a.noise, {}}, out, scratch};
  return how.with_access<T>(a.batch, operands, [&](const auto& access) {
    return how.units<row_dots_kernel<kFresh, std::decay_t<decltype(access)>>, T>(a.batch, p, access);
  });
}

const char* launch_corrupt(const CorruptArgs& a, const Launch& how) {
  const Operand operands[] = {a.x, a.out};
  const CorruptParams p{Cut{}, a.choice, T(static_cast<R>(a.low)), T(static_cast<R>(a.high))};
  return how.with_access<T>(a.batch, operands, [&](const auto& access) {
    return how.units<corrupt_kernel<std::decay_t<decltype(access)>>, T>(a.batch, p, access);
  });
}

const char* launch_gaussian(const GaussianArgs& a, void* kl, Scratch scratch, const Launch& how) {
  const Operand operands[] = {a.mu, a.log_var, a.eps, a.z};
  const GaussianParams p{{Cut{}, a.noise, {}}, static_cast<R*>(kl), scratch};
  return how.with_access<T>(a.batch, operands, [&](const auto& access) {
    return how.units<gaussian_kernel<std::decay_t<decltype(access)>>, T>(a.batch, p, access);
  });
}

const char* launch_gaussian_grad(const GaussianGradArgs& a, const Launch& how) {
  const Operand operands[] = {a.mu, a.log_var, a.eps, a.z_grad, a.mu_grad, a.log_var_grad};
  const GaussianGradParams p{{Cut{}, a.noise, {}}, static_cast<const R*>(a.kl_grad)};
  return how.with_access<T>(a.batch, operands, [&](const auto& access) {
    return how.units<gaussian_grad_kernel<std::decay_t<decltype(access)>>, T>(a.batch, p, access);
  });
}

const char* launch_affine_of(const AffineArgs& a, const Launch& how) {
  if (a.five) return launch_affine<false, true>(a, how);
  return a.noise.present ? launch_affine<true>(a, how) : launch_affine<false>(a, how);
}

const char* launch_residual_of(const ResidualArgs& a, const LossArgs& loss, Scratch scratch, const Launch& how) {
  return a.noise.present ? launch_residual<true>(a, loss, scratch, how) : launch_residual<false>(a, loss, scratch, how);
}

const char* launch_row_dots_of(const RowDotsArgs& a, double* out, Scratch scratch, const Launch& how) {
  return a.noise.present ? launch_row_dots<true>(a, out, scratch, how) : launch_row_dots<false>(a, out, scratch, how);
}

}  // namespace DAE_NAME

// Of the host alone: hipcc would make a constant of it for the device as well.
#if !(defined(__HIPCC__) && defined(__HIP_DEVICE_COMPILE__))
const Kernels DAE_JOIN(kernels_, DAE_NAME) = {DAE_NAME::launch_affine_of,   DAE_NAME::launch_residual_of,
                                              DAE_NAME::launch_row_dots_of, DAE_NAME::launch_corrupt,
                                              DAE_NAME::launch_gaussian,    DAE_NAME::launch_gaussian_grad};
#endif

}  // namespace dae::cuda
