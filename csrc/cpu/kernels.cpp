// The CPU kernels. Compiled once per instruction set, each time into its own namespace DAE_ISA.
//
// Nothing here may be a non-static inline or template from a shared header (the standard library's
// included): the linker would keep one copy for all, perhaps the AVX-512 one. math.h forces inlining.

#include <type_traits>

#include "units.h"
#include "convert.h"
#include "noise.h"
#include "output.h"
#include "../ops.h"

// Of a unit without elements, which there is not, an output's buffer would be written from as it is.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define DAE_JOIN_(a, b) a##b
#define DAE_JOIN(a, b) DAE_JOIN_(a, b)

namespace dae::cpu {
namespace DAE_ISA {

// A stretch of the batch, in logical order: part of one row, or whole rows.
struct Unit {
  int64_t row, rows, begin, length;  // `length` elements of each row, from element `begin`
  bool streams;                      // its outputs go past the caches
  int64_t count() const { return rows * length; }
};

static inline Unit unit_at(const Batch& batch, const Cut& cut, int64_t u, bool streams) {
  if (cut.segments_per_row > 1) {
    const int64_t begin = u % cut.segments_per_row * kSegment, left = cut.D - begin;
    return {u / cut.segments_per_row, 1, begin, left < kSegment ? left : kSegment, streams};
  }
  const int64_t row = u * cut.rows_per_unit, left = batch.B - row;
  return {row, left < cut.rows_per_unit ? left : cut.rows_per_unit, 0, cut.D, streams};
}

// The walk of every kernel: calls body(unit, segment) for each, the latter being the place of its first row among all
// segments, of which a unit is one of a long row, or `rows` whole rows.
template <class Body>
static inline void for_each_unit(const Batch& batch, int64_t unit_begin, int64_t unit_end, Body body) {
  const Cut cut(batch.B, batch.D);
  const double share = static_cast<double>(unit_end - unit_begin) / static_cast<double>(cut.units);
  const bool past = streams(share * static_cast<double>(batch.B) * static_cast<double>(batch.D) * bytes_of(batch.dtype));
  for (int64_t u = unit_begin; u < unit_end; ++u)
    body(unit_at(batch, cut, u, past), cut.segments_per_row > 1 ? u : u * cut.rows_per_unit);
  if (past) finish_streams();
}

// Calls run(memory offset, position in the unit, run length, stride) for each stretch of a strided
// operand that advances along its last dimension.
template <class Run>
static inline void for_each_run(const Batch& batch, const Operand& operand, const Unit& unit, Run run) {
  const int last = batch.ndim - 1;
  int64_t done = 0;
  for (int64_t r = 0; r < unit.rows; ++r) {
    for (int64_t i = unit.begin, end = unit.begin + unit.length; i < end;) {
      int64_t rest = i, offset = (unit.row + r) * operand.strides[0], run_length = 1, stride = 0;
      for (int d = last; d >= 0; --d) {
        const int64_t c = rest % batch.sizes[d];
        rest /= batch.sizes[d];
        offset += c * operand.strides[d + 1];
        if (d == last) run_length = batch.sizes[d] - c, stride = operand.strides[d + 1];
      }
      if (run_length > end - i) run_length = end - i;
      run(offset, done, run_length, stride);
      i += run_length;
      done += run_length;
    }
  }
}

alignas(64) static const char kZeros[kSegment * sizeof(double)] = {};

// The unit's elements of an operand as `To`: the memory itself where it already is that, else converted
// or gathered into `buffer`. An absent operand reads as zeros, so that one loop serves every combination.
template <class T, class To>
static inline const To* read(const Batch& batch, const Operand& operand, const Unit& unit, To* buffer) {
  const T* data = static_cast<const T*>(operand.data);
  if (!data) return reinterpret_cast<const To*>(kZeros);
  if (operand.strides) {
    for_each_run(batch, operand, unit, [&](int64_t offset, int64_t at, int64_t n, int64_t stride) {
      // The usual strides, which a compiler makes vectors of.
      if (stride == 1) return convert_block(data + offset, buffer + at, n);
      if (stride == 0) {
        To one;
        convert(data[offset], one);
        for (int64_t i = 0; i < n; ++i) buffer[at + i] = one;
        return;
      }
      for (int64_t i = 0; i < n; ++i) convert(data[offset + i * stride], buffer[at + i]);
    });
    return buffer;
  }
  const T* from = data + unit.row * batch.D + unit.begin;
  if constexpr (sizeof(T) == sizeof(To)) return reinterpret_cast<const To*>(from);
  convert_block(from, buffer, unit.count());
  return buffer;
}

// Where to put an output: its memory where that holds `From`, or `buffer`, which write() then stores.
template <class T, class From>
static inline Output<From> target(const Batch& batch, const Operand& operand, const Unit& unit, From* buffer) {
  if (operand.strides || sizeof(T) != sizeof(From)) return {buffer};
  return {reinterpret_cast<From*>(operand.data) + unit.row * batch.D + unit.begin, unit.streams};
}

template <class T, class From>
static inline void write(const Batch& batch, const Operand& operand, const Unit& unit, const Output<From>& from) {
  T* data = static_cast<T*>(operand.data);
  const From* buffer = from.data;
  if (operand.strides) {
    for_each_run(batch, operand, unit, [&](int64_t offset, int64_t at, int64_t n, int64_t stride) {
      for (int64_t i = 0; i < n; ++i) convert(buffer[at + i], data[offset + i * stride]);
    });
  } else if (sizeof(T) != sizeof(From)) {
    const Output<T> out = {data + unit.row * batch.D + unit.begin, unit.streams};
    out.put(unit.count(), [&](int64_t i, T* to, int64_t m) { convert_block(buffer + i, to, m); });
  }
}

template <class To>
static inline void generate(const Noise& noise, const Unit& unit, typename To::type* out) {
  if (unit.rows > 1 && unit.length < kValues) return fill_short_rows<To>(noise, unit.row, unit.rows, unit.length, out);
  for (int64_t r = 0; r < unit.rows; ++r)
    fill_row<To>(noise, unit.row + r, unit.begin, unit.length, out + r * unit.length);
}

// Not inlined: one copy of the generator serves every kernel and type.
__attribute__((noinline)) static void generate_normal(const Noise& noise, const Unit& unit, float* out) {
  generate<ToNormal>(noise, unit, out);
}

__attribute__((noinline)) static void generate_words(const Noise& noise, const Unit& unit, uint32_t* out) {
  generate<ToWord<uint32_t>>(noise, unit, out);
}

// Which elements count: the mask's bytes, or those that words choose.
static inline const uint8_t* read_mask(const Batch& batch, const Operand& mask, const Choice& choice, const Unit& unit,
                                       uint8_t* buffer) {
  if (!choice.noise.present) return read<uint8_t>(batch, mask, unit, buffer);
  alignas(64) uint32_t words[kSegment];
  generate_words(choice.noise, unit, words);
  for (int64_t r = 0; r < unit.rows; ++r) {
    const int64_t at = r * unit.length, second = choice.threshold(unit.row + r, 1);
    for (int64_t i = 0; i < unit.length; ++i) buffer[at + i] = choice.counts(words[at + i], second);
  }
  return buffer;
}

// The third operand: generated, or read.
template <class T, class R>
static inline const R* read_z(const Batch& batch, const Operand& z, const Noise& noise, const Unit& unit, R* buffer) {
  if (!noise.present) return read<T>(batch, z, unit, buffer);
  if constexpr (sizeof(R) == sizeof(float)) {
    generate_normal(noise, unit, buffer);
  } else {
    alignas(64) float master[kSegment];
    generate_normal(noise, unit, master);
    convert_block(master, buffer, unit.count());
  }
  return buffer;
}

// The coefficients of one row.
template <class R>
struct Coefficients {
  const R* row;
  R operator[](int column) const { return column == kAbsent ? R(-0.0) : row[column]; }  // as coefficient() in args.h
};

template <class R>
static inline Coefficients<R> coefficients(const Table& table, int64_t row) {
  int64_t i = table.rows == 1 ? 0 : row;
  if (table.index)
    i = table.index_is_int64 ? static_cast<const int64_t*>(table.index)[row]
                             : static_cast<const int32_t*>(table.index)[row];
  return {static_cast<const R*>(table.data) + i * table.columns};
}

template <class T>
static inline const T* zeros() {
  return reinterpret_cast<const T*>(kZeros);
}

// A fifth stream of one row; column kAbsent: there is none.
template <class R>
struct Fifth {
  int column = kAbsent;
  const R* v = nullptr;
};

// What one turn of a loop computes with: numbers, or Floats of them from the i-th on.
template <class V>
struct Turn {
  int64_t i;
  template <class R>
  V operator()(R number) const {
    return V(number);
  }
  template <class T>
  V operator()(T* in) const {
    if constexpr (std::is_same_v<V, Floats>)
      return floats_at(in + i);
    else
      return V(widen(in[i]));
  }
};

// Writes what value(turn) is at from + i to to[i], for each of m: by Floats where something is Half or BFloat16, whose
// conversions compilers make poorly or not at all; else by numbers, of which they make the vectors.
template <class R, class... In, class Out, class Value>
__attribute__((always_inline)) static inline void fill(int64_t from, Out* to, int64_t m, Value value) {
  int64_t whole = 0;
  if constexpr (kFloats > 1 && (kIsHalf<Out> || ... || kIsHalf<In>)) {
    whole = m / kFloats * kFloats;
    for (int64_t i = 0; i < whole; i += kFloats) put(value(Turn<Floats>{from + i}), to + i);
  }
#pragma GCC ivdep  // though `to` may be one of the inputs
  for (int64_t i = whole; i < m; ++i) narrow(value(Turn<R>{from + i}), to[i]);
}

// One row through the map that `columns` names. An input whose coefficient is absent is not read: it
// may hold an infinity, and 0 times that is not 0.
template <class R, class X, class Y, class W, class Out>
static inline void apply_columns(const Coefficients<R>& c, const int* columns, const X* x, const Y* y, const R* z,
                                 const W* w, const Fifth<R>& fifth, const Output<Out>& out, int64_t n) {
  if (columns[0] == kAbsent) x = zeros<X>();
  if (columns[1] == kAbsent) y = zeros<Y>();
  if (columns[2] == kAbsent) z = zeros<R>();
  const R c0 = c[columns[0]], c1 = c[columns[1]], c2 = c[columns[2]], c3 = c[columns[3]];
  const auto each = [=](auto value) {
    out.put(n, [=](int64_t from, Out* to, int64_t m) { fill<R, X, Y, W>(from, to, m, value); });
  };
  if (fifth.column != kAbsent) {
    const R c4 = c[fifth.column];
    if (columns[3] == kAbsent) w = zeros<W>();
    each([=](auto of) {
      return mul_add(of(c4), of(fifth.v), affine(of(c0), of(x), of(c1), of(y), of(c2), of(z), of(c3), of(w)));
    });
  } else if (columns[3] != kAbsent) {
    each([=](auto of) { return affine(of(c0), of(x), of(c1), of(y), of(c2), of(z), of(c3), of(w)); });
  } else if (columns[2] != kAbsent) {
    each([=](auto of) { return affine(of(c0), of(x), of(c1), of(y), of(c2), of(z)); });
  } else if (columns[1] != kAbsent) {
    each([=](auto of) { return affine(of(c0), of(x), of(c1), of(y)); });
  } else {
    each([=](auto of) { return affine(of(c0), of(x)); });
  }
}

// The estimate of x, y and w, clamped; or, where it is within the clamp's bounds, a sum of the gradients z and v.
template <class R, class T>
static inline void apply_clamped(const AffineArgs& a, const Coefficients<R>& c, const T* x, const T* y, const T* w,
                                 const R* z, const R* v, R* out, int64_t n) {
  const int columns[] = {a.inner[0], a.inner[1], kAbsent, a.inner[2]};
  const Clamp<R> clamp = {static_cast<R>(a.lo), static_cast<R>(a.hi)};
  apply_columns(c, columns, x, y, zeros<R>(), w, {}, Output<R>{out}, n);
  if (!a.gates) {
    for (int64_t i = 0; i < n; ++i) out[i] = clamp(out[i]);
    return;
  }
  if (a.gate[0] == kAbsent) z = zeros<R>();
  if (a.gate[1] == kAbsent) v = zeros<R>();
  const R of_z = c[a.gate[0]], of_v = c[a.gate[1]];
  for (int64_t i = 0; i < n; ++i) out[i] = clamp.passes(out[i]) ? affine(of_z, z[i], of_v, v[i]) : R(0);
}

// The sum of x and z made first, in `middle`.
template <class R, class T>
static inline void apply_blend(const Coefficients<R>& c, const int* columns, const T* x, const T* m, const R* z, const T* w,
                               R* middle, const Output<T>& out, int64_t n) {
  apply_columns(c, columns, x, zeros<T>(), z, zeros<T>(), {}, Output<R>{middle}, n);
  out.put(n, [=](int64_t from, T* to, int64_t many) {
    fill<R, T>(from, to, many, [=](auto of) { return blend(of(m), of(middle), of(w)); });
  });
}

// Eight buffers of doubles for a whole unit would be more stack than some threads have.
template <class R>
constexpr int64_t kAffinePart = sizeof(R) > sizeof(float) ? kSegment / 2 : kSegment;

// A unit in parts of at most kPart elements: of whole rows where one fits, else of its one row.
template <int64_t kPart>
static inline int64_t parts_of(const Unit& unit) {
  if (unit.length > kPart) return (unit.length + kPart - 1) / kPart;
  const int64_t rows = kPart / unit.length;
  return (unit.rows + rows - 1) / rows;
}
template <int64_t kPart>
static inline Unit part_of(const Unit& unit, int64_t k) {
  if (unit.length > kPart) {
    const int64_t begin = k * kPart, left = unit.length - begin;
    return {unit.row, 1, unit.begin + begin, left < kPart ? left : kPart, unit.streams};
  }
  const int64_t rows = kPart / unit.length, first = k * rows, left = unit.rows - first;
  return {unit.row + first, left < rows ? left : rows, unit.begin, unit.length, unit.streams};
}

template <class T>
static inline void affine_part(const AffineArgs& a, const Unit& unit) {
  using R = typename ComputeType<T>::type;
  constexpr int64_t kPart = kAffinePart<R>;
  alignas(64) T xs[kPart], ys[kPart], ws[kPart], outs[kPart], outs2[kPart];
  alignas(64) R zs[kPart], vs[kPart], middle[kPart];
  const T* x = read<T>(a.batch, a.x, unit, xs);
  const T* y = read<T>(a.batch, a.y, unit, ys);
  const R* z = a.five ? read<T>(a.batch, a.z, unit, zs) : read_z<T>(a.batch, a.z, a.noise, unit, zs);
  const R* v = a.five ? read_z<T>(a.batch, a.v, a.noise, unit, vs) : zeros<R>();
  const T* w = read<T>(a.batch, a.w, unit, ws);
  const Output<T> out = target<T>(a.batch, a.out, unit, outs);
  const Output<T> out2 = a.out2.data ? target<T>(a.batch, a.out2, unit, outs2) : Output<T>{};
  for (int64_t r = 0; r < unit.rows; ++r) {
    const int64_t at = r * unit.length, n = unit.length;
    const Coefficients<R> c = coefficients<R>(a.table, unit.row + r);
    const Fifth<R> first = {a.fifth[0], v + at}, second = {a.fifth[1], v + at};
    // The second output first: `out` may be one of the inputs, and this stretch is still in cache.
    if (a.blends) {
      apply_blend(c, a.columns, x + at, y + at, z + at, w + at, middle, out + at, n);
    } else if (a.clamped) {
      apply_clamped(a, c, x + at, y + at, w + at, z + at, v + at, middle, n);
      if (out2) apply_columns(c, a.columns + 4, x + at, middle, z + at, w + at, second, out2 + at, n);
      apply_columns(c, a.columns, x + at, middle, z + at, w + at, first, out + at, n);
    } else {
      if (out2) apply_columns(c, a.columns + 4, x + at, y + at, z + at, w + at, second, out2 + at, n);
      apply_columns(c, a.columns, x + at, y + at, z + at, w + at, first, out + at, n);
    }
  }
  write<T>(a.batch, a.out, unit, out);
  if (out2) write<T>(a.batch, a.out2, unit, out2);
}

template <class T>
static void affine_units(const AffineArgs& a, int64_t unit_begin, int64_t unit_end) {
  constexpr int64_t kPart = kAffinePart<typename ComputeType<T>::type>;
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t) {
    for (int64_t k = 0; k < parts_of<kPart>(unit); ++k) affine_part<T>(a, part_of<kPart>(unit, k));
  });
}

