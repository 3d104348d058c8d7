#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "neuroflow/scalar.h"

namespace neuroflow {

/// 1 - cos(h, ema) of each row, then ema = (1 - decay) ema + decay h, while the row is in cache.
/// h, ema: [rows, dim]; surprise: [rows]. A row whose squared norm is not finite: +inf, and its ema stays.
template <typename Token, typename Reference>
NEUROFLOW_MULTIVERSION void ema_surprise(const Token* h, Reference* ema, float* surprise, int64_t rows, int64_t dim,
                                         double decay) {
  using Sum = Accumulator<Token>;
  const Sum keep = static_cast<Sum>(1.0 - decay), take = static_cast<Sum>(decay), norm_floor = static_cast<Sum>(1e-8);
  for (int64_t row = 0; row < rows; ++row, h += dim, ema += dim) {
    Sum product = 0, token_square = 0, reference_square = 0;
#pragma omp simd reduction(+ : product, token_square, reference_square)
    for (int64_t i = 0; i < dim; ++i) {
      const Sum token = widen(h[i]), reference = widen(ema[i]);
      product += token * reference;
      token_square += token * token;
      reference_square += reference * reference;
    }
    const Sum norms = std::max(std::sqrt(token_square), norm_floor) * std::max(std::sqrt(reference_square), norm_floor);
    const Sum cosine = product / norms;
    const bool finite = std::isfinite(token_square);
    surprise[row] =
        finite && !std::isnan(cosine) ? static_cast<float>(1 - cosine) : std::numeric_limits<float>::infinity();
    if (!finite || decay == 0) continue;
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) ema[i] = narrow<Reference>(keep * Sum{widen(ema[i])} + take * Sum{widen(h[i])});
  }
}

}  // namespace neuroflow
