#pragma once

#include <algorithm>
#include <cstdint>

namespace neuroflow {

/// The active tokens' keys or values, [rows, heads, dim], with `stride` elements from row to row and `head_stride` from
/// head to head.
template <typename T>
struct Projected {
  const T* data;
  int64_t stride, head_stride, heads, dim;
};

/// cache[index[r]] = fresh[r] for the rows from `begin` to `end`. cache: [*, heads * dim].
template <typename T>
void scatter_heads(T* cache, const Projected<T>& fresh, const int32_t* index, int64_t begin, int64_t end) {
  const int64_t width = fresh.heads * fresh.dim;
  for (int64_t row = begin; row < end; ++row) {
    const T* source = fresh.data + row * fresh.stride;
    T* target = cache + index[row] * width;
    if (fresh.head_stride == fresh.dim) {
      std::copy_n(source, width, target);
    } else {
      for (int64_t head = 0; head < fresh.heads; ++head)
        std::copy_n(source + head * fresh.head_stride, fresh.dim, target + head * fresh.dim);
    }
  }
}

}  // namespace neuroflow