// 64 running sums, whatever the vector width: the same sum on every instruction set, and enough of
// them to hide the latency of an fma. A float lane takes at most kSegment/64 products. Halved until one is left.
constexpr int kSums = 64;

template <class R>
static inline double sum_lanes(const R (&lanes)[kSums]) {
  double sums[kSums];
  for (int j = 0; j < kSums; ++j) sums[j] = static_cast<double>(lanes[j]);
  for (int half = kSums / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

template <class A, class R>
static inline double dot(const A* a, const R* b, int64_t n) {
  alignas(64) R lanes[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int j = 0; j < kSums; ++j) lanes[j] = mul_add(widen(a[i + j]), b[i + j], lanes[j]);
  for (int j = 0; i < n; ++i, ++j) lanes[j] = mul_add(widen(a[i]), b[i], lanes[j]);
  return sum_lanes(lanes);
}

template <class R>
static inline double sum(const R* a, int64_t n) {
  alignas(64) R lanes[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int j = 0; j < kSums; ++j) lanes[j] += a[i + j];
  for (int j = 0; i < n; ++i, ++j) lanes[j] += a[i];
  return sum_lanes(lanes);
}

// The sum of rho over a row's residuals, which become rho'(r) / 2.
template <Penalty kPenalty, class R>
static inline double penalise(R delta, R* residual, int64_t n) {
  if constexpr (kPenalty == Penalty::mse) return dot(residual, residual, n);  // its own half slope
  const Rho<kPenalty, R> rho = {delta};
  alignas(64) R values[kSegment];
  for (int64_t i = 0; i < n; ++i) values[i] = rho.value(residual[i]);
  for (int64_t i = 0; i < n; ++i) residual[i] = rho.half_slope(residual[i]);
  return sum(values, n);
}

// The same where each rho is multiplied by a weight.
template <Penalty kPenalty, class R>
static inline double penalise_weighed(R delta, const R* weights, R* residual, int64_t n) {
  const Rho<kPenalty, R> rho = {delta};
  alignas(64) R values[kSegment];
  for (int64_t i = 0; i < n; ++i) values[i] = weights[i] * rho.value(residual[i]);
  for (int64_t i = 0; i < n; ++i) residual[i] = weights[i] * rho.half_slope(residual[i]);
  return sum(values, n);
}

template <class R>
static inline double penalise_weighed(Penalty penalty, R delta, const R* weights, R* residual, int64_t n) {
  switch (penalty) {
#define DAE_CASE(X) \
  case Penalty::X: return penalise_weighed<Penalty::X>(delta, weights, residual, n);
    DAE_PENALTIES(DAE_CASE)
#undef DAE_CASE
  }
  return 0;
}

template <class R>
static inline double penalise(Penalty penalty, R delta, R* residual, int64_t n) {
  switch (penalty) {
#define DAE_CASE(X) \
  case Penalty::X: return penalise<Penalty::X>(delta, residual, n);
    DAE_PENALTIES(DAE_CASE)
#undef DAE_CASE
  }
  return 0;
}

template <class T>
static void residual_units(const ResidualWork& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  alignas(64) T preds[kSegment], ys[kSegment], grads[kSegment];
  alignas(64) R zs[kSegment], residual[kSegment], weighing[kSegment];
  alignas(64) uint8_t masks[kSegment];
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t segment) {
    const T* pred = read<T>(a.batch, a.pred, unit, preds);
    const T* y = read<T>(a.batch, a.y, unit, ys);
    const R* z = read_z<T>(a.batch, a.z, a.noise, unit, zs);
    const bool masked = !a.weighs && (a.mask.data || a.choice.noise.present);
    const uint8_t* mask = masked ? read_mask(a.batch, a.mask, a.choice, unit, masks) : nullptr;
    const R* weights = a.weighs ? read<R>(a.batch, a.mask, unit, weighing) : nullptr;
    const Output<T> grad = a.grad.data ? target<T>(a.batch, a.grad, unit, grads) : Output<T>{};
    for (int64_t r = 0; r < unit.rows; ++r) {
      const int64_t at = r * unit.length, n = unit.length;
      const Coefficients<R> c = coefficients<R>(a.table, unit.row + r);
      const R n1 = c[a.columns[0]], n2 = c[a.columns[1]];
      if (a.columns[1] == kAbsent)
        fill<R, T>(at, residual, n, [=](auto of) { return affine(of(R(1)), of(pred), of(n1), of(y)); });
      else
        fill<R, T>(at, residual, n, [=](auto of) { return affine(of(R(1)), of(pred), of(n1), of(y), of(n2), of(z)); });
      // A select, not a product: what is masked out may be NaN.
      if (masked)
        for (int64_t i = 0; i < n; ++i) residual[i] = mask[at + i] ? residual[i] : R(0);
      const R delta = c[a.columns[2]];
      if (weights)
        a.sums[segment + r] = penalise_weighed(a.penalty, delta, weights + at, residual, n);
      else if (a.summed || a.penalty != Penalty::mse)  // whose residual is its own half slope
        a.sums[segment + r] = penalise(a.penalty, delta, residual, n);
      const R scale = static_cast<R>(a.scale[unit.row + r]);
      if (grad)
        (grad + at).put(n, [&](int64_t from, T* to, int64_t m) {
          if (unit.streams) read_ahead(pred + at + from + kSegment, m), read_ahead(y + at + from + kSegment, m);
          const R* slopes = residual;
          fill<R>(from, to, m, [=](auto of) { return of(scale) * of(slopes); });
        });
    }
    if (grad) write<T>(a.batch, a.grad, unit, grad);
  });
}

