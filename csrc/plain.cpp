#include "plain.h"

#include "nvtx.h"

namespace dae {

namespace {

// What is asked of torch at every call.
struct TorchState {
  PyObject *is_grad_enabled, *in_functorch, *dispatch_modes, *function_modes, *forward_ad, *profiling, *current_stream,
      *empty_like;
  PyObject *current_level;  // the name of an attribute

  static PyObject* member(const char* module, const char* name) {
    const Owned from(PyImport_ImportModule(module));
    return Owned(PyObject_GetAttrString(from.get(), name)).release();
  }
  static const TorchState& get() {
    // A CPU build of torch has no streams.
    static const TorchState known = [] {
      TorchState s = {member("torch", "is_grad_enabled"),
                      member("torch._C", "_are_functorch_transforms_active"),
                      member("torch._C", "_len_torch_dispatch_stack"),
                      member("torch._C", "_is_torch_function_mode_enabled"),
                      member("torch.autograd", "forward_ad"),
                      member("torch.autograd", "_profiler_enabled"),
                      nullptr,
                      member("torch", "empty_like"),
                      Owned(PyUnicode_InternFromString("_current_level")).release()};
      const Owned c(PyImport_ImportModule("torch._C"));
      s.current_stream = PyObject_GetAttrString(c.get(), "_cuda_getCurrentRawStream");
      if (!s.current_stream) PyErr_Clear();
      return s;
    }();
    return known;
  }
};

bool g_plain = true;
bool g_pretend_gpu = false;

bool asks_true(PyObject* function) { return is_true(Owned(PyObject_CallNoArgs(function))); }

// No transform, mode or dual level around the call, and nobody who wants its range (dae_fast/ranges.py).
bool nothing_around(const TorchState& torch) {
  return !nvtx::listens() && !asks_true(torch.profiling) && !asks_true(torch.in_functorch) &&
         to_int(Owned(PyObject_CallNoArgs(torch.dispatch_modes))) == 0 && !asks_true(torch.function_modes) &&
         to_int(attribute(torch.forward_ad, torch.current_level)) < 0;
}

// A dense tensor that kernels read as it lies in memory.
bool is_plain_tensor(PyObject* t) {
  const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
  return (type == dae::torch().tensor || type == dae::torch().parameter) && is_contiguous(t) &&
         !is_true(call(t, names().is_neg));
}

int64_t device_number(PyObject* t) { return to_int(call(t, names().get_device)); }

int64_t first_size(PyObject* t) {
  const Owned shape = attribute(t, names().shape);
  return PyTuple_GET_SIZE(shape.get()) ? PyLong_AsLongLong(PyTuple_GET_ITEM(shape.get(), 0)) : -1;
}

// One call, as far as it has been read: the arguments and the result of the first thing that is not plain.
class PlainAffine {
 public:
  // (columns, x, y, z, noise, name, source); source is a Level whose schedule has a table of that name, or a
  // table of one row or of one for each sample.
  static PyObject* run(PyObject* const* arguments) {
    PlainAffine call;
    return call.read(arguments) ? call.launch() : Py_NewRef(Py_None);
  }

 private:
  bool read(PyObject* const* a) {
    const TorchState& torch = TorchState::get();
    if (!g_plain || !nothing_around(torch)) return false;
    x_ = a[1];
    if (!is_plain_tensor(x_) || !read_dtype(x_, args_.batch.dtype)) return false;
    device_ = device_number(x_);
    if (!is_on_device(x_) || (device_ >= 0 && !cuda_api())) return false;
    const Owned shape = attribute(x_, names().shape), dtype = attribute(x_, names().dtype);
    if (!read_shape(shape.get())) return false;
    const bool grad = asks_true(torch.is_grad_enabled);
    for (int i = 0; i < 6; ++i)
      args_.columns[i] = i < 3 ? static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(a[0], i))) : kAbsent;
    Operand* operands[] = {&args_.x, &args_.y, &args_.z};
    for (int k = 0; k < 3; ++k) {
      PyObject* t = a[1 + k];
      if (t == Py_None) continue;
      if (k && !(is_plain_tensor(t) && attribute(t, names().dtype).get() == dtype.get() && is_on_device(t) &&
                 PyObject_RichCompareBool(attribute(t, names().shape).get(), shape.get(), Py_EQ) == 1))
        return false;
      if (grad && is_true(attribute(t, names().requires_grad))) return false;
      if (args_.columns[k] != kAbsent) operands[k]->data = address(t);
    }
    return read_its_noise(a[4]) && read_source(a[5], a[6], grad);
  }

