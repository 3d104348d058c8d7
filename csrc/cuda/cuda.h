// Shared by the bindings for CUDA. Only the kernels can see the contents of index and cu_seqlens without a wait, and
// they touch no row outside its tensor.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../bindings.h"
#include "neuroflow/rows.cuh"

// The dispatch key that the kernels are registered under; the host build that tests them without a GPU sets CPU.
#ifndef NEUROFLOW_KEY
#define NEUROFLOW_KEY CUDA
#endif

namespace neuroflow {

template <>
inline constexpr ScalarType dtype_of<cuda::BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType dtype_of<cuda::Float16> = ScalarType::Half;

namespace cuda {

EmaSurprise ema_surprise_;
Compact compact;
GatherRows gather_rows;

/// Calls f with a value of the element type for `dtype`.
template <typename F>
void dispatch(ScalarType dtype, const char* name, F&& f) {
  dispatch_floats<BFloat16, Float16>(dtype, name, "accepted by the CUDA kernels is float32, bfloat16 or float16", f);
}

/// Calls f with a value of h's element type and one of ema's.
template <typename F>
void dispatch_gate(const Tensor& h, const Tensor& ema, F&& f) {
  dispatch(h.scalar_type(), "h", [&](auto token) {
    if (ema.scalar_type() == h.scalar_type()) return f(token, token);
    if constexpr (sizeof(token) == 2)
      if (ema.scalar_type() == ScalarType::Float) return f(token, float{});
    throw std::invalid_argument("ema is neither of h's dtype nor, for an h of 16 bits, float32");
  });
}

/// Makes a tensor's device the current one for the lifetime of this; `stream` is torch's current stream there.
struct Device {
  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

/// The first min(cu_seqlens[-1], rows) entries of `index`, of a tensor of `limit` rows.
inline Selection selection(const Tensor& index, const Tensor& cu_seqlens, int64_t rows, int64_t limit) {
  return {data<const int32_t>(index, "index"), data<const int32_t>(cu_seqlens, "cu_seqlens") + cu_seqlens.numel() - 1,
          std::min(rows, index.numel()), limit};
}

}  // namespace cuda
}  // namespace neuroflow
