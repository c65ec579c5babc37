// The CPU's table of functions: cuts the work, shares it among threads, adds up what they found.

#include <cmath>
#include <new>
#include <stdexcept>
#include <vector>

#include "../api.h"
#include "dispatch.h"

namespace dae::cpu {

namespace {

// Of one core, for each element in cache: the map, the residual with its sum and gradient, a normal, a map with an exponential;
// a sine with its cosine, in double.
constexpr double kNsMap = 0.12, kNsResidual = 0.22, kNsNormal = 0.7, kNsExponential = 0.5,
                 kNsSinCos = 2;

template <class Args>
void launch(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, double ns_per_element) {
  const Cut cut(args.batch.B, args.batch.D);
  const double work = static_cast<double>(args.batch.B) * static_cast<double>(args.batch.D) * ns_per_element;
  parallel_for(cut.units, work, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The same of a kernel whose units are kSegment columns of all rows.
template <class Args>
void launch_columns(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, double ns_per_element) {
  const double work = static_cast<double>(args.batch.B) * static_cast<double>(args.batch.D) * ns_per_element;
  parallel_for((args.batch.D + kSegment - 1) / kSegment, work,
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

double of_noise(const Noise& noise) { return noise.present ? kNsNormal : 0; }

// What it does may need memory: an exception would leave through C, and perhaps without the GIL.
template <class Work>
const char* done(const Work& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const std::length_error&) {  // a vector of more than there can be
    return kNoMemory;
  }
}

// Neumaier 1974: a sum with what its additions have rounded off beside it. A million sums one after another would be
// off by a million roundings.
struct Sum {
  double value = 0, rest = 0;
  void operator+=(double term) {
    const double sum = value + term;
    rest += std::abs(value) >= std::abs(term) ? (value - sum) + term : (term - sum) + value;
    value = sum;
  }
  // An infinite sum has no rest.
  operator double() const { return std::isfinite(value) ? value + rest : value; }
};

// Calls done(row, sum of its segments).
template <class N, class Done>
void sum_rows(const std::vector<N>& sums, int64_t B, Done done) {
  const int64_t segments = B ? static_cast<int64_t>(sums.size()) / B : 0;
  for (int64_t b = 0; b < B; ++b) {
    Sum sum;
    for (int64_t s = 0; s < segments; ++s) sum += static_cast<double>(sums[b * segments + s]);
    done(b, static_cast<double>(sum));
  }
}

const char* affine(const AffineArgs& a, Queue) {
  expect_writes(a.batch, a.out), expect_writes(a.batch, a.out2);
  launch(isa().kernels->affine, a, kNsMap + of_noise(a.noise));
  return nullptr;
}

template <class R>
void finish_loss(const std::vector<double>& sums, const ResidualArgs& a, const LossArgs& loss) {
  const int64_t B = a.batch.B;
  Sum total, also[2];
  sum_rows(sums, B, [&](int64_t b, double sum) {
    const double mean = row_mean(sum, loss.kept_of(b, a.batch.D));
    total += loss_term(loss.weight_of<R>(a.table, b), sum, mean, loss.reduction);
    for (int k = 0; k < 2; ++k) also[k] += mean * static_cast<double>(coefficient<R>(a.table, b, loss.also_columns[k]));
    if (loss.per_sample) static_cast<R*>(loss.per_sample)[b] = static_cast<R>(mean);
  });
  const double count = static_cast<double>(B);
  if (loss.loss) *static_cast<R*>(loss.loss) = static_cast<R>(loss.reduction == Reduction::mean ? total / count : static_cast<double>(total));
  for (int k = 0; loss.also && k < 2; ++k) static_cast<R*>(loss.also)[k] = static_cast<R>(also[k] / count);
}

// The sums of each row's weights.
template <class R>
std::vector<double> totals(const ResidualArgs& a) {
  const R one = 1;
  const std::vector<int64_t> nowhere(a.batch.ndim + 2);
  RowDotsArgs args{a.batch, a.mask, {const_cast<R*>(&one), nowhere.data()}, {}, {}, {}};
  args.batch.dtype = sizeof(R) == sizeof(double) ? Dtype::f64 : Dtype::f32;
  if (!args.batch.ndim) args.batch.ndim = 1, args.batch.sizes = &a.batch.D;
  const int64_t B = a.batch.B, segments = Cut(B, a.batch.D).segments_per_row;
  std::vector<double> sums(3 * B * segments), total(B);
  launch(isa().kernels->row_dots, RowDotsWork{args, sums.data()}, kNsMap);
  for (int64_t b = 0; b < B; ++b) {
    Sum sum;
    for (int64_t s = 0; s < segments; ++s) sum += sums[3 * (b * segments + s)];
    total[b] = sum;
  }
  return total;
}

template <class R>
void residual_as(const ResidualArgs& a, LossArgs loss) {
  const int64_t B = a.batch.B, D = a.batch.D;
  const double upstream = loss.upstream_as<R>();
  if (loss.only_if_scaled && upstream == 1) return;
  std::vector<double> total;
  if (a.weighs) total = totals<R>(a), loss.kept = total.data();
  std::vector<double> scale(B), sums(B * Cut(B, D).segments_per_row);
  for (int64_t b = 0; b < B; ++b)
    scale[b] = gradient_scale(loss.weight_of<R>(a.table, b), upstream, loss.kept_of(b, D), loss.reduction, B);
  expect_writes(a.batch, a.grad);
  const bool summed = loss.loss || loss.per_sample || loss.also;
  ResidualWork work{a, scale.data(), sums.data(), summed};
  launch(isa().kernels->residual, work, kNsResidual + of_noise(a.noise) + of_noise(a.choice.noise));
  if (summed) finish_loss<R>(sums, a, loss);
}

const char* residual(const ResidualArgs& a, const LossArgs& loss, Scratch, Queue) {
  return done([&] { a.batch.dtype == Dtype::f64 ? residual_as<double>(a, loss) : residual_as<float>(a, loss); });
}

const char* row_dots(const RowDotsArgs& a, double* out, Scratch, Queue) {
  return done([&] {
    const int64_t B = a.batch.B, segments = Cut(B, a.batch.D).segments_per_row;
    std::vector<double> sums(3 * B * segments);
    RowDotsWork work{a, sums.data()};
    launch(isa().kernels->row_dots, work, kNsResidual + of_noise(a.noise));
    for (int64_t b = 0; b < B; ++b)
      for (int k = 0; k < 3; ++k) {
        Sum sum;
        for (int64_t s = 0; s < segments; ++s) sum += sums[3 * (b * segments + s) + k];
        out[3 * b + k] = sum;
      }
  });
}

const char* mask_count(const MaskArgs& a, double* kept, Scratch, Queue) {
  return done([&] {
    if (!a.wanted()) return;
    const int64_t B = a.batch.B;
    std::vector<int64_t> counts(B * Cut(B, a.batch.D).segments_per_row);
    MaskCountWork work{a, counts.data()};
    launch(isa().kernels->mask_count, work, kNsMap + of_noise(a.choice.noise));
    sum_rows(counts, B, [&](int64_t b, double sum) { kept[b] = sum; });
  });
}

const char* corrupt(const CorruptArgs& a, Queue) {
  expect_writes(a.batch, a.out);
  launch(isa().kernels->corrupt, a, kNsMap + kNsNormal);
  return nullptr;
}

const char* gaussian(const GaussianArgs& a, void* kl, Scratch, Queue) {
  return done([&] {
    const int64_t B = a.batch.B;
    std::vector<double> sums(B * Cut(B, a.batch.D).segments_per_row);
    GaussianWork work{a, sums.data()};
    expect_writes(a.batch, a.z);
    launch(isa().kernels->gaussian, work, kNsExponential + of_noise(a.noise));
    const bool wide = a.batch.dtype == Dtype::f64;
    sum_rows(sums, B, [&](int64_t b, double sum) {
      if (wide)
        static_cast<double*>(kl)[b] = sum;
      else
        static_cast<float*>(kl)[b] = static_cast<float>(sum);
    });
  });
}

const char* gaussian_grad(const GaussianGradArgs& a, Queue) {
  expect_writes(a.batch, a.mu_grad), expect_writes(a.batch, a.log_var_grad);
  launch(isa().kernels->gaussian_grad, a, kNsExponential + of_noise(a.noise));
  return nullptr;
}

const char* bits(const BitsArgs& a, Queue) {
  launch(isa().kernels->bits, a, kNsNormal);
  return nullptr;
}

const char* fold_in_key(const Noise& noise, uint64_t data, const uint64_t* data_at, Key* out, Queue) {
  *out = fold_in(noise.key, data_at ? *data_at : data);
  return nullptr;
}

const char* chain(const ChainArgs& a, Queue) {
  const double work = static_cast<double>(a.B * a.D) * a.steps * (kNsNormal + kNsMap * a.components);
  parallel_for(Cut(a.B, a.D).units, work,
               [&](int64_t begin, int64_t end) { isa().kernels->chain(a, begin, end); });
  return nullptr;
}

const char* normal_sum(const NormalSumArgs& a, Queue) {
  const double work = static_cast<double>(a.B * a.D) * a.terms * kNsNormal;
  parallel_for(Cut(a.B, a.D).units, work,
               [&](int64_t begin, int64_t end) { isa().kernels->normal_sum(a, begin, end); });
  return nullptr;
}

const char* embedding(const EmbeddingArgs& a, Queue) {
  const int64_t half = a.batch.D / 2;
  const double work = static_cast<double>(a.batch.B * half) * (kNsSinCos + kNsMap * static_cast<double>(a.K));
  parallel_for(Cut(a.batch.B, half).units, work,
               [&](int64_t begin, int64_t end) { isa().kernels->embedding(a, begin, end); });
  return nullptr;
}

const char* devices(int* count) {
  *count = 1;
  return nullptr;
}

}  // namespace

void column_sums(const ColumnSumsArgs& a) {
  launch_columns(isa().kernels->column_sums, a, kNsMap);
}

void contraction(const ContractionArgs& a) {
  std::vector<double> sums(a.batch.B * Cut(a.batch.B, a.batch.D).segments_per_row);
  launch(isa().kernels->contraction, ContractionWork{a, sums.data()}, kNsResidual);
  sum_rows(sums, a.batch.B, [&](int64_t b, double sum) { a.out[b] = sum; });
}

void contraction_grad(const ContractionGradArgs& a) {
  expect_writes(a.batch, a.h_grad);
  if (a.h_grad.data) launch(isa().kernels->contraction_grad, a, kNsResidual);
  if (a.squares_grad) launch_columns(isa().kernels->squares_grad, a, kNsResidual);
}

void bound(const BoundArgs& a) {
  std::vector<double> sums(a.batch.B * Cut(a.batch.B, a.batch.D).segments_per_row);
  launch(isa().kernels->bound, BoundWork{a, sums.data()}, kNsExponential);
  sum_rows(sums, a.batch.B, [&](int64_t b, double sum) { a.out[b] = sum; });
}

void bound_grad(const BoundGradArgs& a) {
  Batch wide = a.batch;
  wide.dtype = a.batch.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  expect_writes(a.batch, a.v_grad), expect_writes(wide, {a.away_grad});
  launch(isa().kernels->bound_grad, a, kNsExponential);
}

const Api kApi = {affine,        residual, row_dots,    mask_count, corrupt, gaussian,
                  gaussian_grad, bits,     fold_in_key, devices,    nullptr, chain,
                  normal_sum,    embedding};

}  // namespace dae::cpu
