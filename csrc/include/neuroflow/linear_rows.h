#pragma once

#include <algorithm>
#include <cstdint>

#include "neuroflow/avx512.h"

namespace neuroflow {

/// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n] for n from begin to end. x: [rows, inner]; weight: [*, inner];
/// bias:
/// [*] or null; out: [rows, width]. A sum's order depends on nothing but `inner`.
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

/// Rows rows of x against `columns` (1 to 4) rows of weight. Both lie along the sum already, so neither is packed, and
/// a weight is read from memory once, eight rows ahead of its use. (Fetched into the first cache it would take the
/// place of what is being worked on.)
template <typename Lanes, int Rows>
NEUROFLOW_AVX512_INLINE void dot_tile(const typename Lanes::Element* x, const typename Lanes::Element* weight,
                                      const typename Lanes::Element* bias, typename Lanes::Element* out, int64_t inner,
                                      int64_t width, int64_t columns, int fetch_begin, int fetch_end) {
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
    for (int j = fetch_begin; j < fetch_end; ++j)
      _mm_prefetch(reinterpret_cast<const char*>(column[j] + 8 * inner + k), _MM_HINT_T1);
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

/// As linear_rows_plain.
template <typename Lanes, typename T = typename Lanes::Element>
NEUROFLOW_AVX512 void linear_rows(Lanes, const T* x, const T* weight, const T* bias, T* out, int64_t rows,
                                  int64_t inner, int64_t width, int64_t begin, int64_t end) {
  const int64_t blocks = (rows + 5) / 6;
  for (int64_t n = begin; n < end; n += 4) {
    const int64_t columns = std::min<int64_t>(end - n, 4);
    const T* panel = weight + n * inner;
    const T* shift = bias ? bias + n : nullptr;
    for (int64_t row = 0; row < rows; row += 6) {
      const T* tokens = x + row * inner;
      T* target = out + row * width + n;
      const int fetch = static_cast<int>(4 * (row / 6) / blocks),
                fetch_end = static_cast<int>(4 * (row / 6 + 1) / blocks);
      switch (std::min<int64_t>(rows - row, 6)) {
        case 1:
          dot_tile<Lanes, 1>(tokens, panel, shift, target, inner, width, columns, fetch, fetch_end);
          break;
        case 2:
          dot_tile<Lanes, 2>(tokens, panel, shift, target, inner, width, columns, fetch, fetch_end);
          break;
        case 3:
          dot_tile<Lanes, 3>(tokens, panel, shift, target, inner, width, columns, fetch, fetch_end);
          break;
        case 4:
          dot_tile<Lanes, 4>(tokens, panel, shift, target, inner, width, columns, fetch, fetch_end);
          break;
        case 5:
          dot_tile<Lanes, 5>(tokens, panel, shift, target, inner, width, columns, fetch, fetch_end);
          break;
        default:
          dot_tile<Lanes, 6>(tokens, panel, shift, target, inner, width, columns, fetch, fetch_end);
      }
    }
  }
}

#endif

}  // namespace neuroflow
