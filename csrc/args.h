// What a kernel is told, on the CPU and on a GPU. Filled in by bind.cpp.
#pragma once

#include <stdint.h>

#include "math.h"

namespace dae {

// The enumerations of dae_fast/kernels/spec.py, which are compared when the core is loaded.
#define DAE_ENUM(X) X,
#define DAE_NAME_OF(X) #X,
#define DAE_DTYPES(X) X(f32) X(f64) X(bf16) X(f16)
// rho(r): r^2, |r|, Huber's, or 2 delta (sqrt(r^2 + delta^2) - delta).
#define DAE_PENALTIES(X) X(mse) X(l1) X(huber) X(pseudo_huber)
#define DAE_REDUCTIONS(X) X(none) X(mean) X(sum)

enum class Dtype : int { DAE_DTYPES(DAE_ENUM) };
enum class Penalty : int { DAE_PENALTIES(DAE_ENUM) };
enum class Reduction : int { DAE_REDUCTIONS(DAE_ENUM) };
constexpr const char* kDtypes[] = {DAE_DTYPES(DAE_NAME_OF)};
constexpr const char* kPenalties[] = {DAE_PENALTIES(DAE_NAME_OF)};
constexpr const char* kReductions[] = {DAE_REDUCTIONS(DAE_NAME_OF)};

// strides == nullptr: contiguous (B, D). Else strides[0] is the batch stride and strides[1..] go
// with Batch::sizes, in elements; 0 for an expanded dimension.
struct Operand {
  void* data = nullptr;
  const int64_t* strides = nullptr;
};

constexpr int64_t kBlock = 4;  // elements of a Philox block

// B rows of D elements each; the sizes of a row's dimensions serve the strided operands.
struct Batch {
  int64_t B, D;
  int ndim;
  const int64_t* sizes;
  Dtype dtype;
};

constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Sample b has key fold_in(key, sample[b]), or `key` itself when fold is false (a raw stream). A GPU reads
// the key through key_at where that is set: a captured graph then sees new keys.
// A sample is one row of the batch, or rows_per_sample of them (a video's frames); its rows begin at block first_block
// of its stream and every blocks_per_row further on.
struct Noise {
  bool present = false, fold = true;
  Key key{};
  const Key* key_at = nullptr;
  const int64_t* sample = nullptr;  // nullptr: first_sample + b
  uint64_t first_sample = 0;
  int64_t rows_per_sample = 1;
  uint64_t first_block = 0, blocks_per_row = 0;

