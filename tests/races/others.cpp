// The element types that are not run.
#include "../../csrc/cuda/kernels.h"

namespace dae::cuda {
const Kernels kernels_f64{}, kernels_f16{};
}
