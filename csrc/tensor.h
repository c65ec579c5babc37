// Tensors and noise as the kernels take them, read off Python objects: no torch header, so that one build
// serves every torch. A missing argument is None.
#pragma once

#include <Python.h>

#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "args.h"

namespace dae {

// Above this many elements the CPU works without the GIL: other Python threads may run meanwhile.
constexpr int64_t kReleaseGil = 1 << 15;

// A Python exception is set.
struct PythonError : std::exception {};

// A reference that is given back.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (!object) throw PythonError();
  }
  Owned(const Owned&) = delete;
  ~Owned() { Py_DECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    Py_INCREF(object);
    return object;
  }

 private:
  PyObject* object_;
};

// Names of attributes, made once: Python compares them by address.
struct Names {
  PyObject *data_ptr, *dtype, *shape, *stride, *device, *is_contiguous, *is_cpu, *is_cuda, *get_device, *requires_grad,
      *is_neg, *new_empty;
  PyObject *seed, *offset, *key_tensor, *sample, *first_sample;  // of a Noise
  PyObject *schedule, *t, *tables;                               // of a Level and its Schedule
  PyObject *plain_affine, *plain_loss;                           // of a backend in Python
};
const Names& names();

// Torch's objects that are recognised by address.
struct Torch {
  PyObject *tensor, *parameter;  // types
  PyObject *f32, *f64, *bf16, *f16, *i64, *i32;
};
const Torch& torch();

inline Owned attribute(PyObject* object, PyObject* name) { return Owned(PyObject_GetAttr(object, name)); }
inline Owned call(PyObject* object, PyObject* method) { return Owned(PyObject_CallMethodNoArgs(object, method)); }
inline bool is_true(const Owned& value) { return value.get() == Py_True; }
int64_t to_int(const Owned& value);

void* address(PyObject* tensor);
bool is_contiguous(PyObject* tensor);
// False: no type that kernels compute in.
bool is_compute_dtype(PyObject* dtype, Dtype& found);
bool read_dtype(PyObject* tensor, Dtype& dtype);
std::vector<int64_t> read_ints(const Owned& tuple);

// raw: every row is the key's own stream. A key in host memory is read now; on a GPU, in the kernel.
Noise read_noise(PyObject* noise, bool raw);

// The operands of one call: tensors of one shape, `like` being one of them, each of any strides.
class Operands {
 public:
  static constexpr int kMax = 6;

  // in_order: an element's place in its row matters to the op, as it does with noise.
  Operands(PyObject* like, std::initializer_list<PyObject*> tensors, bool in_order);
  Operands(const Operands&) = delete;

  const Operand& operator[](int k) const { return operands_[k]; }
  Batch batch;

 private:
  void merge_dimensions();
  bool is_one_stretch();

  Operand operands_[kMax];
  int count_ = 0;
  std::vector<int64_t> sizes_, strides_[kMax];  // strides with the batch's first; empty: contiguous or absent
};

}  // namespace dae
