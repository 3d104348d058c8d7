// Shared by the CUDA kernels. nvcc compiles it, and for tests a C++ compiler does, against tests/ops/cuda_on_host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <cuda/atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace neuroflow::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffff;

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer numerator, Integer denominator) {
  return (numerator + denominator - 1) / denominator;
}

/// The type that sums over elements of T are kept in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(Float16 value) { return __half2float(value); }

/// Rounds to nearest, ties to even; NaN stays NaN.
template <typename T>
__device__ inline T narrow(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return __float2bfloat16_rn(value);
  else if constexpr (std::is_same_v<T, Float16>)
    return __float2half_rn(value);
  else
    return value;
}

/// Elements per 16-byte access.
template <typename T>
constexpr int vector_width = 16 / static_cast<int>(sizeof(T));

/// `Width` consecutive elements, in registers.
template <typename T, int Width = vector_width<T>>
struct Vector {
  T elements[Width];

  __device__ T& operator[](int i) { return elements[i]; }
  __device__ const T& operator[](int i) const { return elements[i]; }
};

/// Whether rows of `dim` elements that begin at `data` can be read and written 16 bytes at a time.
template <typename T>
bool is_aligned(const T* data, int64_t dim) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && dim % vector_width<T> == 0;
}

/// Elements from `source`, which has to be aligned to 16 bytes.
template <typename T, int Width = vector_width<T>>
__device__ inline Vector<T, Width> load(const T* source) {
  struct Words {
    uint4 words[Width / vector_width<T>];
  } words;
#pragma unroll
  for (int i = 0; i < Width / vector_width<T>; ++i) words.words[i] = reinterpret_cast<const uint4*>(source)[i];
  return std::bit_cast<Vector<T, Width>>(words);
}

template <typename T, int Width>
__device__ inline void store(T* target, const Vector<T, Width>& vector) {
  struct Words {
    uint4 words[Width / vector_width<T>];
  };
  const Words words = std::bit_cast<Words>(vector);
#pragma unroll
  for (int i = 0; i < Width / vector_width<T>; ++i) reinterpret_cast<uint4*>(target)[i] = words.words[i];
}

/// The first `count` elements, at any alignment; zeros past them.
template <typename T, int Width = vector_width<T>>
__device__ inline Vector<T, Width> load_some(const T* source, int count) {
  Vector<T, Width> vector;
#pragma unroll
  for (int i = 0; i < Width; ++i) vector[i] = i < count ? source[i] : narrow<T>(0);
  return vector;
}

template <typename T, int Width>
__device__ inline void store_some(T* target, const Vector<T, Width>& vector, int count) {
#pragma unroll
  for (int i = 0; i < Width; ++i)
    if (i < count) target[i] = vector[i];
}

/// The sum over a warp, the same in every lane.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(all_lanes, value, offset);
  return value;
}

/// The sum over the lanes up to and including this one.
template <typename T>
__device__ inline T warp_inclusive_sum(T value) {
  const int lane = threadIdx.x % warp_size;
#pragma unroll
  for (int offset = 1; offset < warp_size; offset *= 2) {
    const T below = __shfl_up_sync(all_lanes, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

/// The sum over the threads of a block before this one. `scratch`: shared, one element per warp; no thread may still be
/// reading it.
template <typename T>
__device__ inline T block_exclusive_sum(T value, T* scratch) {
  const T inclusive = warp_inclusive_sum(value);
  const int warp = threadIdx.x / warp_size;
  if (threadIdx.x % warp_size == warp_size - 1) scratch[warp] = inclusive;
  __syncthreads();
  T sum = inclusive - value;
  for (int other = 0; other < warp; ++other) sum += scratch[other];
  return sum;
}

/// Reads what another block wrote with `store_release`, and makes all it wrote before that visible.
template <typename T>
__device__ inline T load_acquire(T* address) {
  return ::cuda::atomic_ref<T, ::cuda::thread_scope_device>(*address).load(::cuda::memory_order_acquire);
}

template <typename T>
__device__ inline void store_release(T* address, T value) {
  ::cuda::atomic_ref<T, ::cuda::thread_scope_device>(*address).store(value, ::cuda::memory_order_release);
}

/// Adds, and returns the value from before.
template <typename T>
__device__ inline T add_relaxed(T* address, T value) {
  return ::cuda::atomic_ref<T, ::cuda::thread_scope_device>(*address).fetch_add(value, ::cuda::memory_order_relaxed);
}

template <typename T>
__device__ inline T add_release(T* address, T value) {
  return ::cuda::atomic_ref<T, ::cuda::thread_scope_device>(*address).fetch_add(value, ::cuda::memory_order_release);
}

/// What a block has told the blocks after it, in the upper half of a word: its own sum, or the sum of all blocks up to
/// and including it. A word of 0 means nothing yet.
enum Progress : uint64_t { own_sum = uint64_t{1} << 32, inclusive_sum = uint64_t{2} << 32 };

__device__ inline void publish(uint64_t* progress, Progress kind, int sum) {
  store_release(progress, kind | static_cast<uint32_t>(sum));
}

/// The sum of the blocks before number `block`, by a whole warp, which waits for them (decoupled look-back: Merrill and
/// Garland 2016). They must never wait for this one, so blocks are numbered in the order in which they began.
__device__ inline int look_back(uint64_t* progress, int block) {
  const int lane = threadIdx.x % warp_size;
  int sum = 0;
  for (int last = block - 1; last >= 0; last -= warp_size) {
    uint64_t seen = inclusive_sum;  // nothing comes before the first block
    if (last - lane >= 0)
      while ((seen = load_acquire(progress + last - lane)) == 0) __nanosleep(20);
    const unsigned ends = __ballot_sync(all_lanes, seen >= inclusive_sum);
    const int needed = ends == 0 ? warp_size : __ffs(static_cast<int>(ends));
    sum += warp_sum(lane < needed ? static_cast<int>(static_cast<uint32_t>(seen)) : 0);
    if (ends != 0) break;
  }
  return sum;
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

/// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), in C++.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace neuroflow::cuda
