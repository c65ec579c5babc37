// The Python module dae_fast._core. It knows no torch: tensors come as addresses, sizes and strides,
// already checked and of one dtype; only the level index, which is data, is checked here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace dae;
using namespace dae::cpu;

namespace {

const Isa* g_isa = &best_isa();

// Of one core, for each element in cache: the map, the residual with its sum and gradient, a normal.
constexpr double kNsMap = 0.12, kNsResidual = 0.22, kNsNormal = 0.7;
// Above this much work the GIL is released: other Python threads may run meanwhile.
constexpr double kReleaseGil = 20000;

using Strides = std::vector<int64_t>;
// Sizes of one row's dimensions and, for each operand in the order of the call, its strides with the
// batch stride first; an empty list means contiguous.
using Layout = std::optional<std::pair<Strides, std::vector<Strides>>>;
// mode (0 none, 1 rows, 2 raw stream), seed and offset as signed bits, address of a key in memory or 0, address of the
// sample ids or 0, first sample.
using NoiseSpec = std::tuple<int, int64_t, int64_t, uintptr_t, uintptr_t, int64_t>;
// address, rows, columns, address of the index or 0, whether it is int64.
using TableSpec = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t, bool>;

// Neighbouring dimensions that every strided operand walks as one become one: longer runs.
void merge_dimensions(Strides& sizes, std::vector<Strides>& strides) {
  for (size_t d = 0; d + 1 < sizes.size();) {
    bool joined = true;
    for (const Strides& s : strides)
      joined &= s.empty() || sizes[d] == 1 || s[d + 1] == s[d + 2] * sizes[d + 1];
    if (!joined) {
      ++d;
      continue;
    }
    sizes[d + 1] *= sizes[d];
    sizes.erase(sizes.begin() + d);
    for (Strides& s : strides)
      if (!s.empty()) s.erase(s.begin() + d + 1);
  }
}

// Owns what Batch and Operand point into.
struct Shape {
  Batch batch;
  Layout layout;
  size_t next = 0;

