#include "call.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <new>
#include <optional>
#include <vector>

#include "nvtx.h"

namespace dae {

namespace {

// What is asked of torch at every call.
struct TorchState {
  PyObject *is_grad_enabled, *in_functorch, *dispatch_modes, *function_modes, *forward_ad, *profiling, *tracing, *empty_like;
  PyObject *current_level;  // the name of an attribute

  static const TorchState& get() {
    static const TorchState known = {member("torch", "is_grad_enabled"),
                                     member("dae_fast._torch", "in_functorch"),
                                     member("dae_fast._torch", "dispatch_modes"),
                                     member("dae_fast._torch", "function_modes"),
                                     member("dae_fast._torch", "forward_ad"),
                                     member("dae_fast._torch", "profiling"),
                                     member("dae_fast._torch", "jit_tracing"),
                                     member("torch", "empty_like"),
                                     Owned(PyUnicode_InternFromString("_current_level")).release()};
    return known;
  }
};

// Who launches a device's plain calls: True, this module; a Python module with fast_map and fast_loss; None: there
// are none.
PyObject *g_on_cpu = Py_True, *g_on_gpu = Py_True;
// What makes plain calls of a weighted sum differentiable: dae_fast/primitives/sums.py's.
PyObject* g_with_gradients = Py_None;

bool asks_true(PyObject* function) { return is_true(Owned(PyObject_CallNoArgs(function))); }

// No transform, mode or dual level around the call, and nobody who wants its range (dae_fast/profiling.py).
bool nothing_around(const TorchState& torch) {
  return !nvtx::listens() && !asks_true(torch.profiling) && !asks_true(torch.in_functorch) &&
         to_int(Owned(PyObject_CallNoArgs(torch.dispatch_modes))) == 0 && !asks_true(torch.function_modes) &&
         to_int(attribute(torch.forward_ad, torch.current_level)) < 0 &&
         Owned(PyObject_CallNoArgs(torch.tracing)).get() == Py_None;
}

// torch takes a negated view's minus sign for a part of its values.
bool is_negated(PyObject* t) { return is_true(call(t, names().is_neg)); }

// A CUDA library that was built for a CPU takes its tensors.
bool pretends_gpu() { return cuda_api() && cuda_api()->on_host; }

Queue queue_of_view(const View& tensor) {
  if (pretends_gpu()) return {0, nullptr};
  return tensor.device() < 0 ? Queue{} : Queue{tensor.device(), current_stream(tensor)};
}

// Of a tensor's device; None where there is none.
PyObject* launcher_of(const View& view) {
  PyObject* const launcher = view.is_cpu() ? g_on_cpu : (view.is_gpu() ? g_on_gpu : Py_None);
  return launcher == Py_True && view.is_gpu() && !cuda_api() ? Py_None : launcher;
}

bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(dae::torch().tensor));
}

bool is_noise(PyObject* object) {
  static PyObject* const type = member("dae_fast.noise", "Noise");
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type;
}

constexpr int kFifth = 4;  // the slot of a noise, or of the fifth tensor

// A weighted sum's static side, parsed once; spec.Map's `core`.
struct MapObject {
  PyObject_HEAD
  PyObject *op, *owner;  // owner: the spec.Map that holds this, borrowed
  int columns[8], fifth[2], inner[5], slots[5];  // inner: and those of a gate
  int outputs, inputs;
  bool clamped, gates, five, blends;

  // Whether input k of x, y, z, w, v is read, by an output or by the estimate, which is of x, y and w.
  bool reads(int k) const {
    const bool gated = (k == kFifth && inner[4] != kAbsent) || (k == 2 && inner[3] != kAbsent);
    if (k == kFifth) return gated || fifth[0] != kAbsent || fifth[1] != kAbsent;
    if (blends && (k == 1 || k == 3)) return true;
    const bool inside = gated || (clamped && k != 2 && inner[k == 3 ? 2 : k] != kAbsent);
    return inside || columns[k] != kAbsent || columns[4 + k] != kAbsent;
  }
  void fill(AffineArgs& args) const {
    std::copy_n(columns, 8, args.columns);
    std::copy_n(inner, 3, args.inner), std::copy_n(inner + 3, 2, args.gate);
    std::copy_n(fifth, 2, args.fifth);
    args.clamped = clamped, args.gates = gates, args.five = five, args.blends = blends;
  }
};

extern PyTypeObject g_map_type, g_loss_type;

const MapObject& as_map(PyObject* object) {
  if (Py_TYPE(object) == &g_map_type) return *reinterpret_cast<MapObject*>(object);
  PyErr_SetString(PyExc_TypeError, "dae_fast: no Map of the core");
  throw PythonError();
}

// What every plain call reads; each step says whether the call is still plain. A Python attribute of a tensor takes 40 to
// 90 ns to read.
class FastCall {
 protected:
  bool read_first(PyObject* x) { return x != Py_None && nothing_around(TorchState::get()) && read_plain(x); }

  bool read_plain(PyObject* x) {
    x_ = x;
    first_ = View::of_plain(x);
    if (!first_) return false;
    const View& view = *first_;
    if (!view.is_contiguous() || !view.dtype(batch_.dtype) || !view.dims() || is_negated(x)) return false;
    launcher_ = launcher_of(view);
    if (launcher_ == Py_None) return false;
    take_rows(1);
    places_ = reinterpret_cast<uintptr_t>(view.data());
    return batch_.B && batch_.D;
  }

  bool is_ours() const { return launcher_ == Py_True; }

  // None, or a tensor like the first.
  bool read_another(PyObject* t, Operand& operand) {
    if (t == Py_None) return true;
    const auto view = View::of_plain(t);
    Dtype dtype;
    if (!view || !view->is_contiguous() || !view->dtype(dtype) || dtype != batch_.dtype ||
        !view->is_on_device_of(*first_) || !view->has_shape_of(*first_) || is_negated(t))
      return false;
    operand.data = note(view->data());
    return true;
  }

  // As read_another, of what is written: nobody differentiates it, and it lies where an input does or apart from all.
  bool read_out(PyObject* t, const PyObject* const* inputs, int count, Operand& operand) {
    if (!read_another(t, operand) || wants_grad(t)) return false;
    const auto begin = reinterpret_cast<uintptr_t>(operand.data), size = static_cast<uintptr_t>(first_->bytes());
    for (int k = 0; k < count; ++k) {
      if (inputs[k] == Py_None) continue;
      const auto other = reinterpret_cast<uintptr_t>(View(const_cast<PyObject*>(inputs[k])).data());
      if (other != begin && other < begin + size && begin < other + size) return false;
    }
    return true;
  }

