#pragma once

#include <algorithm>
#include <cstdint>

#include "neuroflow/row.h"

namespace neuroflow {

/// cache[index[r]] = packed[r]. cache: [*, dim]; packed: [rows, dim]; index: [rows].
template <typename T>
void scatter_rows(T* cache, const T* packed, const int32_t* index, int64_t rows, int64_t dim) {
  for (int64_t row = 0; row < rows; ++row) std::copy_n(packed + row * dim, dim, cache + index[row] * dim);
}

/// cache[index[r]] = (1 - blend) cache[index[r]] + blend packed[r].
template <typename T>
NEUROFLOW_MULTIVERSION void scatter_rows_blended(T* cache, const T* packed, const int32_t* index, double blend,
                                                 int64_t rows, int64_t dim) {
  using Sum = Accumulator<T>;
  const Sum keep = static_cast<Sum>(1.0 - blend), take = static_cast<Sum>(blend);
  for (int64_t row = 0; row < rows; ++row) blend_row(cache + index[row] * dim, packed + row * dim, keep, take, dim);
}

}  // namespace neuroflow
