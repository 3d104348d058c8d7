// As much of CUDA as our kernels use, for a C++ compiler: the threads of a block are fibers, which change places
// where CUDA's threads meet. How they are run, and what is found wrong with them, is in cuda_on_host.cpp.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// A block runs on one thread of the host from its first to its last instruction.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;

  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};

inline constinit thread_local uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};
constexpr int warpSize = 32;

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t error);

inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}

enum cudaMemcpyKind { cudaMemcpyDeviceToHost };

inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

namespace cuda_on_host {

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

/// Until every thread of the block is here.
void meet_block(const char* intrinsic);

/// Until all 32 lanes of the warp are here; what each of them brought.
const uint64_t* meet_warp(const char* intrinsic, unsigned mask, uint64_t value);

/// Where a block sees what others did, or lets them see: one of them may run first. `waits`: it changes nothing.
void meet_grid(bool waits);

template <typename T>
T shuffle(const char* intrinsic, unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* lanes = meet_warp(intrinsic, mask, bits);
  const bool inside = source_lane >= 0 && source_lane < warpSize;
  std::memcpy(&value, inside ? lanes + source_lane : &bits, sizeof(T));
  return value;
}

inline unsigned ballot(const char* intrinsic, unsigned mask, int predicate) {
  const uint64_t* lanes = meet_warp(intrinsic, mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < warpSize; ++lane) votes |= static_cast<unsigned>(lanes[lane]) << lane;
  return votes;
}

inline int lane() { return threadIdx.x % warpSize; }

}  // namespace cuda_on_host

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return cuda_on_host::run(*config, [=] { kernel(arguments...); });
}

inline void __syncthreads() { cuda_on_host::meet_block("__syncthreads"); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_host::meet_warp("__syncwarp", mask, 0); }
inline void __nanosleep(unsigned) { cuda_on_host::meet_grid(true); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

/// Within a block, of which one thread runs at a time; between blocks, cuda::atomic_ref.
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_host::shuffle("__shfl_sync", mask, value, lane % warpSize);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int difference) {
  return cuda_on_host::shuffle("__shfl_xor_sync", mask, value, cuda_on_host::lane() ^ difference);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  return cuda_on_host::shuffle("__shfl_up_sync", mask, value, cuda_on_host::lane() - static_cast<int>(distance));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_host::ballot("__ballot_sync", mask, predicate);
}

inline int __all_sync(unsigned mask, int predicate) {
  return cuda_on_host::ballot("__all_sync", mask, predicate) == mask;
}