  bool wants_grad(PyObject* t) const {
    return is_true(attribute(t, names().requires_grad)) && asks_true(TorchState::get().is_grad_enabled);
  }

  bool is_for_gpu() const { return !first_->is_cpu() || pretends_gpu(); }

  // Integers or numbers that kernels read as they lie in memory.
  std::optional<View> dense(PyObject* t) const {
    auto view = View::of_plain(t);
    if (view && !(view->is_contiguous() && view->is_on_device_of(*first_))) view.reset();
    return view;
  }

  // How many along the first and only dimension, -1 where they are not so.
  int64_t length_of_dense(PyObject* t) const {
    const auto view = dense(t);
    return view && view->dims() == 1 ? view->size(0) : -1;
  }

  // Rows are those of the first `leading` dimensions.
  void take_rows(int leading) {
    batch_.B = batch_.D = 1;
    for (int d = 0; d < first_->dims(); ++d) (d < leading ? batch_.B : batch_.D) *= first_->size(d);
    leading_ = leading;
  }

  // Whether so many leading dimensions are the first tensor's, which then are its rows.
  bool take_rows_of(const View& levels) {
    if (levels.dims() > first_->dims()) return false;
    for (int d = 0; d < levels.dims(); ++d)
      if (levels.size(d) != first_->size(d)) return false;
    if (levels.dims() > 1) take_rows(levels.dims());
    return true;
  }

  // After the source, which says what a row is.
  bool read_its_noise(PyObject* noise, Noise& read) const {
    if (noise == Py_None) return true;
    const Owned sample = attribute(noise, names().sample), key = attribute(noise, names().key_tensor);
    if (key.get() != Py_None && length_of_dense(key.get()) != 2) return false;
    if (sample.get() != Py_None && length_of_dense(sample.get()) < 0) return false;
    const int64_t rows = leading_ > 1 ? batch_.B / first_->size(0) : 1;
    if (!read_noise(noise, key.get(), sample.get(), false, batch_.D, rows, read)) return false;
    return sample.get() == Py_None || length_of_dense(sample.get()) * read.rows_per_sample == batch_.B;
  }

  // source: a Level; a tuple of columns, each a number or a tensor (), (B,) or of more of the first tensor's leading
  // dimensions; or a table. key: of a Level the LevelOp that owns the table; of a table its rows, an int for the one of
  // all samples, a tensor for one of each, None for a table of one row or of one for each sample.
  bool read_source(PyObject* source, PyObject* key, Table& read) {
    if (PyTuple_CheckExact(source)) return read_columns(source, read);
    if (is_tensor(source)) {
      const auto view = View::of_plain(source);
      if (!view || view->dims() != 2 || !view->is_contiguous() || wants_grad(source)) return false;
      if (!view->is_on_device_of(*first_) && !(view->is_cpu() && view->size(0) == 1)) return false;
      table_ = source;
      return read_rows(key, read);
    }
    const Owned schedule = attribute(source, names().schedule);
    if (schedule.get() == Py_None) {
      const Owned alpha = attribute(source, names().alpha), sigma = attribute(source, names().sigma);
      PyObject* const given[] = {key, alpha.get(), sigma.get()};
      columns_.emplace(PyObject_VectorcallMethod(names().columns, given, 3, nullptr));
      return columns_->get() != Py_None && read_columns(columns_->get(), read);
    }
    const Owned tables = attribute(schedule.get(), names().tables), device = device_of_first();
    const Owned place(PyTuple_Pack(3, key, compute_dtype(), device.get()));
    table_ = PyDict_GetItemWithError(tables.get(), place.get());
    if (!table_) {
      if (PyErr_Occurred()) throw PythonError();
      return false;  // not made yet
    }
    return read_rows(attribute(source, names().t).get(), read);
  }

  bool read_rows(PyObject* t, Table& read) {
    index_.emplace(Py_NewRef(t));
    if (PyLong_Check(t)) {
      read = read_table(table_, Py_None, is_for_gpu());
      take_row(t, read);
      return true;
    }
    if (t == Py_None) return read = read_table(table_, Py_None, is_for_gpu()), read.rows == 1 || read.rows == batch_.B;
    const auto levels = dense(t);
    if (!levels || !levels->is_index() || !levels->dims() || !take_rows_of(*levels)) return false;
    read = read_table(table_, t, is_for_gpu());
    return !first_->is_cpu() || bad_level(read, batch_.B) < 0;
  }

  // One row for all samples, which is there.
  void take_row(PyObject* i, Table& read) const {
    const int64_t size = batch_.dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
    if (read.data) read.data = static_cast<const char*>(read.data) + PyLong_AsLongLong(i) * read.columns * size;
    read.rows = 1;
  }

  // Worked out here, in double and rounded once; False where one is not finite or lies on a GPU.
  bool read_columns(PyObject* columns, Table& read) {
    const Py_ssize_t count = PyTuple_GET_SIZE(columns);
    if (count > kMaxConstants) return false;
    std::optional<View> views[kMaxConstants];
    std::fill_n(read.constants, kMaxConstants, 0.0);
    bool constant = true;
    for (Py_ssize_t k = 0; k < count; ++k) {
      PyObject* const c = PyTuple_GET_ITEM(columns, k);
      if (PyFloat_Check(c) || PyLong_CheckExact(c)) {
        read.constants[k] = PyFloat_AsDouble(c);
        if (PyErr_Occurred()) return PyErr_Clear(), false;
        if (!is_finite(read.constants[k])) return false;
        continue;
      }
      views[k] = View::of_plain(c);
      Dtype dtype;
      if (!views[k] || !views[k]->is_cpu() || is_for_gpu() || !views[k]->dtype(dtype) || !views[k]->is_contiguous() ||
          (dtype != Dtype::f32 && dtype != Dtype::f64))
        return false;
      learned_ |= wants_grad(c);
      if (views[k]->dims() && !(views[k]->dims() == 1 && views[k]->size(0) == 1)) {
        if (!constant && views[k]->dims() != leading_) return false;  // each its own rows: the general way broadcasts
        if (!take_rows_of(*views[k])) return false;
        constant = false;
      }
    }
    table_ = columns;
    read.rows = constant ? 1 : batch_.B;
    read.columns = count;
    read.index = nullptr;
    const bool filled = batch_.dtype == Dtype::f64 ? fill_table<double>(read, views) : fill_table<float>(read, views);
    if (constant && is_for_gpu()) read.data = nullptr;
    if (!constant || std::any_of(views, views + count, [](const auto& v) { return v.has_value(); })) table_ = nullptr;
    return filled;
  }