template <class T>
static void row_dots_units(const RowDotsWork& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  using L = typename LoopType<T>::type;
  alignas(64) L xs[kSegment], ys[kSegment];
  alignas(64) R gs[kSegment], zs[kSegment];
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t segment) {
    const R* g = read<T>(a.batch, a.g, unit, gs);
    const L* x = read<T>(a.batch, a.x, unit, xs);
    const L* y = read<T>(a.batch, a.y, unit, ys);
    const R* z = read_z<T>(a.batch, a.z, a.noise, unit, zs);
    for (int64_t r = 0; r < unit.rows; ++r) {
      const int64_t at = r * unit.length;
      double* sums = a.sums + 3 * (segment + r);
      sums[0] = a.x.data ? dot(x + at, g + at, unit.length) : 0;
      sums[1] = a.y.data ? dot(y + at, g + at, unit.length) : 0;
      sums[2] = a.z.data || a.noise.present ? dot(z + at, g + at, unit.length) : 0;
    }
  });
}

static void mask_count(const MaskCountWork& a, int64_t unit_begin, int64_t unit_end) {
  alignas(64) uint8_t buffer[kSegment];
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t segment) {
    const uint8_t* mask = read_mask(a.batch, a.mask, a.choice, unit, buffer);
    for (int64_t r = 0; r < unit.rows; ++r) {
      int64_t kept = 0;
      for (int64_t i = 0; i < unit.length; ++i) kept += mask[r * unit.length + i] != 0;
      a.counts[segment + r] = kept;
    }
  });
}

