#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "neuroflow/scalar.h"

namespace neuroflow {

/// packed[r] = x[index[r]]. x: [*, dim]; index: [rows]; packed: [rows, dim].
template <typename T>
void gather_rows(const T* x, const int32_t* index, T* packed, int64_t rows, int64_t dim) {
  for (int64_t row = 0; row < rows; ++row) std::copy_n(x + index[row] * dim, dim, packed + row * dim);
}

/// packed[r] = LayerNorm(x[index[r]]). weight, bias: [dim]. Mean and variance in two passes over the cached row.
template <typename T>
NEUROFLOW_MULTIVERSION void gather_rows_normalized(const T* x, const int32_t* index, const T* weight, const T* bias,
                                                   double eps, T* packed, int64_t rows, int64_t dim) {
  using Sum = Accumulator<T>;
  for (int64_t row = 0; row < rows; ++row, packed += dim) {
    const T* token = x + index[row] * dim;
    Sum sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; ++i) sum += widen(token[i]);
    const Sum mean = sum / static_cast<Sum>(dim);
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < dim; ++i) square += (widen(token[i]) - mean) * (widen(token[i]) - mean);
    const Sum scale = 1 / std::sqrt(square / static_cast<Sum>(dim) + static_cast<Sum>(eps));
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i)
      packed[i] = narrow<T>((widen(token[i]) - mean) * scale * widen(weight[i]) + widen(bias[i]));
  }
}

}  // namespace neuroflow