  // As a tensor, for what outlives this call.
  void keep_table(const Table& read) {
    if (table_) return;
    kept_.emplace(
        new_tensor(Py_BuildValue("LL", static_cast<long long>(read.rows), static_cast<long long>(read.columns))));
    table_ = kept_->get();
    const View view(table_);
    std::copy_n(static_cast<const char*>(read.data), view.bytes(), static_cast<char*>(view.data()));
  }

  template <class R>
  bool fill_table(Table& read, const std::optional<View>* views) {
    const int64_t K = read.columns;
    storage_.resize((read.rows * K * sizeof(R) + sizeof(double) - 1) / sizeof(double));
    R* const to = reinterpret_cast<R*>(storage_.data());
    read.data = to;
    for (int64_t k = 0; k < K; ++k) {
      Dtype dtype = Dtype::f64;
      if (views[k]) views[k]->dtype(dtype);
      const bool each = views[k] && views[k]->dims() && read.rows > 1 && views[k]->elements() > 1;
      for (int64_t b = 0; b < read.rows; ++b) {
        double v = read.constants[k];
        if (views[k])
          v = dtype == Dtype::f64 ? static_cast<const double*>(views[k]->data())[each ? b : 0]
                                  : static_cast<double>(static_cast<const float*>(views[k]->data())[each ? b : 0]);
        to[b * K + k] = static_cast<R>(v);
        if (!is_finite(static_cast<double>(to[b * K + k]))) return false;
      }
    }
    return true;
  }

  static bool is_finite(double v) { return v - v == 0; }

  // Made once for the CPU's tensors: each tensor would make it anew.
  Owned device_of_first() const {
    static PyObject* cpu = nullptr;
    if (!first_->is_cpu()) return attribute(x_, names().device);
    if (!cpu) cpu = attribute(x_, names().device).release();
    return Owned(Py_NewRef(cpu));
  }

  PyObject* compute_dtype() const { return batch_.dtype == Dtype::f64 ? dae::torch().f64 : dae::torch().f32; }

  // Of the compute type unless given, on the first tensor's device. shape: given away.
  PyObject* new_tensor(PyObject* shape, PyObject* dtype = nullptr) const {
    static PyObject *const empty = member("torch", "empty"), *const options = Py_BuildValue("(ss)", "dtype", "device");
    const Owned sizes(shape), device = device_of_first();
    PyObject* const given[] = {sizes.get(), dtype ? dtype : compute_dtype(), device.get()};
    return PyObject_Vectorcall(empty, given, 1, options);
  }

  // A new tensor like the first; `place` becomes its memory.
  PyObject* empty_like_first(void*& place) {
    PyObject* const given[] = {x_};
    Owned made(PyObject_Vectorcall(TorchState::get().empty_like, given, 1, nullptr));
    place = note(address(made.get()));
    return made.release();
  }

  void* note(void* place) {
    places_ |= reinterpret_cast<uintptr_t>(place);
    return place;
  }

  PyObject* index() const { return index_ ? index_->get() : Py_None; }

  // What the table was worked out of.
  PyObject* columns(PyObject* source) const { return columns_ ? columns_->get() : source; }

  // launcher.name(aligned, (B, D), dtype, *arguments); aligned: every tensor lies on 16 bytes.
  template <class... Arguments>
  void launch_elsewhere(PyObject* name, Arguments... arguments) const {
    const Owned dtype = attribute(x_, names().dtype);
    const Owned plain(Py_BuildValue("O(LL)O", places_ % 16 ? Py_False : Py_True, static_cast<long long>(batch_.B),
                                    static_cast<long long>(batch_.D), dtype.get()));
    PyObject* const given[] = {launcher_, plain.get(), arguments...};
    const Owned nothing(PyObject_VectorcallMethod(name, given, sizeof...(arguments) + 2, nullptr));
  }

  // Without the GIL where it takes long; raises what went wrong.
  template <class Launch>
  void launch(Launch kernel) const {
    const Queue queue = queue_of_view(*first_);
    const Api& api = api_of(queue);
    const char* error;
    {
      const OnDevice there(queue);  // leaves by a call of Python, which no exception may be set for
      if (queue.device < 0 && batch_.B * batch_.D > kReleaseGil) {
        Py_BEGIN_ALLOW_THREADS;
        error = kernel(api, queue);
        Py_END_ALLOW_THREADS;
      } else {
        error = kernel(api, queue);
      }
    }
    if (!error) return;
    if (error == kNoMemory) throw std::bad_alloc();
    PyErr_Format(PyExc_RuntimeError, "dae_fast: %s error: %s", api.runtime, error);
    throw PythonError();
  }

  PyObject *x_ = nullptr, *table_ = nullptr;  // table_: nullptr where it is worked out here, of tensors
  bool learned_ = false;                      // whether one of those wants a gradient
  std::optional<View> first_;                 // of x
  Batch batch_{};
  int leading_ = 1;

 private:
  PyObject* launcher_ = Py_None;
  uintptr_t places_ = 0;          // of all tensors, or-ed
  std::optional<Owned> index_;    // the table's rows
  std::optional<Owned> columns_;  // of a level made by hand
  std::optional<Owned> kept_;     // the table as a tensor
  std::vector<double> storage_;   // of a table that is worked out here
};

// (map, given, source, key, bounds, out): map: of a LevelOp a tuple, the map without a Noise and those of one at each
// input, or None; the source is then a Level. given: the op's inputs in its order, tensors and at most a Noise; source
// and key as in read_source; bounds: None or (low, high). The result is a new tensor, or two; with gradients where one is
// wanted; or `out`.
class FastMap : protected FastCall {
 public:
  static constexpr Py_ssize_t kArguments = 6;
  static constexpr const char* kName = "fast_map";

  PyObject* run(PyObject* const* a) {
    PyObject* const chosen = PyTuple_CheckExact(a[0]) ? map_of_level_op(a[0], a[1], a[2]) : a[0];
    if (chosen == Py_None) return Py_NewRef(Py_None);
    const MapObject& map = as_map(chosen);
    PyObject *given = a[1], *bounds = a[4];
    PyObject* slots[] = {Py_None, Py_None, Py_None, Py_None, Py_None};
    if (PyTuple_GET_SIZE(given) != map.inputs || map.clamped != (bounds != Py_None)) return Py_NewRef(Py_None);
    for (int i = 0; i < map.inputs; ++i) slots[map.slots[i]] = PyTuple_GET_ITEM(given, i);
    if (!read_first(slots[0])) return Py_NewRef(Py_None);
    return sum(map, slots, a[2], a[3], bounds, a[5]);
  }

