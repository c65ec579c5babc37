// The CUDA library's face: the device, the element type, and the kernels that know none.

#include "kernels.h"
#include "reduce.cuh"

namespace dae::cuda {

struct MaskParams {
  Cut cut;
  MaskArgs a;
  double* kept;
  Scratch scratch;
};

template <class Access>
__global__ void __launch_bounds__(kThreads)
    mask_count_kernel(const __grid_constant__ MaskParams p, const __grid_constant__ Access access) {
  using Cursor = typename Access::template Cursor<uint8_t>;
  constexpr int N = Cursor::N;
  __shared__ float groups[1][kMaxTile];
  __shared__ uint4 keys[kMaxRows];
  if (!p.a.wanted()) return;
  const Unit unit = unit_at(p.cut, blockIdx.x);
  const bool drawn = p.a.choice.noise.present;
  if (drawn) prepare_keys(p.a.choice.noise, unit, keys);
  __syncthreads();
  RowSums<float, 1> sums;
#pragma unroll 4
  for (Cursor cursor(access, p.cut, unit); cursor.g < unit.groups; cursor.step()) {
    float count[1] = {0};
    if (drawn) {
      bool kept[N];
      const Place at = place_of(p.cut, unit, cursor.g);
      draw(p.a.choice, unit.row + at.row, Blocks{to_key(keys[at.row]), cursor.block(at)}, kept);
#pragma unroll
      for (int i = 0; i < N; ++i)
        count[0] += kept[i] && (!Access::kRagged || N * at.group + i < p.cut.D) ? 1.0f : 0.0f;
    } else {
      Bytes<N> kept;
      cursor.read_mask(0, kept);
      count[0] = static_cast<float>(kept.count());
    }
    sums.add(unit, cursor.g, count, groups);
  }
  sums.finish(p.cut, unit, groups, p.scratch, [&](int64_t row, const double (&sum)[1]) { p.kept[row] = sum[0]; });
}

struct BitsParams {
  Cut cut;
  BitsArgs a;
  bool aligned;  // rows to 16 bytes
};

// A group is a Philox block: four words of a row.
constexpr int kBits = 4;

__global__ void __launch_bounds__(kThreads) bits_kernel(const __grid_constant__ BitsParams p) {
  __shared__ uint4 keys[kMaxRows];
  const Unit unit = unit_at(p.cut, blockIdx.x);
  prepare_keys(p.a.noise, unit, keys);
  __syncthreads();
#pragma unroll 1
  for (int g = static_cast<int>(threadIdx.x); g < unit.groups; g += kThreads) {
    const Place at = place_of(p.cut, unit, g);
    const Block b = block_at(to_key(keys[at.row]), static_cast<uint64_t>(at.group));
    int64_t v[kBits];
#pragma unroll
    for (int k = 0; k < kBits; ++k) v[k] = p.a.scaled(b.r[k]);
    const int64_t first = kBits * at.group;
    int64_t* out = p.a.out + (unit.row + at.row) * p.cut.D + first;
    if (p.aligned && first + kBits <= p.cut.D) {
      store_pack(out, Pack<int64_t, kBits>(v));
    } else {
#pragma unroll
      for (int k = 0; k < kBits; ++k)
        if (first + k < p.cut.D) out[k] = v[k];
    }
  }
}

__global__ void fold_in_kernel(const __grid_constant__ Noise noise, uint64_t data, const uint64_t* data_at, Key* out) {
  *out = fold_in(noise.key_at ? *noise.key_at : noise.key, data_at ? *data_at : data);
}

__device__ __forceinline__ void store_as(Dtype dtype, void* data, int64_t at, float v) {
  switch (dtype) {
    case Dtype::f32: static_cast<float*>(data)[at] = v; break;
    case Dtype::f64: static_cast<double*>(data)[at] = v; break;
    case Dtype::bf16: static_cast<__nv_bfloat16*>(data)[at] = __nv_bfloat16(v); break;
    case Dtype::f16: static_cast<__half*>(data)[at] = __half(v); break;
  }
}

// A thread has one pair.
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const __grid_constant__ EmbeddingArgs a, int64_t row_stride, int64_t stride) {
  const int64_t half = a.batch.D / 2, pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= a.batch.B * half) return;
  const int64_t row = pair / half, i = pair - row * half;
  double u = 0;
  float sine, cosine;
#pragma unroll 1
  for (int64_t k = 0; k < a.K; ++k) u = mul_add(a.x[row * a.K + k], a.W[k * half + i], u);
  sincos_2pi(u, sine, cosine);
  const int64_t at = row * row_stride + i * stride, apart = half * stride;
  store_as(a.batch.dtype, a.out.data, at, a.flip ? cosine : sine);
  store_as(a.batch.dtype, a.out.data, at + apart, a.flip ? sine : cosine);
  if (a.batch.D % 2 && i == 0) store_as(a.batch.dtype, a.out.data, at + 2 * apart, 0);
}

