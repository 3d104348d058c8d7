// Shared by the bindings for the CPU and for CUDA. `torch.ops.neuroflow` calls them without Python's checks, so they
// make sure themselves that nothing outside a tensor's memory is read or written.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

namespace neuroflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The functions that a backend's ema_gate_ calls, each defined in a file of its own.
using EmaSurprise = Tensor(Tensor h, Tensor ema, double decay);
using Compact = std::tuple<Tensor, Tensor>(Tensor surprise, std::optional<Tensor> threshold,
                                           std::optional<Tensor> budget, int64_t floor);
using GatherRows = Tensor(Tensor x, Tensor index, Tensor cu_seqlens, int64_t rows, std::optional<Tensor> norm_weight,
                          std::optional<Tensor> norm_bias, double eps);

/// The dtype of tensors of T. Each backend adds its own two 16-bit types.
template <typename T>
inline constexpr ScalarType dtype_of = ScalarType::Undefined;
template <>
inline constexpr ScalarType dtype_of<float> = ScalarType::Float;
template <>
inline constexpr ScalarType dtype_of<double> = ScalarType::Double;
template <>
inline constexpr ScalarType dtype_of<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType dtype_of<uint64_t> = ScalarType::Long;

/// Calls f with a value of the element type for `dtype`: float, or one of the backend's own two 16-bit types.
/// `accepted` ends the error for all other types.
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

constexpr int64_t any = -1;  // a size in a required shape

template <typename Sizes>
std::string text(const Sizes& sizes) {
  std::string joined;
  for (const int64_t size : sizes)
    joined += (joined.empty() ? "" : ", ") + (size == any ? "any" : std::to_string(size));
  return "[" + joined + "]";
}

/// Throws unless `tensor` has this shape, is on the device of `first`, and fits its storage: a tensor keeps its shape
/// when its storage is freed or cut short.
inline void require(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, const Tensor& first) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  bool fits = sizes.size() == shape.size(), empty = false;
  int64_t end = tensor.storage_offset() + 1;
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    const int64_t wanted = shape.begin()[i];
    fits = wanted == any || sizes[i] == wanted;
    empty = empty || sizes[i] == 0;
    end += (sizes[i] - 1) * strides[i];
  }
  if (!fits)
    throw std::invalid_argument(std::string(name) + " has the shape " + text(sizes) + "; accepted is " + text(shape));
  if (tensor.is_cpu() != first.is_cpu() || tensor.get_device_index() != first.get_device_index())
    throw std::invalid_argument(std::string(name) + " is on another device than the tensors before it");
  int64_t held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
  if (!empty && end * static_cast<int64_t>(tensor.element_size()) > held)
    throw std::invalid_argument(std::string(name) + " reaches past its storage, which has " + std::to_string(held) +
                                " bytes");
}

template <typename T>
void require_dtype(const Tensor& tensor, const char* name) {
  constexpr ScalarType wanted = dtype_of<std::remove_const_t<T>>;
  if (tensor.scalar_type() != wanted)
    throw std::invalid_argument(std::string(name) + " is " + torch::headeronly::toString(tensor.scalar_type()) +
                                "; accepted here is " + torch::headeronly::toString(wanted));
}

/// The elements of a contiguous tensor.
template <typename T>
T* data(const Tensor& tensor, const char* name) {
  require_dtype<T>(tensor, name);
  if (!tensor.is_contiguous()) throw std::invalid_argument(std::string(name) + " is not contiguous");
  return static_cast<T*>(tensor.data_ptr());
}

/// The elements of a tensor [rows, heads, dim] whose last stride is 1; the others are free.
template <typename T>
const T* heads_data(const Tensor& tensor, const char* name) {
  require_dtype<T>(tensor, name);
  if (tensor.numel() > 0 && tensor.size(2) > 1 && tensor.stride(2) != 1)
    throw std::invalid_argument(std::string(name) + " is not contiguous in its last dimension");
  return static_cast<const T*>(tensor.data_ptr());
}

/// Tokens [streams, tokens, dim] and their references.
inline void require_gate(const Tensor& h, const Tensor& ema) {
  require(h, "h", {any, any, any}, h);
  require(ema, "ema", {h.size(0), h.size(1), h.size(2)}, h);
}

/// The rule that selects among the tokens [streams, tokens, ...] of `first`. Checked in full, because ema_gate_ writes
/// before it reads the rule.
inline void require_rule(const Tensor& first, const std::optional<Tensor>& threshold,
                         const std::optional<Tensor>& budget, int64_t floor) {
  const int64_t streams = first.size(0);
  if (streams * first.size(1) > INT32_MAX) throw std::invalid_argument("there are more tokens than int32 rows");
  if (threshold.has_value() == budget.has_value())
    throw std::invalid_argument("accepted is exactly one of threshold and budget");
  if (threshold) {
    require(*threshold, "threshold", {streams}, first);
    data<float>(*threshold, "threshold");
  } else {
    require(*budget, "budget", {streams}, first);
    data<int32_t>(*budget, "budget");
  }
  if (floor < 0) throw std::invalid_argument("floor is " + std::to_string(floor) + "; accepted is 0 or more");
}

inline void require_rows(int64_t rows) {
  if (rows < 0) throw std::invalid_argument("rows is " + std::to_string(rows) + "; accepted is 0 or more");
}

inline void require_selection(const Tensor& index, const Tensor& cu_seqlens, const Tensor& first) {
  require(index, "index", {any}, first);
  require(cu_seqlens, "cu_seqlens", {any}, first);
  if (cu_seqlens.numel() == 0) throw std::invalid_argument("cu_seqlens is empty; accepted are S + 1 offsets");
}

inline void require_gather(const Tensor& x, const Tensor& index, const Tensor& cu_seqlens, int64_t rows,
                           const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias) {
  require(x, "x", {any, any, any}, x);
  require_selection(index, cu_seqlens, x);
  require_rows(rows);
  if (norm_weight.has_value() != norm_bias.has_value())
    throw std::invalid_argument("accepted is both or neither of norm_weight and norm_bias");
  if (norm_weight) {
    require(*norm_weight, "norm_weight", {x.size(2)}, x);
    require(*norm_bias, "norm_bias", {x.size(2)}, x);
  }
}

inline void require_scatter(const Tensor& cache, const Tensor& packed, const Tensor& index, const Tensor& cu_seqlens) {
  require(cache, "cache", {any, any, any}, cache);
  require(packed, "packed", {any, cache.size(2)}, cache);
  require_selection(index, cu_seqlens, cache);
}

inline void require_scatter_kv(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key,
                               const Tensor& value, const Tensor& index, const Tensor& cu_seqlens) {
  require(key_cache, "key_cache", {any, any, any}, key_cache);
  const int64_t width = key_cache.size(2);
  require(value_cache, "value_cache", {key_cache.size(0), key_cache.size(1), width}, key_cache);
  require(key, "key", {any, any, any}, key_cache);
  if (key.size(1) * key.size(2) != width)
    throw std::invalid_argument("key has the shape " + text(key.sizes()) + "; accepted are heads of together " +
                                std::to_string(width));
  require(value, "value", {key.size(0), key.size(1), key.size(2)}, key_cache);
  require_selection(index, cu_seqlens, key_cache);
}

}  // namespace neuroflow
