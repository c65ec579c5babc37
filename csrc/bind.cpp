// The Python module dae_fast._core. Tensors come as Python objects, already checked: of one shape, dtype and
// device. Only the level index, which is data, is checked here, and only on the CPU.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "api.h"
#include "cpu/dispatch.h"
#include "nvtx.h"
#include "call.h"
#include "tensor.h"

namespace py = pybind11;
using namespace dae;

namespace {

void* address_or_null(const py::object& tensor) { return tensor.is_none() ? nullptr : address(tensor.ptr()); }

// Where every row's level lies in the table, or on a GPU, where nobody looks.
constexpr int64_t kNoBadLevel = -1;

// Runs `function` of the queue's device, without the GIL where it takes long; raises what went wrong.
template <class Function, class... A>
void run(const Queue& queue, const Batch& batch, Function Api::*function, const A&... args) {
  const Api& api = api_of(queue);
  const char* error;
  {
    const OnDevice there(queue);
    std::optional<py::gil_scoped_release> release;
    if (queue.device < 0 && batch.B * batch.D > kReleaseGil) release.emplace();
    error = (api.*function)(args...);
  }
  if (!error) return;
  if (error == kNoMemory) throw std::bad_alloc();  // pybind11's MemoryError
  throw std::runtime_error(std::string("dae_fast: ") + api.runtime + " error: " + error);
}

using Bounds = std::optional<std::tuple<double, double>>;
using Inputs = std::tuple<py::object, py::object, py::object, py::object>;

// thresholds: (1 or B, 2) int64; noise None: nothing is chosen so.
Choice read_choice(const py::object& noise, const py::object& thresholds, bool keeps, bool for_gpu, int64_t D) {
  Choice choice;
  if (noise.is_none()) return choice;
  choice.noise = read_noise(noise.ptr(), false, D);
  const View view(thresholds.ptr());
  choice.thresholds = static_cast<const int64_t*>(view.data());
  choice.rows = view.size(0);
  choice.keeps = keeps;
  if (for_gpu && view.is_cpu() && choice.rows == 1) {  // as read_table
    std::copy_n(choice.thresholds, 2, choice.constants);
    choice.thresholds = nullptr;
  }
  return choice;
}

using Rows = std::tuple<py::object, py::object>;                       // table, index
using Outs = std::tuple<py::object, py::object>;                       // a result, and a second one

int64_t affine(const py::object& map, const Inputs& inputs, const py::object& noise, bool raw, const Rows& rows,
               const Bounds& bounds, const Outs& outs) {
  const auto& [x, y, z, w] = inputs;
  const auto& [table, index] = rows;
  const auto& [out, out2] = outs;
  const Queue q = queue_of(out.ptr());
  const bool stored = is_stored(map.ptr(), noise.ptr());
  PyObject *const v = stored ? noise.ptr() : Py_None, *const drawn = stored ? Py_None : noise.ptr();
  const Operands operands(out.ptr(), {x.ptr(), y.ptr(), z.ptr(), w.ptr(), out.ptr(), out2.ptr(), v}, drawn != Py_None);
  AffineArgs a{operands.batch, operands[0], operands[1], operands[2], operands[3], operands[4], operands[5]};
  a.v = operands[6];
  a.noise = read_noise(drawn, raw, operands.batch.D);
  a.table = read_table(table.ptr(), index.ptr(), q.device >= 0);
  fill_map(map.ptr(), a);
  if (bounds) std::tie(a.lo, a.hi) = *bounds;
  const int64_t bad = q.device < 0 ? bad_level(a.table, a.batch.B) : kNoBadLevel;
  if (bad == kNoBadLevel) run(q, a.batch, &Api::affine, a, q);
  return bad;
}

using Mask = std::tuple<py::object, py::object, bool, py::object>;  // its noise, thresholds, whether it keeps; or as it is
using Factors = std::tuple<py::object, py::object, py::object, bool>;  // kept, weight, upstream, whether only if it is not 1
using Results = std::tuple<py::object, py::object, py::object, py::object>;  // means, loss, also, gradient
using Room = std::tuple<py::object, py::object>;                       // sums and counter of a reduction on a GPU

Scratch scratch_in(const Room& room) {
  const auto& [sums, counter] = room;
  return {static_cast<double*>(address_or_null(sums)), static_cast<uint32_t*>(address_or_null(counter))};
}

// Operands: pred, y, z, noise. What is given of the results is written.
int64_t residual(const py::object& spec, const Inputs& operands_of, const Rows& rows, const Mask& of_mask,
                 const Factors& factors, const Results& results, const Room& room) {
  const auto& [pred, y, z, noise] = operands_of;
  const auto& [table, index] = rows;
  const auto& [mask_noise, thresholds, keeps, mask] = of_mask;
  const auto& [kept, weight, upstream, only_if_scaled] = factors;
  const auto& [per_sample, loss, also, grad] = results;
  const LossObject& fixed = loss_of(spec.ptr());
  const int* columns = fixed.columns;
  const Queue q = queue_of(pred.ptr());
  const Operands operands(pred.ptr(), {pred.ptr(), y.ptr(), z.ptr(), mask.ptr(), grad.ptr()},
                          !noise.is_none() || !mask_noise.is_none());
  ResidualArgs a{operands.batch, operands[0], operands[1], operands[2], operands[3], operands[4]};
  a.choice = read_choice(mask_noise, thresholds, keeps, q.device >= 0, operands.batch.D);
  Dtype of_weights;
  a.weighs = !mask.is_none() && View(mask.ptr()).dtype(of_weights);
  a.penalty = static_cast<Penalty>(fixed.kind);
  a.noise = read_noise(noise.ptr(), false, operands.batch.D);
  a.table = read_table(table.ptr(), index.ptr(), q.device >= 0);
  for (int i = 0; i < 3; ++i) a.columns[i] = columns[i];
  Dtype weight_dtype = Dtype::f32;
  if (!weight.is_none()) View(weight.ptr()).dtype(weight_dtype);
  const LossArgs args{static_cast<Reduction>(fixed.reduction),
                      address_or_null(weight),
                      weight_dtype == Dtype::f64,
                      static_cast<const double*>(address_or_null(kept)),
                      address_or_null(upstream),
                      only_if_scaled,
                      address_or_null(per_sample),
                      address_or_null(loss),
                      columns[3],
                      {columns[4], columns[5]},
                      address_or_null(also)};
  const int64_t bad = q.device < 0 ? bad_level(a.table, a.batch.B) : kNoBadLevel;
  if (bad == kNoBadLevel) run(q, a.batch, &Api::residual, a, args, scratch_in(room), q);
  return bad;
}

// out: (B, 3) doubles, the sums over each row of g*x, g*y, g*z.
void row_dots(const py::object& g, const py::object& x, const py::object& y, const py::object& z,
              const py::object& noise, const py::object& out, const Room& room) {
  const Operands operands(g.ptr(), {g.ptr(), x.ptr(), y.ptr(), z.ptr()}, !noise.is_none());
  const RowDotsArgs a{operands.batch, operands[0], operands[1], operands[2], operands[3], read_noise(noise.ptr(), false, operands.batch.D)};
  const Queue q = queue_of(g.ptr());
  run(q, a.batch, &Api::row_dots, a, static_cast<double*>(address(out.ptr())), scratch_in(room), q);
}

// kept: (B,) doubles, how many elements of each row the mask keeps; a drawn one has the shape of `like`.
void mask_count(const py::object& like, const Mask& of_mask, const py::object& upstream, const py::object& kept,
                const Room& room) {
  const auto& [mask_noise, thresholds, keeps, mask] = of_mask;
  const Operands operands(like.ptr(), {mask.ptr()}, !mask_noise.is_none());
  const Queue q = queue_of(like.ptr());
  MaskArgs a{operands.batch, operands[0], read_choice(mask_noise, thresholds, keeps, q.device >= 0, operands.batch.D)};
  a.upstream = address_or_null(upstream);
  Dtype type;
  a.upstream_is_double = a.upstream && View(upstream.ptr()).dtype(type) && type == Dtype::f64;
  run(q, a.batch, &Api::mask_count, a, static_cast<double*>(address(kept.ptr())), scratch_in(room), q);
}

// x where its word leaves it, else low or high.
void corrupt(const py::object& x, const py::object& noise, const py::object& thresholds, double low, double high,
             const py::object& out) {
  const Operands operands(x.ptr(), {x.ptr(), out.ptr()}, true);
  const Queue q = queue_of(x.ptr());
  const Choice choice = read_choice(noise, thresholds, false, q.device >= 0, operands.batch.D);
  const CorruptArgs a{operands.batch, operands[0], operands[1], choice, low, high};
  run(q, a.batch, &Api::corrupt, a, q);
}

// kl: (B,) of the compute type.
void gaussian(const py::object& mu, const py::object& log_var, const py::object& eps, const py::object& noise,
              const py::object& z, const py::object& kl, const Room& room) {
  const Operands operands(mu.ptr(), {mu.ptr(), log_var.ptr(), eps.ptr(), z.ptr()}, !noise.is_none());
  const GaussianArgs a{operands.batch, operands[0], operands[1], operands[2], operands[3], read_noise(noise.ptr(), false, operands.batch.D)};
  const Queue q = queue_of(mu.ptr());
  run(q, a.batch, &Api::gaussian, a, address(kl.ptr()), scratch_in(room), q);
}

void gaussian_grad(const py::object& mu, const py::object& log_var, const py::object& eps, const py::object& noise,
                   const py::object& z_grad, const py::object& kl_grad, const Outs& outs) {
  const auto& [mu_grad, log_var_grad] = outs;
  const Operands operands(mu.ptr(),
                          {mu.ptr(), log_var.ptr(), eps.ptr(), z_grad.ptr(), mu_grad.ptr(), log_var_grad.ptr()},
                          !noise.is_none());
  const GaussianGradArgs a{operands.batch, operands[0], operands[1], operands[2], operands[3], operands[4], operands[5],
                           read_noise(noise.ptr(), false, operands.batch.D), address_or_null(kl_grad)};
  const Queue q = queue_of(mu.ptr());
  run(q, a.batch, &Api::gaussian_grad, a, q);
}

template <class R>
double sparsity(const std::vector<double>& sums, int64_t B, double rate, const py::object& loss, const py::object& slope) {
  const double low = std::numeric_limits<R>::min(), high = 1 - std::numeric_limits<R>::epsilon() / 2;
  R* const slopes = static_cast<R*>(address_or_null(slope));
  double total = 0, outside = 0;
  for (size_t j = 0; j < sums.size(); ++j) {
    const double rho = sums[j] / static_cast<double>(B), at = rho < low ? low : (rho > high ? high : rho);
    if (rho < 0 || rho > 1) outside = rho;
    total += rate * std::log(rate / at) + (1 - rate) * std::log((1 - rate) / (1 - at));
    const double own = ((1 - rate) / (1 - at) - rate / at) / static_cast<double>(B);
    if (slopes) slopes[j] = static_cast<R>(rho >= low && rho <= high ? own : 0 * at);  // at: a NaN stays
  }
  *static_cast<R*>(address(loss.ptr())) = static_cast<R>(total);
  return outside;
}

// sum_j KL(rate || the mean over the rows of h_bj) into loss (), its gradient in each row of h into slope (D,), both of the
// compute type, on the CPU. Returns 0, or a mean outside [0, 1].
double kl_sparsity(const py::object& h, double rate, const py::object& loss, const py::object& slope) {
  const Operands operands(h.ptr(), {h.ptr()}, true);
  const Batch& batch = operands.batch;
  std::vector<double> sums(batch.D);
  cpu::column_sums({batch, operands[0], sums.data()});
  return batch.dtype == Dtype::f64 ? sparsity<double>(sums, batch.B, rate, loss, slope)
                                   : sparsity<float>(sums, batch.B, rate, loss, slope);
}

// Work on the CPU alone, without the GIL where it takes long.
template <class Args>
void run_on_cpu(void (*function)(const Args&), const Args& a) {
  std::optional<py::gil_scoped_release> release;
  if (a.batch.B * a.batch.D > kReleaseGil) release.emplace();
  function(a);
}

static double* doubles(const py::object& tensor) { return static_cast<double*>(address_or_null(tensor)); }

// h (B, D); squares (D,) of the compute type; out (B,) double.
void contraction(const py::object& h, const py::object& squares, const py::object& out) {
  const Operands operands(h.ptr(), {h.ptr()}, true);
  run_on_cpu(&cpu::contraction, ContractionArgs{operands.batch, operands[0], address(squares.ptr()), doubles(out)});
}

// upstream (B,) double; h_grad like h, or None; squares_grad (D,) double, or None.
void contraction_grad(const py::object& h, const py::object& squares, const py::object& upstream,
                      const py::object& h_grad, const py::object& squares_grad) {
  const Operands operands(h.ptr(), {h.ptr(), h_grad.ptr()}, true);
  run_on_cpu(&cpu::contraction_grad, ContractionGradArgs{operands.batch, operands[0], operands[1], address(squares.ptr()),
                                                         doubles(upstream), doubles(squares_grad)});
}

// v, away (B, D), away and the table (B, 5) contiguous and of the compute type; out (B,) double.
void bound(const py::object& v, const py::object& away, const py::object& table, bool is_log, const py::object& out) {
  const Operands operands(v.ptr(), {v.ptr()}, true);
  run_on_cpu(&cpu::bound, BoundArgs{operands.batch, operands[0], address(away.ptr()), address(table.ptr()), is_log,
                                    doubles(out)});
}

// upstream (B,) double; the gradients are like v and away.
void bound_grad(const py::object& v, const py::object& away, const py::object& table, bool is_log,
                const py::object& upstream, const std::tuple<py::object, py::object>& grads) {
  const auto& [v_grad, away_grad] = grads;
  const Operands operands(v.ptr(), {v.ptr(), v_grad.ptr()}, true);
  const BoundArgs of{operands.batch, operands[0], address(away.ptr()), address(table.ptr()), is_log, nullptr};
  run_on_cpu(&cpu::bound_grad, BoundGradArgs{of, doubles(upstream), operands[1], address(away_grad.ptr())});
}

static float* numbers(const py::object& tensor) { return static_cast<float*>(address(tensor.ptr())); }

using Update = std::tuple<float, float, int64_t>;  // step, spread, steps

static void run_chain(const py::object& x, const Update& update, const py::object& noise, const py::object& out, ChainArgs a) {
  std::tie(a.step, a.spread, a.steps) = update;
  const View view(x.ptr());
  a.B = view.size(0), a.D = view.size(1);
  a.x = numbers(x), a.out = numbers(out);
  a.noise = read_noise(noise.ptr(), false, a.D);
  const Queue q = queue_of(x.ptr());
  run(q, Batch{a.B, a.D, 0, nullptr, Dtype::f32}, &Api::chain, a, q);
}

// x, out: (B, D) fp32, contiguous; the mixture's tables as ChainArgs has them.
void chain(const py::object& x, const std::tuple<py::object, py::object, py::object>& score, const Update& update,
           const py::object& noise, const py::object& out) {
  const auto& [means, precisions, log_weights] = score;
  ChainArgs a{};
  a.components = static_cast<int>(View(means.ptr()).size(0));
  a.means = numbers(means), a.precisions = numbers(precisions), a.log_weights = numbers(log_weights);
  run_chain(x, update, noise, out, a);
}

// The same of a double well.
void well_chain(const py::object& x, const std::tuple<float, float>& score, const Update& update,
                const py::object& noise, const py::object& out) {
  ChainArgs a{};
  std::tie(a.slope, a.square) = score;
  run_chain(x, update, noise, out, a);
}

// out: (B, D) fp32, contiguous; at most kMaxTerms nodes, with a weight each.
void normal_sum(const py::object& noise, const std::vector<uint64_t>& nodes, const std::vector<float>& weights,
                const py::object& out) {
  const View view(out.ptr());
  NormalSumArgs a{};
  a.B = view.size(0), a.D = view.size(1);
  a.out = numbers(out);
  a.noise = read_noise(noise.ptr(), false, a.D);
  if (nodes.size() > kMaxTerms || nodes.size() != weights.size()) throw std::invalid_argument("normal_sum: terms");
  a.terms = static_cast<int>(nodes.size());
  std::copy(nodes.begin(), nodes.end(), a.nodes);
  std::copy(weights.begin(), weights.end(), a.weights);
  const Queue q = queue_of(out.ptr());
  run(q, Batch{a.B, a.D, 0, nullptr, Dtype::f32}, &Api::normal_sum, a, q);
}

// x (B,) or (B, K), W (K, D / 2): double, contiguous; out: (B, D) of any strides.
void embedding(const py::object& x, const py::object& W, bool flip, const py::object& out) {
  const Operands operands(out.ptr(), {out.ptr()}, true);
  const Queue q = queue_of(out.ptr());
  const View of_x(x.ptr()), of_W(W.ptr());
  const EmbeddingArgs a{operands.batch, operands[0], static_cast<const double*>(of_x.data()),
                        static_cast<const double*>(of_W.data()), of_W.size(0), flip};
  run(q, a.batch, &Api::embedding, a, q);
}

// out: (B, D) int64 words, scaled to [0, below).
void bits(const py::object& noise, bool raw, uint64_t below, const py::object& out) {
  const Operands operands(out.ptr(), {out.ptr()}, true);
  const BitsArgs a{operands.batch, read_noise(noise.ptr(), raw, operands.batch.D), static_cast<int64_t*>(address(out.ptr())), below};
  const Queue q = queue_of(out.ptr());
  run(q, a.batch, &Api::bits, a, q);
}

std::pair<int64_t, int64_t> fold_in_key(int64_t seed, int64_t offset, int64_t data) {
  const Key k = fold_in({static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)}, static_cast<uint64_t>(data));
  return {static_cast<int64_t>(k.seed), static_cast<int64_t>(k.offset)};
}