  bool read_shape(PyObject* shape) {
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
    if (!ndim) return false;
    args_.batch.B = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, 0));
    args_.batch.D = 1;
    for (Py_ssize_t d = 1; d < ndim; ++d) args_.batch.D *= PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d));
    return args_.batch.B && args_.batch.D;
  }

  // Of the CPU, number -1, or of a GPU; there are others with the same numbers.
  bool is_on_device(PyObject* t) const {
    return device_number(t) == device_ && is_true(attribute(t, device_ < 0 ? names().is_cpu : names().is_cuda));
  }

  bool is_of_samples(PyObject* t) const {
    return first_size(t) == args_.batch.B && is_on_device(t) && is_plain_tensor(t);
  }

  bool read_its_noise(PyObject* noise) {
    if (noise == Py_None) return true;
    const Owned sample = attribute(noise, names().sample), key = attribute(noise, names().key_tensor);
    if (sample.get() != Py_None && !is_of_samples(sample.get())) return false;
    if (key.get() != Py_None && !(is_plain_tensor(key.get()) && is_on_device(key.get()))) return false;
    args_.noise = read_noise(noise, false);
    return true;
  }

  bool read_source(PyObject* name, PyObject* source, bool grad) {
    if (name == Py_None) {
      if (grad && is_true(attribute(source, names().requires_grad))) return false;
      args_.table = read_table(source, Py_None);
      return true;
    }
    const Owned schedule = attribute(source, names().schedule);
    if (schedule.get() == Py_None) return false;
    const Owned tables = attribute(schedule.get(), names().tables), device = attribute(x_, names().device);
    const Owned place(PyTuple_Pack(3, name, args_.batch.dtype == Dtype::f64 ? dae::torch().f64 : dae::torch().f32, device.get()));
    PyObject* table = PyDict_GetItemWithError(tables.get(), place.get());
    if (!table) {
      if (PyErr_Occurred()) throw PythonError();
      return false;  // not made yet
    }
    const Owned t = attribute(source, names().t);
    if (PyLong_Check(t.get())) {
      args_.table = read_table(table, Py_None);
      const int64_t size = args_.batch.dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
      args_.table.data = static_cast<const char*>(args_.table.data) + to_int(t) * args_.table.columns * size;
      args_.table.rows = 1;
      return true;
    }
    if (!is_of_samples(t.get())) return false;
    args_.table = read_table(table, t.get());
    return device_ >= 0 || bad_level(args_.table, args_.batch.B) < 0;
  }

  PyObject* launch() {
    PyObject* const given[] = {x_};
    Owned out(PyObject_Vectorcall(TorchState::get().empty_like, given, 1, nullptr));
    args_.out.data = address(out.get());
    const Queue queue = queue_of(x_);
    const char* error;
    if (queue.device < 0 && args_.batch.B * args_.batch.D > kReleaseGil) {
      Py_BEGIN_ALLOW_THREADS;
      error = api_of(queue).affine(args_, queue);
      Py_END_ALLOW_THREADS;
    } else {
      error = api_of(queue).affine(args_, queue);
    }
    if (error) {
      PyErr_Format(PyExc_RuntimeError, "dae_fast: CUDA error: %s", error);
      throw PythonError();
    }
    return out.release();
  }

  AffineArgs args_{};
  PyObject* x_ = nullptr;
  int64_t device_ = -1;
};

constexpr Py_ssize_t kArguments = 7;

PyObject* plain_affine(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kArguments) return PyErr_Format(PyExc_TypeError, "plain_affine takes %zd arguments", kArguments);
  try {
    return PlainAffine::run(arguments);
  } catch (const PythonError&) {
    return nullptr;
  }
}

PyObject* use_plain(PyObject*, PyObject* yes) {
  g_plain = yes == Py_True;
  Py_RETURN_NONE;
}

PyObject* pretend_gpu(PyObject*, PyObject* yes) {
  g_pretend_gpu = yes == Py_True;
  Py_RETURN_NONE;
}

PyMethodDef g_methods[] = {
    {"plain_affine", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_affine)), METH_FASTCALL,
     "A new tensor, or None where the call is not plain: gradients, strides, modes, or bad input."},
    {"use_plain", use_plain, METH_O, "Whether plain calls are taken at all."},
    {"pretend_gpu", pretend_gpu, METH_O, "Sends CPU tensors to a CUDA library that was compiled for the CPU, to test it."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

const Api*& cuda_api() {
  static const Api* api = nullptr;
  return api;
}

const Api& api_of(const Queue& queue) { return queue.device < 0 ? cpu::kApi : *cuda_api(); }

Queue queue_of(PyObject* tensor) {
  if (g_pretend_gpu) return {0, nullptr};
  const int64_t device = device_number(tensor);
  if (device < 0) return {};
  const Owned index(PyLong_FromLongLong(device));
  const Owned stream(PyObject_CallOneArg(TorchState::get().current_stream, index.get()));
  return {static_cast<int>(device), PyLong_AsVoidPtr(stream.get())};
}

Table read_table(PyObject* table, PyObject* index) {
  const Owned shape = attribute(table, names().shape);
  Table t{address(table), PyLong_AsLongLong(PyTuple_GET_ITEM(shape.get(), 0)),
          PyLong_AsLongLong(PyTuple_GET_ITEM(shape.get(), 1)), nullptr, false};
  if (index != Py_None) {
    t.index = address(index);
    t.index_is_int64 = attribute(index, names().dtype).get() == torch().i64;
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
