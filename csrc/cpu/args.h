// What a CPU kernel is told. Filled in by bind.cpp, read by kernels.cpp of every instruction set.
#pragma once

#include <stdint.h>

#include "../math.h"

namespace dae::cpu {

enum class Dtype : int { f32, f64, bf16, f16 };

// strides == nullptr: contiguous (B, D). Else strides[0] is the batch stride and strides[1..] go
// with Batch::sizes, in elements; 0 for an expanded dimension.
struct Operand {
  void* data = nullptr;
  const int64_t* strides = nullptr;
};

// B rows of D elements each; the sizes of a row's dimensions serve the strided operands.
struct Batch {
  int64_t B, D;
  int ndim;
  const int64_t* sizes;
  Dtype dtype;
};

// Row b has key fold_in(key, sample[b]), or `key` itself when fold is false (a raw stream).
struct Noise {
  bool present = false, fold = true;
  Key key{};
  const int64_t* sample = nullptr;  // nullptr: first_sample + b
  uint64_t first_sample = 0;
};

// (rows, columns) coefficients in the compute type. Row b reads table[index[b]], table[b], or
// table[0] when there is one row.
struct Table {
  const void* data;
  int64_t rows, columns;
  const void* index;  // int64 or int32, or nullptr
  bool index_is_int64;
};

constexpr int kAbsent = -1;  // a column number: this coefficient is 0

struct AffineArgs {
  Batch batch;
  Operand x, y, z, out, out2;
  Noise noise;  // takes z's place when present
  Table table;
  int columns[6];  // c0 c1 c2 of out, then of out2
  bool clamped;
  int inner[2];  // columns of a0, a1
  double lo, hi;
};

// r = mask * (pred + n1*y + n2*z); sums of r^2 and, when grad.data is set, grad = scale[b] * r.
struct ResidualArgs {
  Batch batch;
  Operand pred, y, z, mask, grad;  // mask holds bytes
  Noise noise;
  Table table;
  int columns[2];       // n1, n2
  const double* scale;  // (B,)
  double* sums;         // one per segment
};

// Sums over each segment of g*x, g*y, g*z: the gradient of an affine map's coefficients.
struct RowDotsArgs {
  Batch batch;
  Operand g, x, y, z;
  Noise noise;
  double* sums;  // three per segment
};

// Kept elements of each segment.
struct MaskCountArgs {
  Batch batch;
  Operand mask;
  int64_t* counts;
};

struct BitsArgs {
  Batch batch;
  Noise noise;
  int64_t* out;  // (B, D) words
};

// Work is cut into segments: kSegment elements of a long row, or one whole short row. A unit is one
// segment of a long row, or as many short rows as fit into kSegment. The cut depends on the shape
// alone, so sums are the same for every number of threads.
constexpr int64_t kSegment = 1024;
constexpr int64_t kMaxRowsPerUnit = 256;

struct Cut {
  int64_t D, segments_per_row, rows_per_unit, units;
  DAE_FN Cut(int64_t B, int64_t row_length) : D(row_length) {
    const bool long_rows = D >= kSegment;
    segments_per_row = long_rows ? (D + kSegment - 1) / kSegment : 1;
    const int64_t fit = long_rows || D == 0 ? 1 : kSegment / D;
    rows_per_unit = fit < kMaxRowsPerUnit ? fit : kMaxRowsPerUnit;
    units = D == 0 ? 0 : (long_rows ? B * segments_per_row : (B + rows_per_unit - 1) / rows_per_unit);
  }
};

struct Kernels {
  void (*affine)(const AffineArgs&, int64_t unit_begin, int64_t unit_end);
  void (*residual)(const ResidualArgs&, int64_t unit_begin, int64_t unit_end);
  void (*row_dots)(const RowDotsArgs&, int64_t unit_begin, int64_t unit_end);
  void (*mask_count)(const MaskCountArgs&, int64_t unit_begin, int64_t unit_end);
  void (*bits)(const BitsArgs&, int64_t unit_begin, int64_t unit_end);
};

// One table per instruction set; nullptr where this build has none.
extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace dae::cpu