 protected:
  // Of read_first's tensor and the others. tag: what the noise, whose key is in host memory then, is folded with, or None.
  PyObject* sum(const MapObject& map, PyObject** slots, PyObject* source, PyObject* key, PyObject* bounds, PyObject* into,
                PyObject* tag = Py_None) {
    PyObject* noise = slots[kFifth];
    const bool stored = map.five && is_tensor(noise);
    if (stored)
      noise = Py_None;
    else
      slots[kFifth] = Py_None;
    AffineArgs args{};
    Operand* const operands[] = {&args.x, &args.y, &args.z, &args.w, &args.v};
    args.x.data = first_->data();
    const int tensors = stored ? 5 : 4, place_of_noise = map.five ? kFifth : 2;
    for (int k = 1; k < tensors; ++k)
      if (!read_another(slots[k], *operands[k])) return Py_NewRef(Py_None);
    for (int k = 0; k < 5; ++k) {
      const bool there = slots[k] != Py_None || (k == place_of_noise && noise != Py_None) || (map.blends && k == 3);
      if (map.reads(k) && !there) return Py_NewRef(Py_None);
    }
    if (noise != Py_None && slots[place_of_noise] != Py_None) return Py_NewRef(Py_None);
    if (!read_source(source, key, args.table) || !read_its_noise(noise, args.noise)) return Py_NewRef(Py_None);
    if (tag != Py_None) {
      if (args.noise.key_at) return Py_NewRef(Py_None);
      args.noise.key = fold_in(args.noise.key, static_cast<uint64_t>(PyLong_AsLongLong(tag)));
    }
    args.batch = batch_;
    map.fill(args);
    if (map.clamped) {
      args.lo = PyFloat_AsDouble(PyTuple_GET_ITEM(bounds, 0)), args.hi = PyFloat_AsDouble(PyTuple_GET_ITEM(bounds, 1));
      if (PyErr_Occurred()) throw PythonError();
    }

    bool differentiable = false;
    for (int k = 0; k < tensors; ++k) {
      if (slots[k] == Py_None) continue;
      if (map.reads(k)) {
        differentiable |= wants_grad(slots[k]);
      } else {  // checked, and not read
        operands[k]->data = nullptr;
        if (k == 0 && wants_grad(slots[0])) return Py_NewRef(Py_None);
        if (k) slots[k] = Py_None;
      }
    }
    differentiable |= learned_;
    if (into != Py_None && (differentiable || map.outputs != 1 || !read_out(into, slots, 5, args.out)))
      return Py_NewRef(Py_None);
    if (differentiable && leading_ > 1) return Py_NewRef(Py_None);  // made in the general way
    const Owned made(make_outputs(map, into, args));
    if (is_ours()) launch([&](const Api& api, Queue queue) { return api.affine(args, queue); });
    if (is_ours() && !differentiable) return Py_NewRef(made.get());
    keep_table(args.table);
    const Owned inputs(PyTuple_Pack(4, slots[0], slots[1], slots[2], slots[3]));
    const Owned last(stored           ? Py_NewRef(slots[kFifth])
                     : tag == Py_None ? Py_NewRef(noise)
                                      : PyObject_CallMethodOneArg(noise, names().fold_in, tag));
    if (!is_ours()) {
      const Owned rows(PyTuple_Pack(2, table_, index()));
      const Owned outs(map.outputs == 1 ? PyTuple_Pack(1, made.get()) : Py_NewRef(made.get()));
      launch_elsewhere(names().fast_map, map.owner, inputs.get(), last.get(), rows.get(), bounds, outs.get());
    }
    if (!differentiable) return Py_NewRef(made.get());
    const Owned rows(PyTuple_Pack(2, table_, learned_ ? columns(source) : index()));
    PyObject* const passed[] = {made.get(), map.owner, inputs.get(), last.get(), rows.get(), bounds};
    return PyObject_Vectorcall(g_with_gradients, passed, std::size(passed), nullptr);
  }

 private:
  static PyObject* map_of_level_op(PyObject* maps, PyObject* given, PyObject* source) {
    static PyObject* const level_type = member("dae_fast.coefficients", "Level");
    if (reinterpret_cast<PyObject*>(Py_TYPE(source)) != level_type) return Py_None;
    Py_ssize_t place = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i)
      if (is_noise(PyTuple_GET_ITEM(given, i))) place = i + 1;
    return place < PyTuple_GET_SIZE(maps) ? PyTuple_GET_ITEM(maps, place) : Py_None;
  }

  // The result: one tensor, or a tuple of two.
  PyObject* make_outputs(const MapObject& map, PyObject* into, AffineArgs& args) {
    if (into != Py_None) return Py_NewRef(into);
    if (map.outputs == 1) return empty_like_first(args.out.data);
    const Owned out(empty_like_first(args.out.data)), out2(empty_like_first(args.out2.data));
    return PyTuple_Pack(2, out.get(), out2.get());
  }
};

// (looks, tables, history, i, x, pred, noise): look i of a sampler. looks: a list of base.py's Quick; tables: by dtype and
// device, or one of them. The result is (x after it, what is kept then).
class FastStep : FastMap {
 public:
  static constexpr Py_ssize_t kArguments = 7;
  static constexpr const char* kName = "fast_step";

