// The stand-in of tests/cuda_on_cpu, for the device too.
#pragma once

#include <cuda_runtime.h>

#pragma clang force_cuda_host_device begin
#include "../cuda_on_cpu/cuda_bf16.h"
#pragma clang force_cuda_host_device end
