// What the bindings for the CPU and for CUDA share. They trust the shapes, which Python checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

namespace neuroflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The functions that a backend's ema_gate_ calls, each defined in a file of its own.
using EmaSurprise = Tensor(Tensor h, Tensor ema, double decay);
using Compact = std::tuple<Tensor, Tensor>(Tensor surprise, std::optional<Tensor> threshold,
                                           std::optional<Tensor> budget, int64_t floor);
using GatherRows = Tensor(Tensor x, Tensor index, Tensor cu_seqlens, int64_t rows, std::optional<Tensor> norm_weight,
                          std::optional<Tensor> norm_bias, double eps);

/// Calls f with a value of the element type that `dtype` stands for: float, or one of the backend's own two types of 16
/// bits. `accepted` is what an error says about the others.
template <typename BFloat16, typename Float16, typename F>
void dispatch_floats(ScalarType dtype, const char* name, const char* accepted, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      throw std::invalid_argument(std::string(name) + " is " + torch::headeronly::toString(dtype) + "; " + accepted);
  }
}

/// The elements of a contiguous tensor; T names what `dispatch` found there.
template <typename T>
T* data(const Tensor& tensor, const char* name) {
  if (!tensor.is_contiguous()) throw std::invalid_argument(std::string(name) + " is not contiguous");
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace neuroflow