  PyObject* run(PyObject* const* a) {
    PyObject *looks = a[0], *history = a[2], *i = a[3], *x = a[4], *noise = a[6];
    if (looks == Py_None || !PyLong_CheckExact(i)) return Py_NewRef(Py_None);
    const Py_ssize_t place = PyLong_AsSsize_t(i);
    if (place < 0 || place >= PyList_GET_SIZE(looks)) return PyErr_Clear(), Py_NewRef(Py_None);
    enum { kMap, kBounds, kZ, kW, kV, kTag, kReads, kKeeps };
    PyObject* const look = PyList_GET_ITEM(looks, place);
    const auto number = [&](int k) { return PyLong_AsSsize_t(PyTuple_GET_ITEM(look, k)); };
    PyObject* const tag = PyTuple_GET_ITEM(look, kTag);
    if (PyTuple_GET_SIZE(history) < number(kReads) || (tag != Py_None && !is_noise(noise))) return Py_NewRef(Py_None);
    // As launch.py numbers what is read.
    const auto stream = [&](int k) {
      const Py_ssize_t n = number(k);
      return n == 2 ? a[5] : n >= 4 ? PyTuple_GET_ITEM(history, n - 4) : Py_None;
    };
    PyObject* slots[] = {x, a[5], stream(kZ), stream(kW), stream(kV)};
    if (slots[kFifth] == Py_None && tag != Py_None) slots[kFifth] = noise;
    if (!read_first(x)) return Py_NewRef(Py_None);
    PyObject* const table = PyDict_CheckExact(a[1]) ? of_first(a[1]) : a[1];
    if (!table) return Py_NewRef(Py_None);
    const MapObject& map = as_map(PyTuple_GET_ITEM(look, kMap));
    const Owned made(sum(map, slots, table, i, PyTuple_GET_ITEM(look, kBounds), Py_None, tag));
    if (made.get() == Py_None) return Py_NewRef(Py_None);
    const Py_ssize_t keeps = number(kKeeps);
    if (keeps <= 0) {
      const Owned kept(keeps ? PyTuple_Pack(1, x) : PyTuple_New(0));
      return PyTuple_Pack(2, made.get(), kept.get());
    }
    const Py_ssize_t before = place ? std::min(keeps - 1, PyTuple_GET_SIZE(history)) : 0;
    const Owned kept(PyTuple_New(1 + before));
    PyTuple_SET_ITEM(kept.get(), 0, Py_NewRef(PyTuple_GET_ITEM(made.get(), 1)));
    for (Py_ssize_t k = 0; k < before; ++k)
      PyTuple_SET_ITEM(kept.get(), 1 + k, Py_NewRef(PyTuple_GET_ITEM(history, k)));
    return PyTuple_Pack(2, PyTuple_GET_ITEM(made.get(), 0), kept.get());
  }

 private:
  // The table for the first tensor; nullptr where there is none yet.
  PyObject* of_first(PyObject* tables) const {
    const Owned device = device_of_first(), place(PyTuple_Pack(2, compute_dtype(), device.get()));
    PyObject* const table = PyDict_GetItemWithError(tables, place.get());
    if (!table && PyErr_Occurred()) throw PythonError();
    return table;
  }
};

// (loss, pred, y, z, noise, mask, source, key, weight, scratch): the loss of pred against y and z or noise; mask: None, or
// on the CPU a bool tensor like pred or a Drawn; weight: None or (B,). The result is (loss, pred's gradient, None if nobody
// wants one, False if backward makes it, `also` or None without its columns, the table, its rows, how many elements of each
// sample the mask keeps, the samples' means where weight wants a gradient, which is made of them). Of a loss that is not
// summed `loss` is the samples' means, without the weight, and the gradient True, or None where none is wanted.
// scratch(device, doubles) is what a GPU's reduction needs.
class FastLoss : protected FastCall {
 public:
  static constexpr Py_ssize_t kArguments = 10;
  static constexpr const char* kName = "fast_loss";

  PyObject* run(PyObject* const* a) {
    const LossObject& spec = loss_of(a[0]);
    PyObject *pred = a[1], *y = a[2], *z = a[3], *noise = a[4], *weight = a[8], *workspace = a[9];
    const int* columns = spec.columns;
    ResidualArgs args{};
    if (!read_residual(spec, a + 1, args)) return Py_NewRef(Py_None);
    if (columns[0] == kAbsent) y = Py_None;
    if (columns[1] == kAbsent) z = noise = Py_None;
    bool wanted = wants_grad(pred);
    for (PyObject* t : {y, z}) wanted |= t != Py_None && wants_grad(t);  // theirs is made of that of pred
    if (wanted && leading_ > 1) return Py_NewRef(Py_None);
    const bool later = wanted && batch_.dtype == Dtype::f16;  // its gradient, whose scale is not known yet
    const bool means = static_cast<Reduction>(spec.reduction) == Reduction::none;
    if (means && (leading_ > 1 || columns[4] != kAbsent || !is_ours())) return Py_NewRef(Py_None);
    const bool learns = weight != Py_None && wants_grad(weight);
    if (wanted || means || learns) keep_table(args.table);
    const Owned kept(a[5] == Py_None ? Py_NewRef(Py_None) : count_kept(args));
    const auto* const counts = static_cast<const double*>(a[5] == Py_None ? nullptr : address(kept.get()));
    if (means) {
      if (weight != Py_None) {  // () or (B,), which torch multiplies by
        const auto view = dense(weight);
        Dtype dtype;
        if (!view || !view->dtype(dtype) || view->dims() > 1 || (view->dims() && view->size(0) != batch_.B))
          return Py_NewRef(Py_None);
      }
      const Owned made(one_for_each());
      LossArgs alone{Reduction::none};
      alone.per_sample = address(made.get()), alone.kept = counts;
      launch_loss(args, alone, workspace);
      PyObject* const grad = wanted ? Py_True : Py_None;
      return PyTuple_Pack(7, made.get(), grad, Py_None, table_, index(), kept.get(), Py_None);
    }

    LossArgs of_loss{};
    if (!read_weight(weight, of_loss) || (learns && (leading_ > 1 || !is_ours()))) return Py_NewRef(Py_None);
    const Owned loss(new_numbers(kOne)), means_of(learns ? one_for_each() : Py_NewRef(Py_None));
    const Owned grad(later ? Py_NewRef(Py_False) : wanted ? empty_like_first(args.grad.data) : Py_NewRef(Py_None));
    const Owned also(columns[4] == kAbsent ? Py_NewRef(Py_None) : new_numbers(kTwo));
    if (!is_ours()) {
      if (!table_) return Py_NewRef(Py_None);
      const Owned operands(PyTuple_Pack(4, pred, y, z, noise)), rows(PyTuple_Pack(2, table_, index()));
      const Owned results(PyTuple_Pack(3, loss.get(), later ? Py_None : grad.get(), also.get()));
      launch_elsewhere(names().fast_loss, spec.owner, operands.get(), rows.get(), weight, results.get());
    } else {
      of_loss.reduction = static_cast<Reduction>(spec.reduction);
      of_loss.loss = address(loss.get()), of_loss.kept = counts;
      of_loss.weight_column = columns[3];
      of_loss.also_columns[0] = columns[4], of_loss.also_columns[1] = columns[5];
      if (also.get() != Py_None) of_loss.also = address(also.get());
      if (learns) of_loss.per_sample = address(means_of.get());
      launch_loss(args, of_loss, workspace);
    }
    return PyTuple_Pack(7, loss.get(), grad.get(), also.get(), table_ ? table_ : Py_None, index(), kept.get(),
                        means_of.get());
  }