template <class T>
static void corrupt_units(const CorruptArgs& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  using L = typename LoopType<T>::type;
  alignas(64) L xs[kSegment], outs[kSegment];
  alignas(64) uint32_t words[kSegment];
  const R low = static_cast<R>(a.low), high = static_cast<R>(a.high);
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t) {
    const L* x = read<T>(a.batch, a.x, unit, xs);
    const Output<L> out = target<T>(a.batch, a.out, unit, outs);
    generate_words(a.choice.noise, unit, words);
    for (int64_t r = 0; r < unit.rows; ++r) {
      const int64_t at = r * unit.length;
      const int64_t row = unit.row + r, first = a.choice.threshold(row, 0), second = a.choice.threshold(row, 1);
      (out + at).put(unit.length, [&](int64_t from, L* to, int64_t m) {
#pragma GCC ivdep
        for (int64_t i = 0; i < m; ++i) {
          const int64_t k = at + from + i;
          const R own = widen(x[k]), replaced = words[k] < first ? low : high;
          narrow(words[k] < second ? replaced : own, to[i]);
        }
      });
    }
    write<T>(a.batch, a.out, unit, out);
  });
}

// Of doubles by themselves: the library's exponential would keep all else from vectors. Floats have their own beside it.
template <class L, class R>
static void exponentials_of_halves(const L* log_var, R* out, int64_t n) {
  if constexpr (sizeof(R) == sizeof(double))
    for (int64_t i = 0; i < n; ++i) out[i] = exponential(R(0.5) * widen(log_var[i]));
}
static inline Growth<float> grown(float log_var, float) { return growth(0.5f * log_var); }
static inline Growth<double> grown(double log_var, double exponential) { return growth(0.5 * log_var, exponential); }

