// Shared by the bindings for the CPU.
#pragma once

#include <algorithm>

#include "../bindings.h"
#include "neuroflow/scalar.h"

namespace neuroflow {

template <>
inline constexpr ScalarType dtype_of<BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType dtype_of<Float16> = ScalarType::Half;

namespace cpu {

EmaSurprise ema_surprise_;
Compact compact;
GatherRows gather_rows;

/// Calls f with a value of the element type for `dtype`.
template <typename F>
void dispatch(ScalarType dtype, const char* name, F&& f) {
  if (dtype == ScalarType::Double) return f(double{});
  dispatch_floats<BFloat16, Float16>(dtype, name, "accepted is float32, bfloat16, float16 or float64", f);
}

/// Elements that a thread should have to work on: less is done before another thread wakes up. Rows that are only
/// copied need more, because on a busy machine waiting for the last thread costs a time slice.
constexpr int64_t computed = 1 << 15, copied = 1 << 17;

/// Rows per thread that make up so many elements.
inline int64_t grain(int64_t elements, int64_t dim) {
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, dim));
}

/// The first min(cu_seqlens[-1], rows) entries of `index`, each of them a row of a tensor of `limit` rows.
struct Selection {
  const int32_t* index;
  int64_t count;
};

inline Selection selection(const Tensor& index, const Tensor& cu_seqlens, int64_t rows, int64_t limit) {
  const int64_t active = data<int32_t>(cu_seqlens, "cu_seqlens")[cu_seqlens.numel() - 1];
  if (active < 0 || active > index.numel())
    throw std::out_of_range("cu_seqlens ends in " + std::to_string(active) + "; accepted is 0 to " +
                            std::to_string(index.numel()) + ", the length of index");
  const Selection chosen{data<int32_t>(index, "index"), std::min(active, rows)};
  for (int64_t i = 0; i < chosen.count; ++i)
    if (chosen.index[i] < 0 || chosen.index[i] >= limit)
      throw std::out_of_range("index[" + std::to_string(i) + "] is " + std::to_string(chosen.index[i]) +
                              "; accepted is 0 to S * N - 1 = " + std::to_string(limit - 1));
  return chosen;
}

/// Throws if `cache`, which is written, shares memory with `index`, whose entries were checked before.
inline void require_apart(const Tensor& cache, const Tensor& index) {
  const auto bytes = [](const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); };
  const char* written = static_cast<const char*>(cache.data_ptr());
  const char* read = static_cast<const char*>(index.data_ptr());
  if (written < read + bytes(index) && read < written + bytes(cache))
    throw std::invalid_argument("index shares memory with what is written");
}

}  // namespace cpu
}  // namespace neuroflow
