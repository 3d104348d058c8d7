#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "neuroflow/avx512.h"

namespace neuroflow {

/// Attention from some tokens to all, in one head: out = softmax(scale query keyᵀ) value.
/// query, out: [rows, dim]; key, value: [tokens, dim]; `stride` elements from row to row, `query_stride` in query.
template <typename T>
struct Head {
  const T* query;
  const T* key;
  const T* value;
  T* out;
  int64_t rows, tokens, dim, stride, query_stride;
  double scale;
};

template <typename T>
NEUROFLOW_MULTIVERSION void attend_rows_plain(const Head<T>& head) {
  using Sum = Accumulator<T>;
  std::vector<Sum> scores(head.tokens), mixed(head.dim);
  for (int64_t row = 0; row < head.rows; ++row) {
    const T* query = head.query + row * head.query_stride;
    Sum highest = -std::numeric_limits<Sum>::infinity(), total = 0;
    for (int64_t token = 0; token < head.tokens; ++token) {
      const T* key = head.key + token * head.stride;
      Sum score = 0;
#pragma omp simd reduction(+ : score)
      for (int64_t i = 0; i < head.dim; ++i) score += widen(query[i]) * widen(key[i]);
      scores[token] = score * static_cast<Sum>(head.scale);
      highest = std::max(highest, scores[token]);
    }
    std::fill(mixed.begin(), mixed.end(), Sum{0});
    for (int64_t token = 0; token < head.tokens; ++token) {
      const T* value = head.value + token * head.stride;
      const Sum weight = std::exp(scores[token] - highest);
      total += weight;
#pragma omp simd
      for (int64_t i = 0; i < head.dim; ++i) mixed[i] += weight * widen(value[i]);
    }
    for (int64_t i = 0; i < head.dim; ++i) head.out[row * head.stride + i] = narrow<T>(mixed[i] / total);
  }
}

#ifdef NEUROFLOW_AVX512

/// out [6, Columns * 16] (+)= a [6, steps] b [steps, Columns * 16], where a step is one lane of a and a vector of b.
template <typename Lanes, int Columns>
NEUROFLOW_AVX512_INLINE void panel_tile(const typename Lanes::Element* a, int64_t a_stride,
                                        const typename Lanes::Element* b, int64_t b_stride, int64_t steps, float* out,
                                        int64_t out_stride, bool accumulate) {
  __m512 sum[6][Columns];
  for (int i = 0; i < 6; ++i)
    for (int j = 0; j < Columns; ++j)
      sum[i][j] = accumulate ? _mm512_loadu_ps(out + i * out_stride + 16 * j) : _mm512_setzero_ps();
  for (int64_t step = 0; step < steps; ++step) {
    typename Lanes::Operand columns[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) columns[j] = Lanes::load(b + step * b_stride + Lanes::step * j);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      const typename Lanes::Operand row = Lanes::broadcast(a + i * a_stride + step * Lanes::lane);
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) sum[i][j] = Lanes::multiply_add(row, columns[j], sum[i][j]);
    }
  }
  for (int i = 0; i < 6; ++i)
    for (int j = 0; j < Columns; ++j) _mm512_storeu_ps(out + i * out_stride + 16 * j, sum[i][j]);
}

