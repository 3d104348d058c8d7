#pragma once

#include <algorithm>
#include <cstdint>

#include "neuroflow/avx512.h"

namespace neuroflow {

/// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for n from begin to end. x: [rows, inner]; weight: [*, inner];
/// bias: [*] or null; out: [rows, width]. The order of a sum depends on `inner` alone.
template <typename T>
NEUROFLOW_MULTIVERSION void linear_rows_plain(const T* x, const T* weight, const T* bias, T* out, int64_t rows,
                                              int64_t inner, int64_t width, int64_t begin, int64_t end) {
  using Sum = Accumulator<T>;
  for (int64_t n = begin; n < end; ++n)
    for (int64_t row = 0; row < rows; ++row) {
      Sum sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < inner; ++k) sum += widen(x[row * inner + k]) * widen(weight[n * inner + k]);
      out[row * width + n] = narrow<T>(bias ? sum + widen(bias[n]) : sum);
    }
}

#ifdef NEUROFLOW_AVX512

/// The sums of the lanes of a, b, c and d.
NEUROFLOW_AVX512_INLINE __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/// `Rows` rows of x times `columns` (1 to 4) rows of weight. Both are contiguous along the sum, so neither is packed.
/// Meanwhile `inner` weights from `fetch` on, or four times as many, are prefetched into the second-level cache; in the
/// first they would evict what is in use.
template <typename Lanes, int Rows, bool FetchFour>
NEUROFLOW_AVX512_INLINE void dot_tile(const typename Lanes::Element* x, const typename Lanes::Element* weight,
                                      const typename Lanes::Element* bias, typename Lanes::Element* out,
                                      const typename Lanes::Element* fetch, int64_t inner, int64_t width,
                                      int64_t columns) {
  const typename Lanes::Element* column[4];
  for (int j = 0; j < 4; ++j) column[j] = weight + std::min<int64_t>(j, columns - 1) * inner;
  __m512 sum[Rows][4];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + Lanes::step <= inner; k += Lanes::step) {
    typename Lanes::Operand w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = Lanes::load(column[j] + k);
#pragma GCC unroll 4
    for (int j = 0; j < (FetchFour ? 4 : 1); ++j)
      _mm_prefetch(reinterpret_cast<const char*>(fetch + j * inner + k), _MM_HINT_T1);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const typename Lanes::Operand token = Lanes::load(x + i * inner + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = Lanes::multiply_add(token, w[j], sum[i][j]);
    }
  }
  if (k < inner)
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < 4; ++j)
        sum[i][j] = Lanes::multiply_add(Lanes::load(x + i * inner + k, inner - k),
                                        Lanes::load(column[j] + k, inner - k), sum[i][j]);
  const __mmask8 valid = static_cast<__mmask8>((1u << columns) - 1);
  const __m128 shift = bias ? Lanes::load4(bias, valid) : _mm_setzero_ps();
  for (int i = 0; i < Rows; ++i)
    Lanes::store(out + i * width, _mm_add_ps(sum_lanes(sum[i][0], sum[i][1], sum[i][2], sum[i][3]), shift), valid);
}

/// dot_tile of min(rows, Rows) rows.
template <typename Lanes, bool FetchFour, int Rows, typename... Arguments>
NEUROFLOW_AVX512_INLINE void dot_tile_of(int64_t rows, Arguments... arguments) {
  if constexpr (Rows > 1)
    if (rows < Rows) return dot_tile_of<Lanes, FetchFour, Rows - 1>(rows, arguments...);
  dot_tile<Lanes, Rows, FetchFour>(arguments...);
}

/// As linear_rows_plain.
template <typename Lanes, typename T = typename Lanes::Element>
NEUROFLOW_AVX512 void linear_rows_avx512(Lanes, const T* x, const T* weight, const T* bias, T* out, int64_t rows,
                                         int64_t inner, int64_t width, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 4) {
    const T* panel = weight + n * inner;
    const T* ahead = panel + 8 * inner;  // the panel after the next
    const T* shift = bias ? bias + n : nullptr;
    const int64_t columns = std::min<int64_t>(end - n, 4);
    for (int64_t row = 0; row < rows; row += 6) {
      const T* tokens = x + row * inner;
      T* target = out + row * width + n;
      if (row == 0 && rows <= 18)
        dot_tile_of<Lanes, true, 6>(rows, tokens, panel, shift, target, ahead, inner, width, columns);
      else if (row < 24 && rows > 18)
        dot_tile_of<Lanes, false, 6>(rows - row, tokens, panel, shift, target, ahead + row / 6 * inner, inner, width,
                                     columns);
      else  // nothing is left to fetch, and fetching what is cached is free
        dot_tile_of<Lanes, false, 6>(rows - row, tokens, panel, shift, target, tokens, inner, width, columns);
    }
  }
}

#endif

/// As linear_rows_plain, with this processor's vectors.
template <typename T>
void linear_rows(const T* x, const T* weight, const T* bias, T* out, int64_t rows, int64_t inner, int64_t width,
                 int64_t begin, int64_t end) {
#ifdef NEUROFLOW_AVX512
  if (with_lanes<T>(
          [&](auto lanes) { linear_rows_avx512(lanes, x, weight, bias, out, rows, inner, width, begin, end); }))
    return;
#endif
  linear_rows_plain(x, weight, bias, out, rows, inner, width, begin, end);
}

}  // namespace neuroflow