// data: an int, or an int64 tensor () on the queue's device; out: the key (2,) there.
void fold_in_tensor(const py::object& noise, const py::object& data, const py::object& out) {
  const bool is_int = py::isinstance<py::int_>(data);
  const uint64_t value = is_int ? static_cast<uint64_t>(data.cast<int64_t>()) : 0;
  const uint64_t* at = is_int ? nullptr : static_cast<const uint64_t*>(address(data.ptr()));
  const Queue q = queue_of(out.ptr());
  run(q, Batch{}, &Api::fold_in, read_noise(noise.ptr(), false, 0), value, at, static_cast<Key*>(address(out.ptr())), q);
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& c, const std::array<uint32_t, 2>& key) {
  const Block b = philox4x32_10({{c[0], c[1], c[2], c[3]}}, rounds_of(key[0] | static_cast<uint64_t>(key[1]) << 32));
  return {b.r[0], b.r[1], b.r[2], b.r[3]};
}

// Two normals from each pair of words, for tests of the arithmetic at chosen words.
void box_muller(uintptr_t radius, uintptr_t angle, uintptr_t z, int64_t n) {
  const uint32_t *r = reinterpret_cast<const uint32_t*>(radius), *a = reinterpret_cast<const uint32_t*>(angle);
  float* out = reinterpret_cast<float*>(z);
  for (int64_t i = 0; i < n; ++i) normal_pair(r[i], a[i], out[2 * i], out[2 * i + 1]);
}