 protected:
  // given: pred, y, z, noise, mask, source, key. What a column leaves out is checked, and not read.
  bool read_residual(const LossObject& spec, PyObject* const* given, ResidualArgs& args) {
    PyObject *pred = given[0], *y = given[1], *z = given[2], *noise = given[3];
    if (!read_first(pred) || !read_another(y, args.y) || !read_another(z, args.z) ||
        !read_source(given[5], given[6], args.table) || !read_its_noise(noise, args.noise) || !read_mask(given[4], args) ||
        learned_)
      return false;
    const int* columns = spec.columns;
    if (columns[0] == kAbsent)
      args.y = {};
    else if (y == Py_None)
      return false;
    if (columns[1] == kAbsent)
      args.z = {}, args.noise = {};
    else if ((z == Py_None) == (noise == Py_None))
      return false;
    args.batch = batch_;
    args.pred.data = first_->data();
    std::copy_n(columns, 3, args.columns);
    args.penalty = static_cast<Penalty>(spec.kind);
    return true;
  }

  // None, or a number for each row.
  bool read_weight(PyObject* weight, LossArgs& of_loss) const {
    if (weight == Py_None) return true;
    const auto view = dense(weight);
    Dtype dtype;
    if (!view || !view->dtype(dtype) || (dtype != Dtype::f32 && dtype != Dtype::f64) ||
        view->elements() != batch_.B || view->dims() != leading_)
      return false;
    of_loss.weight = view->data(), of_loss.weight_is_double = dtype == Dtype::f64;
    return true;
  }

  enum Shape { kOne, kTwo };  // (), (2,)

  bool read_mask(PyObject* mask, ResidualArgs& args) const {
    if (mask == Py_None) return true;
    if (leading_ > 1 || is_for_gpu() || !is_ours()) return false;
    if (!PyTuple_Check(mask)) {
      const auto view = dense(mask);
      if (!view || !view->is_bool() || !view->has_shape_of(*first_)) return false;
      args.mask.data = view->data();
      return true;
    }
    const auto thresholds = dense(PyTuple_GET_ITEM(mask, 1));
    if (!thresholds || !thresholds->is_int64() || thresholds->dims() != 2) return false;
    args.choice.thresholds = static_cast<const int64_t*>(thresholds->data());
    args.choice.rows = thresholds->size(0);
    args.choice.keeps = PyTuple_GET_ITEM(mask, 2) == Py_True;
    return (args.choice.rows == 1 || args.choice.rows == batch_.B) &&
           read_its_noise(PyTuple_GET_ITEM(mask, 0), args.choice.noise);
  }

  // (B,) doubles.
  PyObject* count_kept(const ResidualArgs& args) const {
    Owned kept(new_tensor(Py_BuildValue("(L)", static_cast<long long>(batch_.B)), dae::torch().f64));
    auto* const counts = static_cast<double*>(address(kept.get()));
    const MaskArgs of_mask{batch_, args.mask, args.choice};
    launch([&](const Api& api, Queue queue) { return api.mask_count(of_mask, counts, {}, queue); });
    return kept.release();
  }

  void launch_loss(const ResidualArgs& args, const LossArgs& loss, PyObject* workspace) const {
    std::optional<Owned> scratch;  // until the kernel is launched
    Scratch room;
    if (is_for_gpu()) {
      const Owned device = attribute(x_, names().device);
      const Owned doubles(PyLong_FromLongLong(scratch_doubles(batch_.B, batch_.D, 1)));
      PyObject* const given[] = {device.get(), doubles.get()};
      scratch.emplace(PyObject_Vectorcall(workspace, given, 2, nullptr));
      room = {static_cast<double*>(address(PyTuple_GET_ITEM(scratch->get(), 0))),
              static_cast<uint32_t*>(address(PyTuple_GET_ITEM(scratch->get(), 1)))};
    }
    launch([&](const Api& api, Queue queue) { return api.residual(args, loss, room, queue); });
  }

  PyObject* one_for_each() const { return new_tensor(Py_BuildValue("(L)", static_cast<long long>(batch_.B))); }

  // Of the compute type, on the first tensor's device. Like a tensor that is kept: torch.empty itself takes longer.
  PyObject* new_numbers(Shape shape) const {
    static std::map<std::array<int, 3>, PyObject*> kept;
    PyObject*& like = kept[{shape, first_->device(), batch_.dtype == Dtype::f64}];
    if (!like) like = new_tensor(shape == kOne ? PyTuple_New(0) : Py_BuildValue("(i)", 2));
    PyObject* const given[] = {like};
    return PyObject_Vectorcall(TorchState::get().empty_like, given, 1, nullptr);
  }
};

// (loss, pred, y, z, noise, mask, table, t, weight, upstream, kept, into): the gradient of pred alone, on the CPU, times
// upstream, a number of the loss's dtype or None. kept: what fast_loss found, or None; into: where it is put, or None.
class FastLossGrad : FastLoss {
 public:
  static constexpr Py_ssize_t kArguments = 12;
  static constexpr const char* kName = "fast_loss_grad";

  PyObject* run(PyObject* const* a) {
    const LossObject& spec = loss_of(a[0]);
    PyObject *mask = a[5], *upstream = a[9], *into = a[11];
    ResidualArgs args{};
    LossArgs of_loss{static_cast<Reduction>(spec.reduction)};
    if (!read_residual(spec, a + 1, args) || is_for_gpu() || !is_ours() || leading_ > 1 || !read_weight(a[8], of_loss))
      return Py_NewRef(Py_None);
    if (upstream != Py_None) {
      const auto view = dense(upstream);
      Dtype dtype;
      const Dtype wanted = batch_.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
      if (!view || view->dims() || !view->dtype(dtype) || dtype != wanted || is_negated(upstream)) return Py_NewRef(Py_None);
      of_loss.upstream = view->data();
    }
    const Owned kept(mask == Py_None || a[10] != Py_None ? Py_NewRef(a[10]) : count_kept(args));
    if (kept.get() != Py_None) of_loss.kept = static_cast<const double*>(address(kept.get()));
    of_loss.weight_column = spec.columns[3];
    const Owned grad(into == Py_None ? empty_like_first(args.grad.data) : Py_NewRef(into));
    if (into != Py_None) args.grad.data = address(into);
    launch([&](const Api& api, Queue queue) { return api.residual(args, of_loss, {}, queue); });
    return Py_NewRef(grad.get());
  }
};

// (noise, shape, dtype, device): its normals.
class FastNormal : FastCall {
 public:
  static constexpr Py_ssize_t kArguments = 4;
  static constexpr const char* kName = "fast_normal";