  DAE_FN uint64_t sample_of(int64_t row) const {
    if (rows_per_sample != 1) row /= rows_per_sample;
    return sample ? static_cast<uint64_t>(sample[row]) : first_sample + static_cast<uint64_t>(row);
  }
  DAE_FN uint64_t block_of(int64_t row) const {
    return rows_per_sample == 1 ? first_block
                                : first_block + static_cast<uint64_t>(row % rows_per_sample) * blocks_per_row;
  }
  // The stream of one row, at whose block 0 it begins.
  DAE_FN Key key_of(const Key& stream, int64_t row) const {
    if (!fold) return stream;
    Key own = fold_in(stream, sample_of(row));
    own.offset += block_of(row);
    return own;
  }
};

constexpr int kAbsent = -1;  // a column number: this coefficient is 0, and what it is about not read
constexpr int kBlend = -2;   // that of y and of w where the sum of x and z is blended into w by y

constexpr int kMaxConstants = 16;

// (rows, columns) coefficients in the compute type. Row b reads table[index[b]], table[b], or
// table[0] when there is one row.
struct Table {
  const void* data;  // nullptr: `constants` is the one row
  int64_t rows, columns;
  const void* index;  // int64 or int32, or nullptr
  bool index_is_int64;
  double constants[kMaxConstants];  // in the launch itself: no memory that a captured graph would have to keep
};

// Column `column` of row b; NaN where the level lies outside the table.
template <class R>
DAE_FN R coefficient(const Table& table, int64_t b, int column) {
  if (column == kAbsent) return R(-0.0);  // times 0 it is -0, which changes no sum, not even of zeros
  if (!table.data) return static_cast<R>(table.constants[column]);
  int64_t i = table.rows == 1 ? 0 : b;
  if (table.index) {
    i = table.index_is_int64 ? static_cast<const int64_t*>(table.index)[b] : static_cast<const int32_t*>(table.index)[b];
    if (i < 0 || i >= table.rows) return static_cast<R>(bits_as<float>(0x7fc00000u));
  }
  return static_cast<const R*>(table.data)[i * table.columns + column];
}


// A row's dimensions, merged where they can be, are no more than this on a GPU.
constexpr int kMaxDims = 8;

struct AffineArgs {
  Batch batch;
  Operand x, y, z, w, out, out2;
  Noise noise;  // takes z's place when present
  Table table;
  int columns[8];  // c0 c1 c2 c3 of out, then of out2
  bool clamped;
  int inner[3];  // columns of a0, a1, a3
  double lo, hi;
  // On the CPU also its gradient: in the estimate's place stands, within the bounds, gate[0]*z + gate[1]*v, else 0.
  bool gates = false;
  int gate[2] = {kAbsent, kAbsent};
  bool blends = false;  // out = blend(y, c0*x + c2*z, w); c1 and c3 are absent
  // Of five streams: one more, out += c4*v, whose place fresh noise then takes.
  bool five = false;
  Operand v;
  int fifth[2] = {kAbsent, kAbsent};  // c4 of out, of out2
};

// Elements chosen by the words of a noise stream: word < thresholds[row][0], and word < thresholds[row][1].
// No stream: nothing is chosen so.
struct Choice {
  Noise noise;
  const int64_t* thresholds = nullptr;  // (rows, 2), in [0, 2^32]; nullptr: `constants` is the one row
  int64_t rows = 1;
  bool keeps = false;  // of a mask: what counts are the elements that are left
  int64_t constants[2] = {};

  DAE_FN int64_t threshold(int64_t row, int k) const {
    return thresholds ? thresholds[(rows == 1 ? 0 : 2 * row) + k] : constants[k];
  }
  DAE_FN bool counts(uint32_t word, int64_t second) const { return (word < second) != keeps; }
};

// A mask in memory, as bytes, or drawn.
struct MaskArgs {
  Batch batch;
  Operand mask;
  Choice choice;
  const void* upstream = nullptr;  // of the gradient that the counts are for, which is not made again where it is 1
  bool upstream_is_double = false;

  DAE_FN bool wanted() const {
    if (!upstream) return true;
    return upstream_is_double ? *static_cast<const double*>(upstream) != 1 : *static_cast<const float*>(upstream) != 1;
  }
};

// r = pred + n1*y + n2*z where the mask has it, else 0; rho(r) summed; when grad.data is set,
// grad = scale of the row * rho'(r) / 2.
struct ResidualArgs {
  Batch batch;
  Operand pred, y, z, mask, grad;  // mask holds bytes
  Choice choice;                   // takes mask's place when present
  bool weighs = false;             // on the CPU: mask holds numbers of the compute type, which multiply rho
  Noise noise;
  Table table;
  int columns[3];  // n1, n2, delta
  Penalty penalty;
};

// x, or `low` below a row's first threshold, or `high` below its second.
struct CorruptArgs {
  Batch batch;
  Operand x, out;
  Choice choice;
  double low, high;
};

struct LossArgs {
  Reduction reduction;
  const void* weight;  // (B,) fp32 or fp64, or nullptr
  bool weight_is_double;
  const double* kept;    // (B,) where there is a mask
  const void* upstream;  // one number of the compute type, or nullptr for 1
  bool only_if_scaled;   // leave everything as it is when *upstream is 1
  void *per_sample, *loss;  // of the compute type; nullptr: not wanted
  // Columns of the residual's table: one more factor of the weight, and the factors of two further means over the
  // batch of the samples' means, (2,) of the compute type where they are wanted.
  int weight_column = kAbsent, also_columns[2] = {kAbsent, kAbsent};
  void* also = nullptr;