/// Transposes 16 vectors of 16 lanes.
NEUROFLOW_AVX512_INLINE void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  // quads[4 * i + j]: of rows 4 * i to 4 * i + 3, the columns j, j + 4, j + 8 and j + 12.
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(low, high, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

/// key [count, dim] -> packed [dim in lanes, 64 keys], a lane of each; zeros past `count` and `dim`. `Whole`: nothing
/// lies past them. What lies `ahead` elements further is prefetched, because a head's part of a row is too short for
/// the processor to predict the next.
template <typename Lanes, bool Whole, typename T>
NEUROFLOW_AVX512_INLINE void pack_keys(const T* key, int64_t stride, int64_t count, int64_t dim, int64_t ahead,
                                       T* packed) {
  constexpr int64_t block = 64;
  for (int64_t token = 0; token < block; token += 16)
    for (int64_t i = 0; i < dim; i += Lanes::step) {
      __m512i rows[16];
      for (int64_t row = 0; row < 16; ++row) {
        const T* source = key + (token + row) * stride + i;
        _mm_prefetch(reinterpret_cast<const char*>(source + ahead), _MM_HINT_T1);
        if constexpr (Whole)
          rows[row] = Lanes::bits(source);
        else
          rows[row] = Lanes::bits(source, token + row < count ? std::min(dim - i, Lanes::step) : 0);
      }
      transpose(rows);
      const int64_t lanes = Whole ? 16 : std::min<int64_t>((dim - i + Lanes::lane - 1) / Lanes::lane, 16);
      for (int64_t lane = 0; lane < lanes; ++lane)
        _mm512_storeu_si512(packed + (i / Lanes::lane + lane) * block * Lanes::lane + token * Lanes::lane, rows[lane]);
    }
}

/// value [count, dim] -> packed [64 in lanes, dim rounded up to 16], a lane of each; as pack_keys.
template <typename Lanes, bool Whole, typename T>
NEUROFLOW_AVX512_INLINE void pack_values(const T* value, int64_t stride, int64_t count, int64_t dim, int64_t ahead,
                                         T* packed) {
  for (int64_t token = 0; token < 64; token += Lanes::lane)
    for (int64_t i = 0; i < dim; i += 16, packed += Lanes::step) {
      const T* source = value + token * stride + i;
      for (int64_t row = 0; row < Lanes::lane; ++row)
        _mm_prefetch(reinterpret_cast<const char*>(source + row * stride + ahead), _MM_HINT_T1);
      if constexpr (Whole) {
        _mm512_storeu_si512(packed, Lanes::interleave(source, source + stride));
      } else {
        const int64_t columns = std::min<int64_t>(dim - i, 16);
        _mm512_storeu_si512(packed, Lanes::interleave(source, token < count ? columns : 0, source + stride,
                                                      token + 1 < count ? columns : 0));
      }
    }
}

/// 2 to the power of x, for x from -Inf to 0; relative error below 3e-7. For -Inf the remainder is NaN, and the last
/// step turns it into 0.
NEUROFLOW_AVX512_INLINE __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  // The series of 2^rest for |rest| <= 1/2.
  __m512 sum = _mm512_set1_ps(1.5252734e-5f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.5403530e-4f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3333558e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.6181291e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5504109e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.24022651f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69314718f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

/// As attend_rows_plain, over 64 keys at a time with a running maximum, so that no score leaves the processor's cache.
/// Weights are rounded to T before they multiply the values.
template <typename Lanes, typename T = typename Lanes::Element>
NEUROFLOW_AVX512 void attend_rows_avx512(Lanes, const Head<T>& head) {
  constexpr int64_t block = 64, lane = Lanes::lane;
  const int64_t rows = (head.rows + 5) / 6 * 6;               // in tiles of six queries, zeros past the last
  const int64_t inner = (head.dim + lane - 1) / lane * lane;  // of a score's sum
  const int64_t outer = (head.dim + 15) / 16 * 16;            // values per output
  const __m512 log2_scale = _mm512_set1_ps(static_cast<float>(head.scale * 1.4426950408889634));
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  std::vector<T> query(rows * inner), keys(inner * block), values(block * outer), weights(rows * block);
  std::vector<float> scores(rows * block), mixed(rows * outer), highest(rows, std::numeric_limits<float>::lowest()),
      total(rows * 16);
  for (int64_t row = 0; row < head.rows; ++row)
    std::copy_n(head.query + row * head.query_stride, head.dim, query.data() + row * inner);

  for (int64_t start = 0; start < head.tokens; start += block) {
    const int64_t count = std::min(block, head.tokens - start);
    const int64_t first = start * head.stride;
    // The next block, or the first one of the next head.
    const int64_t ahead = count == block ? block * head.stride : head.dim - first;
    if (count == block && head.dim % Lanes::step == 0) {
      pack_keys<Lanes, true>(head.key + first, head.stride, count, head.dim, ahead, keys.data());
      pack_values<Lanes, true>(head.value + first, head.stride, count, head.dim, ahead, values.data());
    } else {
      pack_keys<Lanes, false>(head.key + first, head.stride, count, head.dim, ahead, keys.data());
      pack_values<Lanes, false>(head.value + first, head.stride, count, head.dim, ahead, values.data());
    }
    __mmask16 valid[4];
    for (int64_t j = 0; j < 4; ++j)
      valid[j] = static_cast<__mmask16>((1u << std::clamp<int64_t>(count - 16 * j, 0, 16)) - 1);
    // Three passes over the queries, so that keys, and then values, stay in the fastest cache.
    for (int64_t row = 0; row < rows; row += 6)
      panel_tile<Lanes, 4>(&query[row * inner], inner, keys.data(), block * lane, inner / lane, &scores[row * block],
                           block, false);
    for (int64_t row = 0; row < head.rows; ++row) {
      __m512 score[4];
      for (int64_t j = 0; j < 4; ++j)
        score[j] = _mm512_mask_mul_ps(lowest, valid[j], _mm512_loadu_ps(&scores[row * block + 16 * j]), log2_scale);
      const __m512 most = _mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3]));
      __m512 peak = _mm512_set1_ps(highest[row]);
      if (_mm512_cmp_ps_mask(most, peak, _CMP_GT_OQ)) {
        const float higher = _mm512_reduce_max_ps(most), shrink = std::exp2(highest[row] - higher);
        for (int64_t j = 0; j < 16; ++j) total[row * 16 + j] *= shrink;
        for (int64_t j = 0; j < outer; ++j) mixed[row * outer + j] *= shrink;
        highest[row] = higher;
        peak = _mm512_set1_ps(higher);
      }
      __m512 sum = _mm512_loadu_ps(&total[row * 16]);
      for (int64_t j = 0; j < 4; ++j) {
        const __m512 weight = power_of_two(_mm512_sub_ps(score[j], peak));
        sum = _mm512_add_ps(sum, weight);
        Lanes::store(&weights[row * block + 16 * j], weight);
      }
      _mm512_storeu_ps(&total[row * 16], sum);
    }
    for (int64_t row = 0; row < rows; row += 6) {
      const T* weight = &weights[row * block];
      float* target = &mixed[row * outer];
      int64_t j = 0;
      for (; j + 64 <= outer; j += 64)
        panel_tile<Lanes, 4>(weight, block, &values[j * lane], outer * lane, block / lane, target + j, outer, true);
      for (; j < outer; j += 16)
        panel_tile<Lanes, 1>(weight, block, &values[j * lane], outer * lane, block / lane, target + j, outer, true);
    }
  }
  for (int64_t row = 0; row < head.rows; ++row) {
    const float sum = _mm512_reduce_add_ps(_mm512_loadu_ps(&total[16 * row]));
    for (int64_t i = 0; i < head.dim; ++i) head.out[row * head.stride + i] = narrow<T>(mixed[row * outer + i] / sum);
  }
}

#endif

/// As attend_rows_plain, with this processor's vectors.
template <typename T>
void attend_rows(const Head<T>& head) {
#ifdef NEUROFLOW_AVX512
  if (with_lanes<T>([&](auto lanes) { attend_rows_avx512(lanes, head); })) return;
#endif
  attend_rows_plain(head);
}

}  // namespace neuroflow