  PyObject* run(PyObject* const* a) {
    static PyObject *const empty = member("torch", "empty"), *const device_type = member("torch", "device"),
                           *const options = Py_BuildValue("(ss)", "dtype", "device");
    PyObject *noise = a[0], *shape = a[1], *dtype = a[2], *device = a[3];
    const bool places = PyUnicode_CheckExact(device) || reinterpret_cast<PyObject*>(Py_TYPE(device)) == device_type;
    if (!places || Py_TYPE(dtype) != Py_TYPE(dae::torch().f32) || !is_shape(shape) || !nothing_around(TorchState::get()))
      return Py_NewRef(Py_None);
    PyObject* const given[] = {shape, dtype, device};
    PyObject* const made = PyObject_Vectorcall(empty, given, 1, options);
    if (!made) return PyErr_Clear(), Py_NewRef(Py_None);  // the general way says what is wrong
    const Owned out(made);
    static const double one = 1;
    static const float one_as_float = 1;
    AffineArgs args{};
    if (!read_plain(made) || !is_ours() || !read_its_noise(noise, args.noise)) return Py_NewRef(Py_None);
    args.batch = batch_;
    args.out.data = first_->data();
    std::fill_n(args.columns, 8, kAbsent);
    args.columns[2] = 0;
    args.table = {batch_.dtype == Dtype::f64 ? static_cast<const void*>(&one) : &one_as_float, 1, 1, nullptr, false, {one}};
    if (is_for_gpu()) args.table.data = nullptr;
    launch([&](const Api& api, Queue queue) { return api.affine(args, queue); });
    return Py_NewRef(made);
  }

 private:
  static bool is_shape(PyObject* shape) {
    if (!PyTuple_Check(shape) || !PyTuple_GET_SIZE(shape)) return false;  // a torch.Size too
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape); ++i)
      if (!PyLong_CheckExact(PyTuple_GET_ITEM(shape, i))) return false;
    return true;
  }
};

template <class Call>
PyObject* plain(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != Call::kArguments)
    return PyErr_Format(PyExc_TypeError, "%s takes %zd arguments", Call::kName, Call::kArguments);
  try {
    return Call().run(arguments);
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

bool read_ints(PyObject* tuple, int* to, Py_ssize_t least, Py_ssize_t most) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) < least || PyTuple_GET_SIZE(tuple) > most) {
    PyErr_SetString(PyExc_TypeError, "dae_fast: a tuple of column numbers of another length");
    return false;
  }
  for (Py_ssize_t i = 0; i < most; ++i)
    to[i] = i < PyTuple_GET_SIZE(tuple) ? static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, i))) : kAbsent;
  return !PyErr_Occurred();
}

// (op, columns with those of a fifth stream last, inner or None, slots, owner).
PyObject* new_map(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *op, *columns, *inner, *slots, *owner;
  if (!PyArg_ParseTuple(args, "UOOOO", &op, &columns, &inner, &slots, &owner)) return nullptr;
  auto* const map = reinterpret_cast<MapObject*>(type->tp_alloc(type, 0));
  if (!map) return nullptr;
  map->op = Py_NewRef(op), map->owner = owner;
  map->clamped = inner != Py_None;
  map->gates = map->clamped && PyTuple_Check(inner) && PyTuple_GET_SIZE(inner) == 5;
  std::fill_n(map->inner, 5, kAbsent);
  int all[10];
  if (!read_ints(columns, all, 4, 10) || (map->clamped && !read_ints(inner, map->inner, 3, 5)) ||
      !read_ints(slots, map->slots, 1, 5)) {
    Py_DECREF(map);
    return nullptr;
  }
  const int given = static_cast<int>(PyTuple_GET_SIZE(columns));
  map->outputs = given / 4, map->inputs = static_cast<int>(PyTuple_GET_SIZE(slots));
  map->five = given % 4 != 0;
  std::fill_n(map->columns, 8, kAbsent), std::fill_n(map->fifth, 2, kAbsent);
  std::copy_n(all, 4 * map->outputs, map->columns);
  map->blends = all[1] == kBlend;
  if (map->blends) map->columns[1] = map->columns[3] = kAbsent;
  if (map->five) std::copy_n(all + 4 * map->outputs, map->outputs, map->fifth);
  for (int i = 0; i < map->inputs; ++i) {
    if (map->slots[i] >= 0 && map->slots[i] < 5) continue;
    Py_DECREF(map);
    return PyErr_Format(PyExc_ValueError, "dae_fast: no slot %d", map->slots[i]);
  }
  return reinterpret_cast<PyObject*>(map);
}

void delete_map(PyObject* self) {
  Py_XDECREF(reinterpret_cast<MapObject*>(self)->op);
  Py_TYPE(self)->tp_free(self);
}

// (kind, reduction, columns, owner).
PyObject* new_loss(PyTypeObject* type, PyObject* args, PyObject*) {
  int kind, reduction;
  PyObject *columns, *owner;
  if (!PyArg_ParseTuple(args, "iiOO", &kind, &reduction, &columns, &owner)) return nullptr;
  if (kind < 0 || kind >= static_cast<int>(std::size(kPenalties)) || reduction < 0 ||
      reduction >= static_cast<int>(std::size(kReductions)))
    return PyErr_Format(PyExc_ValueError, "dae_fast: no kind %d or no reduction %d", kind, reduction);
  auto* const loss = reinterpret_cast<LossObject*>(type->tp_alloc(type, 0));
  if (!loss) return nullptr;
  loss->kind = kind, loss->reduction = reduction, loss->owner = owner;
  if (read_ints(columns, loss->columns, 6, 6)) return reinterpret_cast<PyObject*>(loss);
  Py_DECREF(loss);
  return nullptr;
}

PyTypeObject make_type(const char* name, Py_ssize_t size, newfunc make, destructor drop) {
  PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  type.tp_name = name, type.tp_basicsize = size, type.tp_flags = Py_TPFLAGS_DEFAULT;
  type.tp_new = make, type.tp_dealloc = drop;
  return type;
}

PyTypeObject g_map_type = make_type("dae_fast._core.Map", sizeof(MapObject), new_map, delete_map);
PyTypeObject g_loss_type = make_type("dae_fast._core.Loss", sizeof(LossObject), new_loss, nullptr);

