#include "plain.h"

#include <array>
#include <iterator>
#include <map>
#include <optional>

#include "nvtx.h"

namespace dae {

namespace {

// What is asked of torch at every call.
struct TorchState {
  PyObject *is_grad_enabled, *in_functorch, *dispatch_modes, *function_modes, *forward_ad, *profiling, *empty_like;
  PyObject *current_level;  // the name of an attribute

  static const TorchState& get() {
    static const TorchState known = {member("torch", "is_grad_enabled"),
                                     member("dae_fast._torch", "in_functorch"),
                                     member("dae_fast._torch", "dispatch_modes"),
                                     member("dae_fast._torch", "function_modes"),
                                     member("dae_fast._torch", "forward_ad"),
                                     member("dae_fast._torch", "profiling"),
                                     member("torch", "empty_like"),
                                     Owned(PyUnicode_InternFromString("_current_level")).release()};
    return known;
  }
};

// Who launches a device's plain calls: True, this module; a Python module with plain_affine and plain_loss; None: there
// are none.
PyObject *g_on_cpu = Py_True, *g_on_gpu = Py_True;
// What makes plain calls of the affine map differentiable: dae_fast/ops/affine.py's.
PyObject* g_with_gradients = Py_None;
bool g_pretend_gpu = false;

bool asks_true(PyObject* function) { return is_true(Owned(PyObject_CallNoArgs(function))); }

// No transform, mode or dual level around the call, and nobody who wants its range (dae_fast/profiling.py).
bool nothing_around(const TorchState& torch) {
  return !nvtx::listens() && !asks_true(torch.profiling) && !asks_true(torch.in_functorch) &&
         to_int(Owned(PyObject_CallNoArgs(torch.dispatch_modes))) == 0 && !asks_true(torch.function_modes) &&
         to_int(attribute(torch.forward_ad, torch.current_level)) < 0;
}

// torch takes a negated view's minus sign for a part of its values.
bool is_negated(PyObject* t) { return is_true(call(t, names().is_neg)); }

Queue queue_of_device(int device) {
  if (g_pretend_gpu) return {0, nullptr};
  return device < 0 ? Queue{} : Queue{device, current_stream(device)};
}

// What every plain call reads; each step says whether the call is still plain. A Python attribute of a tensor takes 40 to
// 90 ns to read.
class PlainCall {
 protected:
  bool read_first(PyObject* x) {
    if (!nothing_around(TorchState::get())) return false;
    x_ = x;
    first_ = View::of_plain(x);
    if (!first_) return false;
    const View& view = *first_;
    if (!view.is_contiguous() || !view.dtype(batch_.dtype) || !view.dims() || is_negated(x)) return false;
    launcher_ = view.is_cpu() ? g_on_cpu : (view.is_gpu() ? g_on_gpu : Py_None);
    if (launcher_ == Py_None || (is_ours() && view.is_gpu() && !cuda_api())) return false;
    batch_.B = view.size(0);
    batch_.D = 1;
    for (int d = 1; d < view.dims(); ++d) batch_.D *= view.size(d);
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

  bool wants_grad(PyObject* t) const {
    return is_true(attribute(t, names().requires_grad)) && asks_true(TorchState::get().is_grad_enabled);
  }

  bool is_for_gpu() const { return !first_->is_cpu() || g_pretend_gpu; }

  // Integers that kernels read as they lie in memory: how many along the first dimension, -1 where they are not so.
  int64_t length_of_dense(PyObject* t) const {
    const auto view = View::of_plain(t);
    return view && view->dims() && view->is_contiguous() && view->is_on_device_of(*first_) ? view->size(0) : -1;
  }

  bool read_its_noise(PyObject* noise, Noise& read) const {
    if (noise == Py_None) return true;
    const Owned sample = attribute(noise, names().sample), key = attribute(noise, names().key_tensor);
    if (sample.get() != Py_None && length_of_dense(sample.get()) != batch_.B) return false;
    if (key.get() != Py_None && length_of_dense(key.get()) < 0) return false;
    read = read_noise(noise, false);
    return true;
  }

  // source: a Level whose schedule has a table of that name; or a table, whose rows `name` tells: an int for the one of
  // all samples, a tensor for one of each, None for a table of one row or of one for each sample.
  bool read_source(PyObject* name, PyObject* source, Table& read) {
    if (!PyUnicode_Check(name)) {
      const auto view = View::of_plain(source);
      if (!view || view->dims() != 2 || !view->is_contiguous() || wants_grad(source)) return false;
      if (!view->is_on_device_of(*first_) && !(view->is_cpu() && view->size(0) == 1)) return false;
      table_ = source;
      return read_rows(name, read);
    }
    const Owned schedule = attribute(source, names().schedule);
    if (schedule.get() == Py_None) return false;
    const Owned tables = attribute(schedule.get(), names().tables), device = attribute(x_, names().device);
    const Owned place(PyTuple_Pack(3, name, compute_dtype(), device.get()));
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
    if (t != Py_None && length_of_dense(t) != batch_.B) return false;
    read = read_table(table_, t, is_for_gpu());
    return !first_->is_cpu() || bad_level(read, batch_.B) < 0;
  }

  // One row for all samples, which is there.
  void take_row(PyObject* i, Table& read) const {
    const int64_t size = batch_.dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
    if (read.data) read.data = static_cast<const char*>(read.data) + PyLong_AsLongLong(i) * read.columns * size;
    read.rows = 1;
  }

  PyObject* compute_dtype() const { return batch_.dtype == Dtype::f64 ? dae::torch().f64 : dae::torch().f32; }

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

  // launcher.name(aligned, shape, dtype, *arguments); aligned: every tensor lies on 16 bytes.
  template <class... Arguments>
  void launch_elsewhere(PyObject* name, Arguments... arguments) const {
    PyObject* const aligned = places_ % 16 ? Py_False : Py_True;
    const Owned shape = attribute(x_, names().shape), dtype = attribute(x_, names().dtype);
    PyObject* const given[] = {launcher_, aligned, shape.get(), dtype.get(), arguments...};
    const Owned nothing(PyObject_VectorcallMethod(name, given, sizeof...(arguments) + 4, nullptr));
  }

  // Without the GIL where it takes long; raises what went wrong.
  template <class Launch>
  void launch(Launch kernel) const {
    const Queue queue = queue_of_device(first_->device());
    const Api& api = api_of(queue);
    const OnDevice there(queue);
    const char* error;
    if (queue.device < 0 && batch_.B * batch_.D > kReleaseGil) {
      Py_BEGIN_ALLOW_THREADS;
      error = kernel(api, queue);
      Py_END_ALLOW_THREADS;
    } else {
      error = kernel(api, queue);
    }
    if (!error) return;
    PyErr_Format(PyExc_RuntimeError, "dae_fast: CUDA error: %s", error);
    throw PythonError();
  }

  PyObject *x_ = nullptr, *table_ = nullptr;
  std::optional<View> first_;  // of x
  Batch batch_{};

 private:
  PyObject* launcher_ = Py_None;
  uintptr_t places_ = 0;        // of all tensors, or-ed
  std::optional<Owned> index_;  // the table's rows
};

// (op, columns, x, y, z, noise, name, source, w, clamp); name and source as in read_source, columns and clamp as in
// bind.cpp's affine. The result is a new tensor, or with eight columns two; with their gradients, where one is wanted.
class PlainAffine : PlainCall {
 public:
  static constexpr Py_ssize_t kArguments = 10;
  static constexpr const char* kName = "plain_affine";

