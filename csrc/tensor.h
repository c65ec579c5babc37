// Tensors and noise as the kernels take them, read off Python objects and through DLPack: no torch header, so that one
// build serves every torch. A missing argument is None.
#pragma once

#include <Python.h>

#include <initializer_list>
#include <optional>
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

// A module's member, for good.
PyObject* member(const char* module, const char* name);

// Names of attributes, made once: Python compares them by address.
struct Names {
  PyObject *dtype, *shape, *device, *requires_grad, *is_neg;
  PyObject *seed, *offset, *key_tensor, *sample, *first_sample, *span, *fold_in;  // of a Noise
  PyObject *schedule, *t, *tables, *alpha, *sigma;                // of a Level and its Schedule
  PyObject* columns;                                              // of a LevelOp
  PyObject *fast_map, *fast_loss;                              // of a backend in Python
};
const Names& names();

// Torch's objects that are recognised by address.
struct Torch {
  PyObject *tensor, *parameter;  // types
  PyObject *f32, *f64;
};
const Torch& torch();

inline Owned attribute(PyObject* object, PyObject* name) { return Owned(PyObject_GetAttr(object, name)); }
inline Owned call(PyObject* object, PyObject* method) { return Owned(PyObject_CallMethodNoArgs(object, method)); }
inline bool is_true(const Owned& value) { return value.get() == Py_True; }
int64_t to_int(const Owned& value);

// DLPack's DLTensor (version 1), an ABI that does not change.
struct DlTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};

constexpr int kDlCpu = 1, kDlCuda = 2, kDlRocm = 10;  // its device types

// A tensor's memory, while the tensor lives.
class View : DlTensor {
 public:
  // Raises what torch raises for a tensor that has no memory, a sparse one say.
  explicit View(PyObject* tensor);
  // Nothing of one of those, or of what is no plain torch.Tensor or Parameter.
  static std::optional<View> of_plain(PyObject* tensor);

  void* data() const { return static_cast<char*>(DlTensor::data) + byte_offset; }
  int dims() const { return ndim; }
  int64_t size(int d) const { return shape[d]; }
  int64_t stride(int d) const { return strides[d]; }
  bool is_contiguous() const;
  bool has_shape_of(const View& other) const;

  // False: no type that kernels compute in.
  bool dtype(Dtype& found) const;
  bool is_bool() const { return type_code == kBool && bits == 8; }
  bool is_int64() const { return type_code == kInt && bits == 64; }
  bool is_index() const { return type_code == kInt && (bits == 64 || bits == 32); }
  int64_t elements() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  int64_t bytes() const { return elements() * bits / 8; }
  bool is_cpu() const { return device_type == kDlCpu; }
  bool is_gpu() const { return device_type == kDlCuda || device_type == kDlRocm; }
  int device() const { return is_cpu() ? -1 : device_id; }
  int type_of_device() const { return device_type; }
  bool is_on_device_of(const View& other) const {
    return device_type == other.device_type && device_id == other.device_id;
  }

 private:
  View() = default;

  static constexpr int kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;  // type codes
};

inline void* address(PyObject* tensor) { return View(tensor).data(); }
// torch's current stream of the GPU that a tensor is on.
void* current_stream(const View& tensor);

// raw: every row is the key's own stream. A key in host memory is read now; on a GPU, in the kernel.
// row: the elements of one row of the batch. rows: of a sample, where the noise does not say. False where its rows do
// not begin with whole Philox blocks.
// key, sample: its attributes of these names.
bool read_noise(PyObject* noise, PyObject* key, PyObject* sample, bool raw, int64_t row, int64_t rows, Noise& read);
// As the kernels' general way has it: its rows do.
Noise read_noise(PyObject* noise, bool raw, int64_t row);

// The operands of one call: tensors of one shape, `like` being one of them, each of any strides.
class Operands {
 public:
  static constexpr int kMax = 7;

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
