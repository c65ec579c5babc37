#include "tensor.h"

#include <algorithm>
#include <numeric>

namespace dae {

namespace {

PyObject* intern(const char* name) { return Owned(PyUnicode_InternFromString(name)).release(); }

PyObject* member(const char* module, const char* name) {
  const Owned from(PyImport_ImportModule(module));
  return Owned(PyObject_GetAttrString(from.get(), name)).release();
}

}  // namespace

const Names& names() {
  static const Names known = {
      intern("data_ptr"),   intern("dtype"),         intern("shape"),  intern("stride"),     intern("device"),
      intern("is_contiguous"), intern("is_cpu"),     intern("is_cuda"), intern("get_device"), intern("requires_grad"),
      intern("is_neg"),     intern("new_empty"),     intern("_seed"),         intern("_offset"), intern("_key_tensor"), intern("_sample"),
      intern("_first_sample"), intern("_schedule"),  intern("_t"),     intern("_tables"),
      intern("plain_affine"),  intern("plain_loss")};
  return known;
}

const Torch& torch() {
  static const Torch known = {member("torch", "Tensor"),   member("torch.nn", "Parameter"), member("torch", "float32"),
                              member("torch", "float64"),  member("torch", "bfloat16"),     member("torch", "float16"),
                              member("torch", "int64"),    member("torch", "int32")};
  return known;
}

int64_t to_int(const Owned& value) {
  const int64_t result = PyLong_AsLongLong(value.get());
  if (result == -1 && PyErr_Occurred()) throw PythonError();
  return result;
}

void* address(PyObject* tensor) {
  const Owned value = call(tensor, names().data_ptr);
  return PyLong_AsVoidPtr(value.get());
}

bool is_contiguous(PyObject* tensor) { return is_true(call(tensor, names().is_contiguous)); }

bool is_compute_dtype(PyObject* dtype, Dtype& found) {
  const Torch& t = torch();
  if (dtype == t.f32) return found = Dtype::f32, true;
  if (dtype == t.bf16) return found = Dtype::bf16, true;
  if (dtype == t.f16) return found = Dtype::f16, true;
  if (dtype == t.f64) return found = Dtype::f64, true;
  return false;
}

bool read_dtype(PyObject* tensor, Dtype& dtype) {
  return is_compute_dtype(attribute(tensor, names().dtype).get(), dtype);
}

std::vector<int64_t> read_ints(const Owned& tuple) {
  std::vector<int64_t> values(PyTuple_GET_SIZE(tuple.get()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.get(), i));
  return values;
}

Noise read_noise(PyObject* noise, bool raw) {
  Noise n;
  if (noise == Py_None) return n;
  n.present = true;
  n.fold = !raw;
  const Owned key = attribute(noise, names().key_tensor), sample = attribute(noise, names().sample);
  if (key.get() == Py_None) {
    n.key = {static_cast<uint64_t>(to_int(attribute(noise, names().seed))),
             static_cast<uint64_t>(to_int(attribute(noise, names().offset)))};
  } else {
    const Key* at = static_cast<const Key*>(address(key.get()));
    if (is_true(attribute(key.get(), names().is_cpu)))
      n.key = *at;
    else
      n.key_at = at;
  }
  if (sample.get() != Py_None) n.sample = static_cast<const int64_t*>(address(sample.get()));
  n.first_sample = static_cast<uint64_t>(to_int(attribute(noise, names().first_sample)));
  return n;
}

Operands::Operands(PyObject* like, std::initializer_list<PyObject*> tensors, bool in_order) {
  const std::vector<int64_t> shape = read_ints(attribute(like, names().shape));
  int64_t row = 1;
  for (size_t d = 1; d < shape.size(); ++d) row *= shape[d];
  batch = {shape[0], shape[0] ? row : 0, 0, nullptr, Dtype::f32};  // no rows: nothing to do in each
  read_dtype(like, batch.dtype);
  bool strided = false;
  for (PyObject* t : tensors) {
    const int k = count_++;
    if (t == Py_None) continue;
    operands_[k].data = address(t);
    if (is_contiguous(t)) continue;
    strides_[k] = read_ints(call(t, names().stride));
    strided = true;
  }
  if (!strided) return;
  sizes_.assign(shape.begin() + 1, shape.end());
  merge_dimensions();
  if (!in_order && is_one_stretch()) return;
  batch.ndim = static_cast<int>(sizes_.size());
  batch.sizes = sizes_.data();
  for (int k = 0; k < count_; ++k)
    if (!strides_[k].empty()) operands_[k].strides = strides_[k].data();
}

// Neighbouring dimensions that every strided operand walks as one become one: longer runs.
void Operands::merge_dimensions() {
  for (size_t d = 0; d + 1 < sizes_.size();) {
    bool joined = true;
    for (const auto& s : strides_) joined &= s.empty() || sizes_[d] == 1 || s[d + 1] == s[d + 2] * sizes_[d + 1];
    if (!joined) {
      ++d;
      continue;
    }
    sizes_[d + 1] *= sizes_[d];
    sizes_.erase(sizes_.begin() + d);
    for (auto& s : strides_)
      if (!s.empty()) s.erase(s.begin() + d + 1);
  }
}

// Whether every operand is dense in memory and permuted in the same way (channels_last throughout): then rows
// can be walked in memory order as if they were contiguous.
bool Operands::is_one_stretch() {
  const std::vector<int64_t>* first = nullptr;
  for (int k = 0; k < count_; ++k) {
    if (!operands_[k].data) continue;
    if (!first) first = &strides_[k];
    if (strides_[k].empty() || strides_[k] != *first) return false;
  }
  std::vector<size_t> order(sizes_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return (*first)[a + 1] < (*first)[b + 1]; });
  int64_t next = 1;
  for (const size_t d : order) {
    if (sizes_[d] != 1 && (*first)[d + 1] != next) return false;
    next *= sizes_[d];
  }
  return batch.B == 1 || (*first)[0] == next;
}

}  // namespace dae