  PyObject* run(PyObject* const* a) {
    PyObject *op = a[0], *columns = a[1], *noise = a[5], *clamp = a[9];
    PyObject* given[] = {a[2], a[3], a[4], a[8]};  // x, y, z, w
    if (!read_first(given[0])) return Py_NewRef(Py_None);
    AffineArgs args{};
    Operand* const operands[] = {&args.x, &args.y, &args.z, &args.w};
    args.x.data = first_->data();
    for (int k = 1; k < 4; ++k)
      if (!read_another(given[k], *operands[k])) return Py_NewRef(Py_None);
    if (!read_its_noise(noise, args.noise) || !read_source(a[6], a[7], args.table)) return Py_NewRef(Py_None);
    args.batch = batch_;
    const Py_ssize_t count = PyTuple_GET_SIZE(columns);
    for (int i = 0; i < 8; ++i) args.columns[i] = i < count ? column(columns, i) : kAbsent;
    args.clamped = clamp != Py_None;
    if (args.clamped) {
      for (int i = 0; i < 3; ++i) args.inner[i] = column(clamp, i);
      args.lo = PyFloat_AsDouble(PyTuple_GET_ITEM(clamp, 3)), args.hi = PyFloat_AsDouble(PyTuple_GET_ITEM(clamp, 4));
    }

    bool differentiable = false;
    for (int k = 0; k < 4; ++k) {
      if (given[k] == Py_None) continue;
      if (wanted(args, k)) {
        differentiable |= wants_grad(given[k]);
      } else {  // checked, and not read
        operands[k]->data = nullptr;
        if (k == 0 && wants_grad(given[0])) return Py_NewRef(Py_None);
        if (k) given[k] = Py_None;
      }
    }
    if (differentiable) {
      PyObject* const passed[] = {op, given[0], given[1], given[2], noise, table_, index(), columns, clamp, given[3]};
      return PyObject_Vectorcall(g_with_gradients, passed, std::size(passed), nullptr);
    }
    const Owned out(empty_like_first(args.out.data));
    const Owned out2(count == 8 ? empty_like_first(args.out2.data) : Py_NewRef(Py_None));
    if (is_ours())
      launch([&](const Api& api, Queue queue) { return api.affine(args, queue); });
    else
      launch_elsewhere(names().plain_affine, columns, given[0], given[1], given[2], noise, given[3], clamp, table_,
                       index(), out.get(), out2.get());
    return out2.get() == Py_None ? Py_NewRef(out.get()) : PyTuple_Pack(2, out.get(), out2.get());
  }

