// Where a tensor's kernels are launched, and the plain eager call: from Python's objects to the kernel in one step.
#pragma once

#include <Python.h>

#include <optional>

#include "api.h"
#include "tensor.h"

namespace dae {

// The functions of the CUDA library, or the HIP library, once it is loaded.
const Api*& cuda_api();
const Api& api_of(const Queue& queue);
// torch's current stream of a GPU tensor's device.
Queue queue_of(PyObject* tensor);

// Makes a GPU the current one for a launch; torch does it, as it starts no device that nobody has used.
class OnDevice {
 public:
  explicit OnDevice(const Queue& queue);
  ~OnDevice();

 private:
  std::optional<Owned> changed_;  // a torch.cuda.device
};

// A loss's static side; spec.Loss's `core`. columns: n1, n2, delta, the weight's factor, the two of `also`.
struct LossObject {
  PyObject_HEAD
  int kind, reduction, columns[6];
  PyObject* owner;  // the spec.Loss that holds this, borrowed
};
// Raise TypeError for what is no such object.
const LossObject& loss_of(PyObject* object);
void fill_map(PyObject* map, AffineArgs& args);
// Whether what a map of five streams is given as its noise is a tensor.
bool is_stored(PyObject* map, PyObject* noise);

// The one row of a table in host memory is read now; on a GPU a table is read in the kernel.
Table read_table(PyObject* table, PyObject* index, bool for_gpu);
// The first row whose level lies outside the table, or -1. Reads the index: on the CPU only.
int64_t bad_level(const Table& table, int64_t B);

// Adds fast_map and fast_loss, what they take, and who launches them to the module.
void add_fast_calls(PyObject* module);

}  // namespace dae