template <class T>
static void gaussian_units(const GaussianWork& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  using L = typename LoopType<T>::type;
  alignas(64) L mus[kSegment], log_vars[kSegment], outs[kSegment];
  alignas(64) R es[kSegment], divergence[kSegment];
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t segment) {
    const L* mu = read<T>(a.batch, a.mu, unit, mus);
    const L* log_var = read<T>(a.batch, a.log_var, unit, log_vars);
    const R* eps = read_z<T>(a.batch, a.eps, a.noise, unit, es);
    const Output<L> z = target<T>(a.batch, a.z, unit, outs);
    const int64_t n = unit.count();
    exponentials_of_halves(log_var, divergence, n);
    z.put(n, [&](int64_t from, L* to, int64_t m) {
#pragma GCC ivdep
      for (int64_t i = 0; i < m; ++i) {
        const int64_t k = from + i;
        const Gaussian<R> g(widen(mu[k]), grown(widen(log_var[k]), divergence[k]));
        divergence[k] = g.kl();
        narrow(g.sample(eps[k]), to[i]);
      }
    });
    for (int64_t r = 0; r < unit.rows; ++r)
      a.sums[segment + r] = sum(divergence + r * unit.length, unit.length);
    write<T>(a.batch, a.z, unit, z);
  });
}