 private:
  static int column(PyObject* tuple, int i) { return static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, i))); }

  // Operand k, by an output or by the estimate, which is of x, y and w.
  static bool wanted(const AffineArgs& args, int k) {
    const bool inside = args.clamped && k != 2 && args.inner[k == 3 ? 2 : k] != kAbsent;
    return inside || args.columns[k] != kAbsent || args.columns[4 + k] != kAbsent;
  }
};

// (pred, y, z, noise, columns, kind, reduction, name, source, scratch): the loss of pred against y and z or noise,
// without a mask or further weights; columns as in bind.cpp's residual. The result is (loss, its gradient or None if
// pred wants none, `also` or None without its columns, the table, its rows as read_source's name).
// scratch(device, doubles) is what a GPU's reduction needs.
class PlainLoss : PlainCall {
 public:
  static constexpr Py_ssize_t kArguments = 10;
  static constexpr const char* kName = "plain_loss";

  PyObject* run(PyObject* const* a) {
    ResidualArgs args{};
    if (!read_first(a[0]) || !read_another(a[1], args.y) || !read_another(a[2], args.z) ||
        !read_its_noise(a[3], args.noise) || !read_source(a[7], a[8], args.table))
      return Py_NewRef(Py_None);
    const bool wanted = wants_grad(a[0]);
    if (wanted && batch_.dtype == Dtype::f16) return Py_NewRef(Py_None);  // its scale is not known yet
    args.batch = batch_;
    args.pred.data = first_->data();
    int columns[6];
    for (int i = 0; i < 6; ++i) columns[i] = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(a[4], i)));
    for (int i = 0; i < 3; ++i) args.columns[i] = columns[i];
    PyObject *y = a[1], *z = a[2], *noise = a[3];
    if (columns[0] == kAbsent) y = Py_None, args.y = {};  // checked, and not read
    if (columns[1] == kAbsent) z = noise = Py_None, args.z = {}, args.noise = {};
    for (PyObject* t : {y, z})
      if (t != Py_None && wants_grad(t)) return Py_NewRef(Py_None);
    args.penalty = static_cast<Penalty>(PyLong_AsLong(a[5]));

    const Owned loss(new_numbers(kOne));
    const Owned grad(wanted ? empty_like_first(args.grad.data) : Py_NewRef(Py_None));
    const Owned also(columns[4] == kAbsent ? Py_NewRef(Py_None) : new_numbers(kTwo));
    if (!is_ours()) {
      launch_elsewhere(names().plain_loss, a[0], y, z, noise, a[4], a[5], a[6], table_, index(), loss.get(),
                       grad.get(), also.get());
    } else {
      LossArgs of_loss{};
      of_loss.reduction = static_cast<Reduction>(PyLong_AsLong(a[6]));
      of_loss.loss = address(loss.get());
      of_loss.weight_column = columns[3];
      of_loss.also_columns[0] = columns[4], of_loss.also_columns[1] = columns[5];
      if (also.get() != Py_None) of_loss.also = address(also.get());
      std::optional<Owned> scratch;  // until the kernel is launched
      Scratch room;
      if (is_for_gpu()) {
        const Owned device = attribute(x_, names().device);
        const Owned doubles(PyLong_FromLongLong(scratch_doubles(batch_.B, batch_.D, 1)));
        PyObject* const given[] = {device.get(), doubles.get()};
        scratch.emplace(PyObject_Vectorcall(a[9], given, 2, nullptr));
        room = {static_cast<double*>(address(PyTuple_GET_ITEM(scratch->get(), 0))),
                static_cast<uint32_t*>(address(PyTuple_GET_ITEM(scratch->get(), 1)))};
      }
      launch([&](const Api& api, Queue queue) { return api.residual(args, of_loss, room, queue); });
    }
    return PyTuple_Pack(5, loss.get(), grad.get(), also.get(), table_, index());
  }

 private:
  enum Shape { kOne, kTwo };  // (), (2,)

  // Of the compute type, on the first tensor's device. Like a tensor that is kept: torch.empty itself takes longer.
  PyObject* new_numbers(Shape shape) const {
    static std::map<std::array<int, 3>, PyObject*> kept;
    PyObject*& like = kept[{shape, first_->device(), batch_.dtype == Dtype::f64}];
    if (!like) like = make_numbers(shape);
    PyObject* const given[] = {like};
    return PyObject_Vectorcall(TorchState::get().empty_like, given, 1, nullptr);
  }

  PyObject* make_numbers(Shape shape) const {
    const Owned sizes(shape == kOne ? PyTuple_New(0) : Py_BuildValue("(i)", 2)), device = attribute(x_, names().device);
    const Owned empty(member("torch", "empty")), arguments(PyTuple_Pack(1, sizes.get()));
    const Owned options(Py_BuildValue("{sOsO}", "dtype", compute_dtype(), "device", device.get()));
    return Owned(PyObject_Call(empty.get(), arguments.get(), options.get())).release();
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
PyMethodDef plain_method() {
  return method(Call::kName, plain<Call>, "None where the call is not plain: gradients, strides, modes, or bad input.");
}

PyObject* use_plain(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "use_plain takes 2 arguments");
  PyObject** const launchers[] = {&g_on_cpu, &g_on_gpu};
  for (int k = 0; k < 2; ++k) *launchers[k] = Py_NewRef(arguments[k]);  // modules, which stay
  Py_RETURN_NONE;
}

PyObject* use_gradients(PyObject*, PyObject* function) {
  g_with_gradients = Py_NewRef(function);  // of a module, which stays
  Py_RETURN_NONE;
}

PyObject* pretend_gpu(PyObject*, PyObject* yes) {
  g_pretend_gpu = yes == Py_True;
  Py_RETURN_NONE;
}

PyMethodDef g_methods[] = {
    plain_method<PlainAffine>(),
    plain_method<PlainLoss>(),
    method("use_plain", use_plain, "Who launches plain calls on the CPU, and on a GPU."),
    {"use_gradients", use_gradients, METH_O, "What is called for plain calls of the affine map that want gradients."},
    {"is_one", is_one, METH_O, "Whether a plain number in the CPU's memory is 1."},
    {"pretend_gpu", pretend_gpu, METH_O, "Sends CPU tensors to a CUDA library compiled for the CPU, to test it."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

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

Queue queue_of(PyObject* tensor) { return queue_of_device(View(tensor).device()); }

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

void add_plain(PyObject* module) {
  if (PyModule_AddFunctions(module, g_methods)) throw PythonError();
}

}  // namespace dae