  Shape(int dtype, int64_t B, int64_t D, Layout&& given) : layout(std::move(given)) {
    batch = {B, D, 0, nullptr, static_cast<Dtype>(dtype)};
    if (!layout) return;
    merge_dimensions(layout->first, layout->second);
    batch.ndim = static_cast<int>(layout->first.size());
    batch.sizes = layout->first.data();
  }
  // Operands must be asked for in the order of the call.
  Operand operand(uintptr_t address) {
    Operand o{reinterpret_cast<void*>(address), nullptr};
    if (layout) {
      const Strides& s = layout->second[next++];
      if (!s.empty()) o.strides = s.data();
    }
    return o;
  }
};

Noise make_noise(const NoiseSpec& spec) {
  const auto& [mode, seed, offset, key, sample, first] = spec;
  Noise n;
  n.present = mode != 0;
  n.fold = mode != 2;
  const uint64_t* k = reinterpret_cast<const uint64_t*>(key);
  n.key = k ? Key{k[0], k[1]} : Key{static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
  n.sample = reinterpret_cast<const int64_t*>(sample);
  n.first_sample = static_cast<uint64_t>(first);
  return n;
}

Table make_table(const TableSpec& spec) {
  const auto& [data, rows, columns, index, is_int64] = spec;
  return {reinterpret_cast<const void*>(data), rows, columns, reinterpret_cast<const void*>(index), is_int64};
}

// The first row whose level lies outside the table, or -1.
int64_t bad_level(const Table& t, int64_t B) {
  if (!t.index) return -1;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t i =
        t.index_is_int64 ? static_cast<const int64_t*>(t.index)[b] : static_cast<const int32_t*>(t.index)[b];
    if (i < 0 || i >= t.rows) return b;
  }
  return -1;
}

template <class Args>
void launch(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, double ns_per_element) {
  const Cut cut(args.batch.B, args.batch.D);
  const double work = static_cast<double>(args.batch.B) * static_cast<double>(args.batch.D) * ns_per_element;
  std::optional<py::gil_scoped_release> release;
  if (work > kReleaseGil) release.emplace();
  parallel_for(cut.units, work, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

int64_t affine(int dtype, int64_t B, int64_t D, uintptr_t x, uintptr_t y, uintptr_t z, uintptr_t out, uintptr_t out2,
               const NoiseSpec& noise, const TableSpec& table, const std::array<int, 6>& columns,
               const std::optional<std::tuple<int, int, double, double>>& clamp, Layout layout) {
  Shape shape(dtype, B, D, std::move(layout));
  AffineArgs a{};
  a.x = shape.operand(x), a.y = shape.operand(y), a.z = shape.operand(z);
  a.out = shape.operand(out), a.out2 = shape.operand(out2);
  a.batch = shape.batch;
  a.noise = make_noise(noise);
  a.table = make_table(table);
  for (int i = 0; i < 6; ++i) a.columns[i] = columns[i];
  a.clamped = clamp.has_value();
  if (clamp) std::tie(a.inner[0], a.inner[1], a.lo, a.hi) = *clamp;
  const int64_t bad = bad_level(a.table, B);
  if (bad < 0) launch(g_isa->kernels->affine, a, kNsMap + (a.noise.present ? kNsNormal : 0));
  return bad;
}

template <class R>
void write_as(uintptr_t address, int64_t i, double value) {
  reinterpret_cast<R*>(address)[i] = static_cast<R>(value);
}

// reduction: 0 one value per sample, 1 mean over samples of each sample's mean, 2 sum.
// Writes the unweighted mean of each sample, the weighted loss and upstream * d loss / d pred, each
// where its address is not 0.
int64_t residual(int dtype, int64_t B, int64_t D, uintptr_t pred, uintptr_t y, uintptr_t z, uintptr_t mask,
                 uintptr_t grad, const NoiseSpec& noise, const TableSpec& table, const std::array<int, 2>& columns,
                 uintptr_t weight, double upstream, int reduction, uintptr_t per_sample, uintptr_t loss,
                 Layout layout) {
  Shape shape(dtype, B, D, std::move(layout));
  ResidualArgs a{};
  a.pred = shape.operand(pred), a.y = shape.operand(y), a.z = shape.operand(z);
  a.mask = shape.operand(mask), a.grad = shape.operand(grad);
  a.batch = shape.batch;
  a.noise = make_noise(noise);
  a.table = make_table(table);
  a.columns[0] = columns[0], a.columns[1] = columns[1];
  const int64_t bad = bad_level(a.table, B);
  if (bad >= 0) return bad;

  const int64_t segments = Cut(B, D).segments_per_row;
  std::vector<double> kept(B, static_cast<double>(D)), scale(B), sums(B * segments);
  if (mask) {
    std::vector<int64_t> counts(B * segments);
    launch(g_isa->kernels->mask_count, MaskCountArgs{a.batch, a.mask, counts.data()}, kNsMap);
    for (int64_t b = 0; b < B; ++b) {
      kept[b] = 0;
      for (int64_t s = 0; s < segments; ++s) kept[b] += static_cast<double>(counts[b * segments + s]);
    }
  }
  const double* w = reinterpret_cast<const double*>(weight);
  for (int64_t b = 0; b < B; ++b) {
    const double each = reduction == 2 ? 1 : (kept[b] > 0 ? 1 / kept[b] : 0);
    scale[b] = 2 * (w ? w[b] : 1) * upstream * each / (reduction == 1 ? static_cast<double>(B) : 1);
  }
  a.scale = scale.data();
  a.sums = sums.data();
  launch(g_isa->kernels->residual, a, kNsResidual + (a.noise.present ? kNsNormal : 0));

  double total = 0;
  const auto write = a.batch.dtype == Dtype::f64 ? write_as<double> : write_as<float>;
  for (int64_t b = 0; b < B; ++b) {
    double sum = 0;
    for (int64_t s = 0; s < segments; ++s) sum += sums[b * segments + s];
    const double mean = kept[b] > 0 ? sum / kept[b] : 0;
    total += (w ? w[b] : 1) * (reduction == 2 ? sum : mean);
    if (per_sample) write(per_sample, b, mean);
  }
  if (loss) write(loss, 0, reduction == 1 ? total / static_cast<double>(B) : total);
  return -1;
}

// out: (B, 3) doubles, the sums over each row of g*x, g*y, g*z.
void row_dots(int dtype, int64_t B, int64_t D, uintptr_t g, uintptr_t x, uintptr_t y, uintptr_t z,
              const NoiseSpec& noise, uintptr_t out, Layout layout) {
  Shape shape(dtype, B, D, std::move(layout));
  const int64_t segments = Cut(B, D).segments_per_row;
  std::vector<double> sums(3 * B * segments);
  RowDotsArgs a{};
  a.g = shape.operand(g), a.x = shape.operand(x), a.y = shape.operand(y), a.z = shape.operand(z);
  a.batch = shape.batch;
  a.noise = make_noise(noise);
  a.sums = sums.data();
  launch(g_isa->kernels->row_dots, a, kNsResidual + (a.noise.present ? kNsNormal : 0));
  for (int64_t b = 0; b < B; ++b)
    for (int k = 0; k < 3; ++k) {
      double sum = 0;
      for (int64_t s = 0; s < segments; ++s) sum += sums[3 * (b * segments + s) + k];
      write_as<double>(out, 3 * b + k, sum);
    }
}

void bits(int64_t B, int64_t D, const NoiseSpec& noise, uintptr_t out) {
  BitsArgs a{{B, D, 0, nullptr, Dtype::f32}, make_noise(noise), reinterpret_cast<int64_t*>(out)};
  launch(g_isa->kernels->bits, a, kNsNormal);
}

std::pair<int64_t, int64_t> fold_in_key(int64_t seed, int64_t offset, int64_t data) {
  const Key k = fold_in({static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)}, static_cast<uint64_t>(data));
  return {static_cast<int64_t>(k.seed), static_cast<int64_t>(k.offset)};
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& c, const std::array<uint32_t, 2>& key) {
  const Block b = philox4x32_10({{c[0], c[1], c[2], c[3]}}, key[0], key[1]);
  return {b.r[0], b.r[1], b.r[2], b.r[3]};
}

// Two normals from each pair of words, for tests of the arithmetic at chosen words.
void box_muller(uintptr_t radius, uintptr_t angle, uintptr_t z, int64_t n) {
  const uint32_t *r = reinterpret_cast<const uint32_t*>(radius), *a = reinterpret_cast<const uint32_t*>(angle);
  float* out = reinterpret_cast<float*>(z);
  for (int64_t i = 0; i < n; ++i) normal_pair(r[i], a[i], out[2 * i], out[2 * i + 1]);
}

void use_isa(const std::string& name) {
  const Isa* isa = find_isa(name.c_str());
  if (!isa) throw py::value_error("this processor or this build has no instruction set '" + name + "'");
  g_isa = isa;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native CPU kernels of dae_fast; see dae_fast.backends.native.";
  m.def("affine", &affine);
  m.def("residual", &residual);
  m.def("row_dots", &row_dots);
  m.def("bits", &bits);
  m.def("fold_in", &fold_in_key);
  m.def("philox4x32_10", &philox);
  m.def("box_muller", &box_muller);
  m.def("use_isa", &use_isa);
  m.def("isa", [] { return g_isa->name; });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const char* name : {"baseline", "avx2", "avx512"})
      if (find_isa(name)) names.push_back(name);
    return names;
  });
  m.def("max_threads", &max_threads);
}