template <class T>
static void gaussian_grad_units(const GaussianGradArgs& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  using L = typename LoopType<T>::type;
  alignas(64) L mus[kSegment], log_vars[kSegment], grads[kSegment], outs[kSegment], outs2[kSegment];
  alignas(64) R es[kSegment], exponentials[kSegment];
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t) {
    const L* mu = read<T>(a.batch, a.mu, unit, mus);
    const L* log_var = read<T>(a.batch, a.log_var, unit, log_vars);
    const L* z_grad = read<T>(a.batch, a.z_grad, unit, grads);
    const R* eps = read_z<T>(a.batch, a.eps, a.noise, unit, es);
    const Output<L> mu_grad = target<T>(a.batch, a.mu_grad, unit, outs);
    const Output<L> log_var_grad = target<T>(a.batch, a.log_var_grad, unit, outs2);
    exponentials_of_halves(log_var, exponentials, unit.count());
    for (int64_t r = 0; r < unit.rows; ++r) {
      const R kl_grad = a.kl_grad ? static_cast<const R*>(a.kl_grad)[unit.row + r] : R(0);
#pragma GCC ivdep
      for (int64_t i = r * unit.length; i < (r + 1) * unit.length; ++i) {
        const Gaussian<R> g(widen(mu[i]), grown(widen(log_var[i]), exponentials[i]));
        narrow(g.mu_grad(widen(z_grad[i]), kl_grad), mu_grad.data[i]);
        narrow(g.log_var_grad(widen(z_grad[i]), kl_grad, eps[i]), log_var_grad.data[i]);
      }
    }
    write<T>(a.batch, a.mu_grad, unit, mu_grad);
    write<T>(a.batch, a.log_var_grad, unit, log_var_grad);
  });
}

static void bits(const BitsArgs& a, int64_t unit_begin, int64_t unit_end) {
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t) {
    int64_t* out = a.out + unit.row * a.batch.D + unit.begin;
    generate<ToWord<int64_t>>(a.noise, unit, out);
    if (a.below >> 32) return;
    for (int64_t i = 0; i < unit.count(); ++i) out[i] = a.scaled(static_cast<uint32_t>(out[i]));
  });
}

// The sum of a number of each lane, as a GPU's butterfly adds it.
static float sum_of_lanes(float (&v)[kMaxChainLanes], int lanes) {
  for (int apart = lanes / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; ++i) v[i] += v[i + apart];
  return v[0];
}

// A unit's rows take a step at a time together: the noise is made for all of them at once.
static void chain(const ChainArgs& a, int64_t unit_begin, int64_t unit_end) {
  constexpr int kWidth = kOfLane * kMaxChainLanes;
  const Batch batch{a.B, a.D, 0, nullptr, Dtype::f32};
  const int lanes = chain_lanes(a.D), width = kOfLane * lanes;
  alignas(64) float z[kSegment], states[kSegment];
  for_each_unit(batch, unit_begin, unit_end, [&](const Unit& unit, int64_t) {
    memcpy(states, a.x + unit.row * a.D, unit.count() * sizeof(float));
    Noise noise = a.noise;
    for (int64_t step = 0; step < a.steps; ++step) {
      noise.key = fold_in(a.noise.key, static_cast<uint64_t>(step));
      generate<ToNormal>(noise, unit, z);
      if (!a.components) {
        for (int64_t i = 0; i < unit.count(); ++i)
          states[i] = affine(1.0f, states[i], a.step, double_well(states[i], a.slope, a.square), a.spread, z[i]);
        continue;
      }
      for (int64_t r = 0; r < unit.rows; ++r) {
        alignas(64) float x[kWidth] = {}, by[kWidth], next_by[kWidth];
        float* const state = states + r * a.D;
        memcpy(x, state, a.D * sizeof(float));
        // One component's pull on all lanes; returns its log density.
        const auto pull = [&](int k, float (&into)[kWidth]) {
          const float *mean = a.means + k * width, *precision = a.precisions + k * width;
          float squares[kMaxChainLanes];
          for (int lane = 0; lane < lanes; ++lane) {
            const int first = kOfLane * lane;
            const Pull found(mean + first, precision + first, *reinterpret_cast<float(*)[kOfLane]>(x + first));
            memcpy(into + first, found.by, sizeof(found.by));
            squares[lane] = found.square;
          }
          return log_density(a.log_weights[k], sum_of_lanes(squares, lanes));
        };
        MixtureWeights weights(pull(0, by));
        for (int k = 1; k < a.components; ++k) {
          const Balance balance = weights.add(pull(k, next_by));
          for (int i = 0; i < width; ++i) by[i] = mul_add(balance.next, next_by[i], balance.old * by[i]);
        }
        const float* const eps = z + r * a.D;
        const float share = 1.0f / weights.total;  // 1 of one component
        for (int64_t i = 0; i < a.D; ++i) {
          state[i] = affine(1.0f, x[i], a.step, by[i] * share, a.spread, eps[i]);
        }
      }
    }
    memcpy(a.out + unit.row * a.D, states, unit.count() * sizeof(float));
  });
}