  template <class R>
  DAE_FN double weight_of(const Table& table, int64_t row) const {
    double w = 1;
    if (weight)
      w = weight_is_double ? static_cast<const double*>(weight)[row]
                           : static_cast<double>(static_cast<const float*>(weight)[row]);
    return weight_column == kAbsent ? w : w * static_cast<double>(coefficient<R>(table, row, weight_column));
  }
  DAE_FN double kept_of(int64_t row, int64_t D) const { return kept ? kept[row] : static_cast<double>(D); }
  template <class R>
  DAE_FN double upstream_as() const {
    return upstream ? static_cast<double>(*static_cast<const R*>(upstream)) : 1;
  }
};

// The gradient's scale, 2 d loss / d rho of one row.
DAE_FN double gradient_scale(double weight, double upstream, double kept, Reduction reduction, int64_t B) {
  const double each = reduction == Reduction::sum ? 1 : (kept == 0 ? 0 : 1 / kept);
  return 2 * weight * upstream * each / (reduction == Reduction::mean ? static_cast<double>(B) : 1);
}

// The mean of a row's rho(r), given their sum, and what they add to the loss.
DAE_FN double row_mean(double sum, double kept) { return kept == 0 ? 0 : sum / kept; }
DAE_FN double loss_term(double weight, double sum, double mean, Reduction reduction) {
  return weight * (reduction == Reduction::sum ? sum : mean);
}

// Sums over each row of g*x, g*y, g*z: the gradient of an affine map's coefficients.
struct RowDotsArgs {
  Batch batch;
  Operand g, x, y, z;
  Noise noise;
};

// z = mu + e^(log_var / 2) * eps.
struct GaussianArgs {
  Batch batch;
  Operand mu, log_var, eps, z;
  Noise noise;  // takes eps's place when present
};

// The gradients of mu and log_var from those of z and of each row's divergence (of the compute type).
struct GaussianGradArgs {
  Batch batch;
  Operand mu, log_var, eps, z_grad, mu_grad, log_var_grad;
  Noise noise;
  const void* kl_grad;
};

struct BitsArgs {
  Batch batch;
  Noise noise;
  int64_t* out;    // (B, D)
  uint64_t below;  // a word w becomes floor(w * below / 2^32); 2^32: w itself

  DAE_FN int64_t scaled(uint32_t word) const { return static_cast<int64_t>(word * below >> 32); }
};

// Over the batch, in double, from the first row to the last.
struct ColumnSumsArgs {
  Batch batch;
  Operand x;
  double* sums;  // (D,)
};

// A code h against the squares (D,), of the compute type, of its units' weights: out[b] is the sum over j of
// squares[j] * (h_bj (1 - h_bj))^2.
struct ContractionArgs {
  Batch batch;
  Operand h;
  const void* squares;
  double* out;  // (B,)
};

// The gradients of h and, where there is room for them, of the squares, from those of each row.
struct ContractionGradArgs {
  Batch batch;
  Operand h, h_grad;
  const void* squares;
  const double* upstream;  // (B,)
  double* squares_grad;    // (D,) or nullptr
};

// A step's divergence (StepDivergence) summed over each row, in nats: row b has the coefficients table[b], of the compute
// type, by the columns below; v is of the batch's type, `away` of the compute type and contiguous.
enum BoundColumn { kSmall, kMiddle, kHalfWidth, kShare, kScale, kBoundColumns };
struct BoundArgs {
  Batch batch;
  Operand v;
  const void *away, *table;
  bool is_log;  // v is the logarithm of the variance itself
  double* out;  // (B,)
};

// The gradients of v and `away` from those of each row.
struct BoundGradArgs : BoundArgs {
  const double* upstream;  // (B,)
  Operand v_grad;
  void* away_grad;
};

// Sines and cosines of 2 pi u, u = the sum over k of x[b][k] * W[k][i], in double and rounded once to fp32: row b of out
// is [sines, cosines], the cosines first where `flip`, and a 0 at the end of an odd row.
struct EmbeddingArgs {
  Batch batch;  // of out
  Operand out;
  const double *x, *W;  // (B, K), (K, D / 2)
  int64_t K;
  bool flip;
};

}  // namespace dae