// Whether every value of a plain tensor on the CPU lies within [low, high]; None where nobody can look.
PyObject* all_within(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "all_within takes 3 arguments");
  try {
    const auto view = View::of_plain(arguments[0]);
    Dtype dtype;
    if (!view || !view->is_cpu() || !view->is_contiguous() || !view->dtype(dtype) || is_negated(arguments[0]) ||
        (dtype != Dtype::f32 && dtype != Dtype::f64) || !nothing_around(TorchState::get()))
      Py_RETURN_NONE;
    const double low = PyFloat_AsDouble(arguments[1]), high = PyFloat_AsDouble(arguments[2]);
    if (PyErr_Occurred()) return nullptr;
    bool within = true;
    for (int64_t i = 0; i < view->elements(); ++i) {
      const double v = dtype == Dtype::f64 ? static_cast<const double*>(view->data())[i]
                                           : static_cast<double>(static_cast<const float*>(view->data())[i]);
      within &= v >= low && v <= high;
    }
    return PyBool_FromLong(within);
  } catch (const PythonError&) {
    return nullptr;
  }
}

// Whether tensors (None: none), the first of which is there, are plain, with nothing around the call, and kernels run on
// the first one's device.
PyObject* are_plain(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  try {
    if (!nothing_around(TorchState::get())) Py_RETURN_FALSE;
    for (Py_ssize_t k = 0; k < count; ++k) {
      if (tensors[k] == Py_None) continue;
      const auto view = View::of_plain(tensors[k]);
      if (!view || is_negated(tensors[k]) || (!k && launcher_of(*view) == Py_None)) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
  } catch (const PythonError&) {
    return nullptr;
  }
}

// Whether a gradient from upstream changes nothing: a plain number in the CPU's memory, which is 1.
PyObject* is_one(PyObject*, PyObject* upstream) {
  try {
    const auto view = View::of_plain(upstream);
    Dtype dtype;
    const bool readable = view && view->is_cpu() && view->dims() == 0 && view->dtype(dtype) && !is_negated(upstream) &&
                          nothing_around(TorchState::get());
    if (readable && dtype == Dtype::f32) return PyBool_FromLong(*static_cast<const float*>(view->data()) == 1);
    if (readable && dtype == Dtype::f64) return PyBool_FromLong(*static_cast<const double*>(view->data()) == 1);
    Py_RETURN_FALSE;
  } catch (const PythonError&) {
    return nullptr;
  }
}

PyMethodDef method(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t), const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

template <class Call>
PyMethodDef fast_method() {
  return method(Call::kName, plain<Call>, "None where the call is not plain: gradients, strides, modes, or bad input.");
}

PyObject* use_fast(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "use_fast takes 2 arguments");
  PyObject** const launchers[] = {&g_on_cpu, &g_on_gpu};
  for (int k = 0; k < 2; ++k) *launchers[k] = Py_NewRef(arguments[k]);  // modules, which stay
  Py_RETURN_NONE;
}

PyObject* use_gradients(PyObject*, PyObject* function) {
  g_with_gradients = Py_NewRef(function);  // of a module, which stays
  Py_RETURN_NONE;
}

PyMethodDef g_methods[] = {
    fast_method<FastMap>(),
    fast_method<FastStep>(),
    fast_method<FastLoss>(),
    fast_method<FastLossGrad>(),
    fast_method<FastNormal>(),
    method("use_fast", use_fast, "Who launches plain calls on the CPU, and on a GPU."),
    {"use_gradients", use_gradients, METH_O, "What is called for plain calls of the affine map that want gradients."},
    method("are_plain", are_plain, "Whether tensors are plain, with nothing around the call."),
    {"is_one", is_one, METH_O, "Whether a plain number in the CPU's memory is 1."},
    method("all_within", all_within, "Whether a plain tensor's values on the CPU lie within bounds."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

const LossObject& loss_of(PyObject* object) {
  if (Py_TYPE(object) == &g_loss_type) return *reinterpret_cast<LossObject*>(object);
  PyErr_SetString(PyExc_TypeError, "dae_fast: no Loss of the core");
  throw PythonError();
}

void fill_map(PyObject* map, AffineArgs& args) { as_map(map).fill(args); }

bool is_stored(PyObject* map, PyObject* noise) { return as_map(map).five && is_tensor(noise); }

const Api*& cuda_api() {
  static const Api* api = nullptr;
  return api;
}

const Api& api_of(const Queue& queue) { return queue.device < 0 ? cpu::kApi : *cuda_api(); }

OnDevice::OnDevice(const Queue& queue) {
  if (queue.device < 0 || cuda_api()->current_device() == queue.device) return;
  const Owned torch_cuda(PyImport_ImportModule("torch.cuda"));
  changed_.emplace(PyObject_CallMethod(torch_cuda.get(), "device", "i", queue.device));
  Owned(PyObject_CallMethod(changed_->get(), "__enter__", nullptr));
}

OnDevice::~OnDevice() {
  if (!changed_) return;
  PyObject* const nothing = PyObject_CallMethod(changed_->get(), "__exit__", "OOO", Py_None, Py_None, Py_None);
  if (!nothing) PyErr_WriteUnraisable(changed_->get());
  Py_XDECREF(nothing);
}

Queue queue_of(PyObject* tensor) { return queue_of_view(View(tensor)); }

Table read_table(PyObject* table, PyObject* index, bool for_gpu) {
  const View view(table);
  Table t{view.data(), view.size(0), view.size(1), nullptr, false, {}};
  if (for_gpu && view.is_cpu() && t.rows == 1) {
    if (t.columns > kMaxConstants) {
      PyErr_Format(PyExc_RuntimeError, "dae_fast: a row of %zd constants", static_cast<Py_ssize_t>(t.columns));
      throw PythonError();
    }
    Dtype dtype = Dtype::f32;
    view.dtype(dtype);
    for (int64_t i = 0; i < t.columns; ++i)
      t.constants[i] = dtype == Dtype::f64 ? static_cast<const double*>(t.data)[i] : static_cast<const float*>(t.data)[i];
    t.data = nullptr;
  }
  if (index != Py_None) {
    const View rows(index);
    t.index = rows.data();
    t.index_is_int64 = rows.is_int64();
  }
  return t;
}

int64_t bad_level(const Table& t, int64_t B) {
  if (!t.index) return -1;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t i =
        t.index_is_int64 ? static_cast<const int64_t*>(t.index)[b] : static_cast<const int32_t*>(t.index)[b];
    if (i < 0 || i >= t.rows) return b;
  }
  return -1;
}

void add_fast_calls(PyObject* module) {
  if (PyModule_AddFunctions(module, g_methods)) throw PythonError();
  for (PyTypeObject* type : {&g_map_type, &g_loss_type})
    if (PyModule_AddType(module, type)) throw PythonError();
}

}  // namespace dae
