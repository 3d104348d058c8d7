#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "neuroflow/row.h"

namespace neuroflow {

/// 1 - cos(h, ema) of each row, then ema = (1 - decay) ema + decay h, in the same pass.
/// h, ema: [rows, dim]; surprise: [rows]. A row whose squared norm is not finite gives +inf and keeps its ema.
template <typename Token, typename Reference>
NEUROFLOW_MULTIVERSION void ema_surprise(const Token* h, Reference* ema, float* surprise, int64_t rows, int64_t dim,
                                         double decay) {
  using Sum = Accumulator<Token>;
  const Sum keep = static_cast<Sum>(1.0 - decay), take = static_cast<Sum>(decay), norm_floor = static_cast<Sum>(1e-8);
  std::vector<Reference> previous(dim);
  for (int64_t row = 0; row < rows; ++row, h += dim, ema += dim) {
    const auto [product, token_square, reference_square] =
        decay == 0 ? products<false>(h, ema, previous.data(), keep, take, dim)
                   : products<true>(h, ema, previous.data(), keep, take, dim);
    const Sum norms = std::max(std::sqrt(token_square), norm_floor) * std::max(std::sqrt(reference_square), norm_floor);
    const Sum cosine = product / norms;
    const bool finite = std::isfinite(token_square);
    surprise[row] =
        finite && !std::isnan(cosine) ? static_cast<float>(1 - cosine) : std::numeric_limits<float>::infinity();
    if (!finite && decay != 0) std::copy_n(previous.data(), dim, ema);
  }
}

}  // namespace neuroflow