static void normal_sum(const NormalSumArgs& a, int64_t unit_begin, int64_t unit_end) {
  const Batch batch{a.B, a.D, 0, nullptr, Dtype::f32};
  alignas(64) float z[kSegment], sums[kSegment];
  for_each_unit(batch, unit_begin, unit_end, [&](const Unit& unit, int64_t) {
    Noise noise = a.noise;
    for (int64_t i = 0; i < unit.count(); ++i) sums[i] = 0;
    for (int k = 0; k < a.terms; ++k) {
      noise.key = fold_in(a.noise.key, a.nodes[k]);
      generate<ToNormal>(noise, unit, z);
      for (int64_t i = 0; i < unit.count(); ++i) sums[i] = affine(1.0f, sums[i], a.weights[k], z[i]);
    }
    memcpy(a.out + unit.row * a.D + unit.begin, sums, unit.count() * sizeof(float));
  });
}

// A unit is of the pairs (B, D / 2): each gives a sine and a cosine.
template <class T>
static void embedding_units(const EmbeddingArgs& a, int64_t unit_begin, int64_t unit_end) {
  const int64_t D = a.batch.D, half = D / 2;
  const Batch pairs{a.batch.B, half, 0, nullptr, Dtype::f64};
  alignas(64) double turns[kSegment];
  alignas(64) float sines[kSegment], cosines[kSegment];
  for_each_unit(pairs, unit_begin, unit_end, [&](const Unit& unit, int64_t) {
    const int64_t n = unit.length;
    for (int64_t row = unit.row; row < unit.row + unit.rows; ++row) {
      for (int64_t i = 0; i < n; ++i) turns[i] = 0;
      for (int64_t k = 0; k < a.K; ++k) {
        const double x = a.x[row * a.K + k], *W = a.W + k * half + unit.begin;
        for (int64_t i = 0; i < n; ++i) turns[i] = mul_add(x, W[i], turns[i]);
      }
      const Unit of_sine{row, 1, unit.begin + (a.flip ? half : 0), n};
      const Unit of_cosine{row, 1, unit.begin + (a.flip ? 0 : half), n};
      const Output<float> sine = target<T>(a.batch, a.out, of_sine, sines);
      const Output<float> cosine = target<T>(a.batch, a.out, of_cosine, cosines);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        sincos_2pi(turns[i], sine.data[i], cosine.data[i]);
      }
      write<T>(a.batch, a.out, of_sine, sine);
      write<T>(a.batch, a.out, of_cosine, cosine);
      if (D % 2 && unit.begin + n == half) {
        const Unit last{row, 1, D - 1, 1};
        float zero;
        const Output<float> at = target<T>(a.batch, a.out, last, &zero);
        *at.data = 0;
        write<T>(a.batch, a.out, last, at);
      }
    }
  });
}

// Sums over the rows of value(row, element), a segment of the columns at a time.
template <class T, class Value>
static inline void sum_columns(const Batch& batch, const Operand& x, double* out, int64_t unit_begin, int64_t unit_end,
                               Value value) {
  using R = typename ComputeType<T>::type;
  alignas(64) R buffer[kSegment];
  alignas(64) double sums[kSegment];
  for (int64_t begin = unit_begin * kSegment; begin < unit_end * kSegment; begin += kSegment) {
    const int64_t left = batch.D - begin, n = left < kSegment ? left : kSegment;
    for (int64_t i = 0; i < n; ++i) sums[i] = 0;
    for (int64_t row = 0; row < batch.B; ++row) {
      const R* of_row = read<T>(batch, x, Unit{row, 1, begin, n, false}, buffer);
      for (int64_t i = 0; i < n; ++i) sums[i] += value(row, of_row[i]);
    }
    memcpy(out + begin, sums, n * sizeof(double));
  }
}

template <class T>
static void column_sums_units(const ColumnSumsArgs& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  sum_columns<T>(a.batch, a.x, a.sums, unit_begin, unit_end, [](int64_t, R x) { return static_cast<double>(x); });
}

template <class T>
static void contraction_units(const ContractionWork& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  using L = typename LoopType<T>::type;
  alignas(64) L hs[kSegment];
  alignas(64) R values[kSegment];
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t segment) {
    const L* h = read<T>(a.batch, a.h, unit, hs);
    const R* squares = static_cast<const R*>(a.squares) + unit.begin;
    for (int64_t i = 0; i < unit.count(); ++i) values[i] = SquaredSlope<R>(widen(h[i])).value();
    for (int64_t r = 0; r < unit.rows; ++r)
      a.sums[segment + r] = dot(values + r * unit.length, squares, unit.length);
  });
}

template <class T>
static void contraction_grad_units(const ContractionGradArgs& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  using L = typename LoopType<T>::type;
  alignas(64) L hs[kSegment], grads[kSegment];
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t) {
    const L* h = read<T>(a.batch, a.h, unit, hs);
    const R* squares = static_cast<const R*>(a.squares) + unit.begin;
    const Output<L> grad = target<T>(a.batch, a.h_grad, unit, grads);
    for (int64_t r = 0; r < unit.rows; ++r) {
      const int64_t at = r * unit.length;
      const R twice = static_cast<R>(2 * a.upstream[unit.row + r]);
      (grad + at).put(unit.length, [=](int64_t from, L* to, int64_t m) {
#pragma GCC ivdep
        for (int64_t i = 0; i < m; ++i)
          narrow(twice * squares[from + i] * SquaredSlope<R>(widen(h[at + from + i])).half_grad(), to[i]);
      });
    }
    write<T>(a.batch, a.h_grad, unit, grad);
  });
}

