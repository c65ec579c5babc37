// How the CPU cuts work, and the kernels of one instruction set.
#pragma once

#include "../chain.h"

namespace dae::cpu {

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

struct ResidualWork : ResidualArgs {
  const double* scale;  // (B,)
  double* sums;         // one per segment
  bool summed;          // someone reads them: a gradient that is made in backward wants no loss
};
struct RowDotsWork : RowDotsArgs {
  double* sums;  // three per segment
};
struct MaskCountWork : MaskArgs {
  int64_t* counts;  // kept elements of each segment
};

struct GaussianWork : GaussianArgs {
  double* sums;  // one per segment
};

struct ContractionWork : ContractionArgs {
  double* sums;  // one per segment
};
struct BoundWork : BoundArgs {
  double* sums;  // one per segment
};

// Bytes of the last cache, as each of the processors that share it has of them; none are known of: without end.
double cache_share();

struct Kernels {
  void (*affine)(const AffineArgs&, int64_t unit_begin, int64_t unit_end);
  void (*residual)(const ResidualWork&, int64_t unit_begin, int64_t unit_end);
  void (*row_dots)(const RowDotsWork&, int64_t unit_begin, int64_t unit_end);
  void (*mask_count)(const MaskCountWork&, int64_t unit_begin, int64_t unit_end);
  void (*corrupt)(const CorruptArgs&, int64_t unit_begin, int64_t unit_end);
  void (*gaussian)(const GaussianWork&, int64_t unit_begin, int64_t unit_end);
  void (*gaussian_grad)(const GaussianGradArgs&, int64_t unit_begin, int64_t unit_end);
  void (*bits)(const BitsArgs&, int64_t unit_begin, int64_t unit_end);
  void (*chain)(const ChainArgs&, int64_t unit_begin, int64_t unit_end);
  void (*normal_sum)(const NormalSumArgs&, int64_t unit_begin, int64_t unit_end);
  void (*embedding)(const EmbeddingArgs&, int64_t unit_begin, int64_t unit_end);  // of pairs
  void (*column_sums)(const ColumnSumsArgs&, int64_t unit_begin, int64_t unit_end);  // of kSegment columns
  void (*contraction)(const ContractionWork&, int64_t unit_begin, int64_t unit_end);
  void (*contraction_grad)(const ContractionGradArgs&, int64_t unit_begin, int64_t unit_end);
  void (*squares_grad)(const ContractionGradArgs&, int64_t unit_begin, int64_t unit_end);  // of kSegment columns
  void (*bound)(const BoundWork&, int64_t unit_begin, int64_t unit_end);
  void (*bound_grad)(const BoundGradArgs&, int64_t unit_begin, int64_t unit_end);
};

// One table per instruction set; nullptr where this build has none.
extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace dae::cpu