namespace {

Launch make_launch(const Queue& queue) {
  int count = 0;
  // A table look-up in the driver: cheaper to ask than to cache for each device.
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, queue.device) != cudaSuccess) count = 0;
  return {static_cast<cudaStream_t>(queue.stream), std::max(count, 1)};
}

const Kernels& kernels_for(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64: return kernels_f64;
    case Dtype::bf16: return kernels_bf16;
    case Dtype::f16: return kernels_f16;
    default: return kernels_f32;
  }
}

const char* affine(const AffineArgs& a, Queue queue) {
  if (!a.batch.B || !a.batch.D) return nullptr;
  return kernels_for(a.batch.dtype).affine(a, make_launch(queue));
}

const char* residual(const ResidualArgs& a, const LossArgs& loss, Scratch scratch, Queue queue) {
  return kernels_for(a.batch.dtype).residual(a, loss, scratch, make_launch(queue));
}

const char* row_dots(const RowDotsArgs& a, double* out, Scratch scratch, Queue queue) {
  return kernels_for(a.batch.dtype).row_dots(a, out, scratch, make_launch(queue));
}

const char* mask_count(const MaskArgs& a, double* kept, Scratch scratch, Queue queue) {
  const Launch how = make_launch(queue);
  const Operand operands[] = {a.mask};
  const MaskParams p{Cut{}, a, kept, scratch};
  return how.with_access<uint8_t>(a.batch, operands, [&](const auto& access) {
    return how.units<mask_count_kernel<std::decay_t<decltype(access)>>, uint8_t>(a.batch, p, access);
  });
}

const char* corrupt(const CorruptArgs& a, Queue queue) {
  if (!a.batch.B || !a.batch.D) return nullptr;
  return kernels_for(a.batch.dtype).corrupt(a, make_launch(queue));
}

const char* gaussian(const GaussianArgs& a, void* kl, Scratch scratch, Queue queue) {
  return kernels_for(a.batch.dtype).gaussian(a, kl, scratch, make_launch(queue));
}

const char* gaussian_grad(const GaussianGradArgs& a, Queue queue) {
  if (!a.batch.B || !a.batch.D) return nullptr;
  return kernels_for(a.batch.dtype).gaussian_grad(a, make_launch(queue));
}

const char* bits(const BitsArgs& a, Queue queue) {
  if (!a.batch.B || !a.batch.D) return nullptr;
  const Launch how = make_launch(queue);
  const bool aligned = a.batch.D % 2 == 0 && reinterpret_cast<uintptr_t>(a.out) % 16 == 0;
  const BitsParams p{how.cut<bits_kernel>(a.batch, kBits), a, aligned};
  return launch(how.stream, p.cut.units, kThreads, bits_kernel, p);
}

const char* fold_in_key(const Noise& noise, uint64_t data, const uint64_t* data_at, Key* out, Queue queue) {
  return launch(static_cast<cudaStream_t>(queue.stream), 1, 1, fold_in_kernel, noise, data, data_at, out);
}

const char* embedding(const EmbeddingArgs& a, Queue queue) {
  const int64_t pairs = a.batch.B * (a.batch.D / 2);
  if (!pairs) return nullptr;
  const int64_t row_stride = a.out.strides ? a.out.strides[0] : a.batch.D, stride = a.out.strides ? a.out.strides[1] : 1;
  return launch(static_cast<cudaStream_t>(queue.stream), (pairs + kThreads - 1) / kThreads, kThreads, embedding_kernel, a,
                row_stride, stride);
}

const char* devices(int* count) {
  cudaError_t error = cudaGetDeviceCount(count);
  if (error == cudaErrorNoDevice) return "no GPU device";
  cudaFuncAttributes any;
  if (error == cudaSuccess && *count) error = cudaFuncGetAttributes(&any, fold_in_kernel);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int current_device() {
  int device = -1;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

#if defined(__CUDACC__) || defined(__HIPCC__)
constexpr bool kOnHost = false;
#else
constexpr bool kOnHost = true;
#endif
#if defined(__HIP__)
constexpr const char* kRuntime = "HIP";
#else
constexpr const char* kRuntime = "CUDA";
#endif

constexpr Api kApi = {affine,        residual, row_dots,    mask_count, corrupt,       gaussian,
                      gaussian_grad, bits,     fold_in_key, devices,    current_device, chain,
                      normal_sum,    embedding, kOnHost, kRuntime};

}  // namespace

}  // namespace dae::cuda

extern "C" __attribute__((visibility("default"))) const dae::Api* dae_cuda_api() { return &dae::cuda::kApi; }