void use_isa(const std::string& name) {
  if (!cpu::use_isa(name.c_str()))
    throw py::value_error("this processor or this build has no instruction set '" + name + "'");
}

void load_cuda(const std::optional<std::string>& path) {
  if (!path) {
    cuda_api() = nullptr;
    return;
  }
  void* library = dlopen(path->c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  const auto api = reinterpret_cast<const Api* (*)()>(dlsym(library, "dae_cuda_api"));
  if (!api) throw std::runtime_error(dlerror());
  cuda_api() = api();
}

// How many GPUs the CUDA library sees; raises what keeps it from being used.
int cuda_devices() {
  int count = 0;
  const char* error = cuda_api()->devices(&count);
  if (error) throw std::runtime_error(error);
  return count;
}

template <size_t N>
py::tuple names_of(const char* const (&names)[N]) {
  py::tuple made(N);
  for (size_t i = 0; i < N; ++i) made[i] = names[i];
  return made;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native kernels of dae_fast, for the CPU and for CUDA devices; see dae_fast.kernels.native.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const PythonError&) {  // already set
    }
  });
  m.attr("ENUMERATIONS") = py::dict(py::arg("Dtype") = names_of(kDtypes), py::arg("Penalty") = names_of(kPenalties),
                                    py::arg("Reduction") = names_of(kReductions));
  m.def("affine", &affine);
  m.def("residual", &residual);
  m.def("row_dots", &row_dots);
  m.def("mask_count", &mask_count);
  m.def("corrupt", &corrupt);
  m.def("gaussian", &gaussian);
  m.def("gaussian_grad", &gaussian_grad);
  m.def("bits", &bits);
  m.def("chain", &chain);
  m.def("well_chain", &well_chain);
  m.def("normal_sum", &normal_sum);
  m.def("embedding", &embedding);
  m.def("kl_sparsity", &kl_sparsity);
  m.def("contraction", &contraction);
  m.def("contraction_grad", &contraction_grad);
  m.def("bound", &bound);
  m.def("bound_grad", &bound_grad);
  m.def("fold_in", &fold_in_key);
  m.def("fold_in_tensor", &fold_in_tensor);
  m.def("scratch_doubles", &scratch_doubles);
  m.def("philox4x32_10", &philox);
  m.def("box_muller", &box_muller);
  m.def("use_isa", &use_isa);
  m.def("use_cache_share", &cpu::use_cache_share);
  m.def("isa", [] { return cpu::isa().name; });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const char* name : {"baseline", "avx2", "avx512"})
      if (cpu::has_isa(name)) names.push_back(name);
    return names;
  });
  m.def("max_threads", &cpu::max_threads);
  m.def("load_cuda", &load_cuda);
  m.def("cuda_devices", &cuda_devices);
  m.def("on_gpu", [](const py::object& tensor) { return queue_of(tensor.ptr()).device >= 0; });
  m.attr("nvtx_built") = nvtx::kBuilt;
  m.def("nvtx_listens", &nvtx::listens);
  m.def("nvtx_push", &nvtx::push);
  m.def("nvtx_pop", &nvtx::pop);
  add_fast_calls(m.ptr());
}