template <class T>
static void squares_grad_units(const ContractionGradArgs& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  sum_columns<T>(a.batch, a.h, a.squares_grad, unit_begin, unit_end, [&](int64_t row, R h) {
    return a.upstream[row] * static_cast<double>(SquaredSlope<R>(h).value());
  });
}

// A row of a bound's table: the logarithm r of the variances' ratio is start + slope * v.
template <class R>
struct BoundRow {
  R start, slope, scale;
  BoundRow(const BoundArgs& a, int64_t row) {
    const R* c = static_cast<const R*>(a.table) + row * kBoundColumns;
    start = a.is_log ? c[kSmall] : -c[kHalfWidth];  // of the range's middle + half width * v: without what cancels
    slope = a.is_log ? R(-1) : -c[kHalfWidth];
    scale = c[kScale];
  }
  StepDivergence<R> at(R away, R v) const { return {scale, away, mul_add(slope, v, start)}; }
};

template <class T>
static void bound_units(const BoundWork& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  using L = typename LoopType<T>::type;
  alignas(64) L vs[kSegment];
  alignas(64) R nats[kSegment];
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t segment) {
    const L* v = read<T>(a.batch, a.v, unit, vs);
    const R* away = static_cast<const R*>(a.away) + unit.row * a.batch.D + unit.begin;
    const int64_t n = unit.length;
    for (int64_t r = 0; r < unit.rows; ++r, v += n, away += n) {
      const BoundRow<R> row(a, unit.row + r);
      for (int64_t i = 0; i < n; ++i) nats[i] = row.at(away[i], widen(v[i])).nats();
      a.sums[segment + r] = sum(nats, n);
    }
  });
}

template <class T>
static void bound_grad_units(const BoundGradArgs& a, int64_t unit_begin, int64_t unit_end) {
  using R = typename ComputeType<T>::type;
  using L = typename LoopType<T>::type;
  alignas(64) L vs[kSegment], grads[kSegment];
  for_each_unit(a.batch, unit_begin, unit_end, [&](const Unit& unit, int64_t) {
    const int64_t first = unit.row * a.batch.D + unit.begin, n = unit.length;
    const L* v = read<T>(a.batch, a.v, unit, vs);
    const R* away = static_cast<const R*>(a.away) + first;
    R* away_grad = static_cast<R*>(a.away_grad) + first;
    const Output<L> v_grad = target<T>(a.batch, a.v_grad, unit, grads);
    for (int64_t r = 0; r < unit.rows; ++r) {
      const BoundRow<R> row(a, unit.row + r);
      const R upstream = static_cast<R>(a.upstream[unit.row + r]);
#pragma GCC ivdep
      for (int64_t i = r * n; i < (r + 1) * n; ++i) {
        const StepDivergence<R> step = row.at(away[i], widen(v[i]));
        away_grad[i] = step.away_grad(upstream);
        narrow(row.slope * step.ratio_grad(upstream), v_grad.data[i]);
      }
    }
    write<T>(a.batch, a.v_grad, unit, v_grad);
  });
}

// One switch over the element types for every kernel.
#define DAE_BY_DTYPE(name, Args)                                                \
  static void name(const Args& a, int64_t unit_begin, int64_t unit_end) {       \
    switch (a.batch.dtype) {                                                    \
      case Dtype::f32: return name##_units<float>(a, unit_begin, unit_end);     \
      case Dtype::f64: return name##_units<double>(a, unit_begin, unit_end);    \
      case Dtype::bf16: return name##_units<BFloat16>(a, unit_begin, unit_end); \
      case Dtype::f16: return name##_units<Half>(a, unit_begin, unit_end);      \
    }                                                                           \
  }
DAE_BY_DTYPE(affine, AffineArgs)
DAE_BY_DTYPE(residual, ResidualWork)
DAE_BY_DTYPE(row_dots, RowDotsWork)
DAE_BY_DTYPE(corrupt, CorruptArgs)
DAE_BY_DTYPE(gaussian, GaussianWork)
DAE_BY_DTYPE(gaussian_grad, GaussianGradArgs)
DAE_BY_DTYPE(embedding, EmbeddingArgs)
DAE_BY_DTYPE(column_sums, ColumnSumsArgs)
DAE_BY_DTYPE(contraction, ContractionWork)
DAE_BY_DTYPE(contraction_grad, ContractionGradArgs)
DAE_BY_DTYPE(squares_grad, ContractionGradArgs)
DAE_BY_DTYPE(bound, BoundWork)
DAE_BY_DTYPE(bound_grad, BoundGradArgs)
#undef DAE_BY_DTYPE

}  // namespace DAE_ISA

const Kernels DAE_JOIN(kernels_, DAE_ISA) = {DAE_ISA::affine, DAE_ISA::residual, DAE_ISA::row_dots,
                                             DAE_ISA::mask_count, DAE_ISA::corrupt, DAE_ISA::gaussian,
                                             DAE_ISA::gaussian_grad, DAE_ISA::bits, DAE_ISA::chain, DAE_ISA::normal_sum,
                                             DAE_ISA::embedding, DAE_ISA::column_sums, DAE_ISA::contraction,
                                             DAE_ISA::contraction_grad, DAE_ISA::squares_grad, DAE_ISA::bound,
                                             DAE_ISA::bound_grad};

}  // namespace dae::cpu
