#include "tensor.h"

#include <algorithm>
#include <numeric>

namespace dae {

namespace {

PyObject* intern(const char* name) { return Owned(PyUnicode_InternFromString(name)).release(); }

// DLPack's table of C functions, which torch keeps in a capsule: a tensor's attributes, one by one through Python, take
// ten times as long.
struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  const void* older;
  void (*unused[3])();  // that make and take tensors
  int (*tensor_of)(PyObject*, DlTensor*);
  int (*current_stream)(int32_t device_type, int32_t device, void** stream);
};

const Exchange& exchange() {
  static const Exchange* const known = [] {
    PyObject* const capsule = member("dae_fast._torch", "dlpack_exchange");
    const auto* table = static_cast<const Exchange*>(
        capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr);
    if (!table || table->version.major != 1 || !table->tensor_of) {
      PyErr_SetString(PyExc_RuntimeError,
                      "dae_fast: torch must have DLPack's table of C functions, version 1, as torch 2.11 has");
      throw PythonError();
    }
    return table;  // torch's capsule lives as long as torch
  }();
  return *known;
}

}  // namespace

PyObject* member(const char* module, const char* name) {
  const Owned from(PyImport_ImportModule(module));
  return Owned(PyObject_GetAttrString(from.get(), name)).release();
}

const Names& names() {
  static const Names known = {
      intern("dtype"),  intern("shape"),   intern("device"),      intern("requires_grad"), intern("is_neg"),
      intern("_seed"),  intern("_offset"), intern("_key_tensor"), intern("_sample"),       intern("_first_sample"), intern("_span"), intern("fold_in"),
      intern("_schedule"), intern("_t"), intern("_tables"), intern("_alpha"), intern("_sigma"), intern("_columns"),
      intern("fast_map"), intern("fast_loss")};
  return known;
}

const Torch& torch() {
  static const Torch known = {member("torch", "Tensor"), member("torch.nn", "Parameter"), member("torch", "float32"),
                              member("torch", "float64")};
  return known;
}

int64_t to_int(const Owned& value) {
  const int64_t result = PyLong_AsLongLong(value.get());
  if (result == -1 && PyErr_Occurred()) throw PythonError();
  return result;
}

View::View(PyObject* tensor) {
  if (exchange().tensor_of(tensor, this)) throw PythonError();
}

std::optional<View> View::of_plain(PyObject* tensor) {
  const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != dae::torch().tensor && type != dae::torch().parameter) return {};
  View view;
  if (!exchange().tensor_of(tensor, &view)) return view;
  PyErr_Clear();
  return {};
}

bool View::is_contiguous() const {
  int64_t next = 1;
  for (int d = 0; d < ndim; ++d)
    if (!shape[d]) return true;
  for (int d = ndim - 1; d >= 0; next *= shape[d], --d)
    if (shape[d] != 1 && strides[d] != next) return false;
  return true;
}

bool View::has_shape_of(const View& other) const {
  return ndim == other.ndim && std::equal(shape, shape + ndim, other.shape);
}

bool View::dtype(Dtype& found) const {
  if (type_code == kFloat && bits == 32) return found = Dtype::f32, true;
  if (type_code == kBfloat && bits == 16) return found = Dtype::bf16, true;
  if (type_code == kFloat && bits == 16) return found = Dtype::f16, true;
  if (type_code == kFloat && bits == 64) return found = Dtype::f64, true;
  return false;
}

void* current_stream(const View& tensor) {
  void* stream = nullptr;
  if (exchange().current_stream(tensor.type_of_device(), tensor.device(), &stream)) throw PythonError();
  return stream;
}

bool read_noise(PyObject* noise, PyObject* key, PyObject* sample, bool raw, int64_t row, int64_t rows, Noise& n) {
  n.present = true;
  n.fold = !raw;
  if (key == Py_None) {
    n.key = {static_cast<uint64_t>(to_int(attribute(noise, names().seed))),
             static_cast<uint64_t>(to_int(attribute(noise, names().offset)))};
  } else {
    const View view(key);
    const Key* at = static_cast<const Key*>(view.data());
    if (view.is_cpu())
      n.key = *at;
    else
      n.key_at = at;
  }
  if (sample != Py_None) n.sample = static_cast<const int64_t*>(address(sample));
  n.first_sample = static_cast<uint64_t>(to_int(attribute(noise, names().first_sample)));
  const Owned span = attribute(noise, names().span);
  int64_t first = 0;
  if (span.get() != Py_None) {  // (rows of one sample, the sample's first element)
    if (rows == 1) rows = PyLong_AsLongLong(PyTuple_GET_ITEM(span.get(), 0));
    first = PyLong_AsLongLong(PyTuple_GET_ITEM(span.get(), 1));
  }
  n.rows_per_sample = rows;
  n.first_block = static_cast<uint64_t>(first / kBlock);
  n.blocks_per_row = static_cast<uint64_t>(row / kBlock);
  return first % kBlock == 0 && (rows == 1 || row % kBlock == 0);
}

Noise read_noise(PyObject* noise, bool raw, int64_t row) {
  Noise n;
  if (noise == Py_None) return n;
  const Owned key = attribute(noise, names().key_tensor), sample = attribute(noise, names().sample);
  if (read_noise(noise, key.get(), sample.get(), raw, row, 1, n)) return n;
  PyErr_SetString(PyExc_RuntimeError, "dae_fast: rows of noise that do not begin with a block");
  throw PythonError();
}

Operands::Operands(PyObject* like, std::initializer_list<PyObject*> tensors, bool in_order) {
  const View first(like);
  int64_t row = 1;
  for (int d = 1; d < first.dims(); ++d) row *= first.size(d);
  batch = {first.size(0), first.size(0) ? row : 0, 0, nullptr, Dtype::f32};  // no rows: nothing to do in each
  first.dtype(batch.dtype);
  bool strided = false;
  for (PyObject* t : tensors) {
    const int k = count_++;
    if (t == Py_None) continue;
    const View view(t);
    operands_[k].data = view.data();
    if (view.is_contiguous()) continue;
    for (int d = 0; d < view.dims(); ++d) strides_[k].push_back(view.stride(d));
    strided = true;
  }
  if (!strided) return;
  for (int d = 1; d < first.dims(); ++d) sizes_.push_back(first.size(d));
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
