// The two passes over a row that determine the speed of the ops.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "neuroflow/scalar.h"

namespace neuroflow {

/// Two bfloat16 at a time: a shift or a mask turns each half of a 32-bit word into a float, without the widening and
/// narrowing shuffles that cost more than the arithmetic.
struct BFloat16Pair {
  float first, second;
};

NEUROFLOW_INLINE BFloat16Pair load_pair(const BFloat16* pair) {
  uint32_t word;
  std::memcpy(&word, pair, sizeof word);
  return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
}

NEUROFLOW_INLINE void store_pair(BFloat16* pair, float first, float second) {
  const uint32_t word = round_to_upper_half(first) >> 16 | (round_to_upper_half(second) & 0xffff0000u);
  std::memcpy(pair, &word, sizeof word);
}

template <typename A, typename B>
constexpr bool in_pairs = std::is_same_v<A, BFloat16> && std::is_same_v<B, BFloat16>;

template <typename Sum>
struct Products {
  Sum ab, aa, bb;
};

/// The inner products of rows a and b with each other and with themselves. With `update`, the same pass through memory
/// sets previous = b and then b = keep b + take a.
template <bool update, typename A, typename B>
NEUROFLOW_INLINE Products<Accumulator<A>> products(const A* a, B* b, B* previous, Accumulator<A> keep,
                                                   Accumulator<A> take, int64_t dim) {
  Accumulator<A> ab = 0, aa = 0, bb = 0;
  int64_t done = 0;
  if constexpr (in_pairs<A, B>) {
    done = dim / 2 * 2;
#pragma omp simd reduction(+ : ab, aa, bb)
    for (int64_t i = 0; i < done; i += 2) {
      const BFloat16Pair x = load_pair(a + i), y = load_pair(b + i);
      ab += x.first * y.first + x.second * y.second;
      aa += x.first * x.first + x.second * x.second;
      bb += y.first * y.first + y.second * y.second;
      if constexpr (update) {
        std::memcpy(previous + i, b + i, 2 * sizeof(B));
        store_pair(b + i, keep * y.first + take * x.first, keep * y.second + take * x.second);
      }
    }
  }
#pragma omp simd reduction(+ : ab, aa, bb)
  for (int64_t i = done; i < dim; ++i) {
    const Accumulator<A> x = widen(a[i]), y = widen(b[i]);
    ab += x * y;
    aa += x * x;
    bb += y * y;
    if constexpr (update) {
      std::memcpy(previous + i, b + i, sizeof(B));
      b[i] = narrow<B>(keep * y + take * x);
    }
  }
  return {ab, aa, bb};
}

/// target = keep target + take source, in source's accumulator.
template <typename A, typename B>
NEUROFLOW_INLINE void blend_row(A* target, const B* source, Accumulator<B> keep, Accumulator<B> take, int64_t dim) {
  int64_t done = 0;
  if constexpr (in_pairs<A, B>) {
    done = dim / 2 * 2;
#pragma omp simd
    for (int64_t i = 0; i < done; i += 2) {
      const BFloat16Pair x = load_pair(target + i), y = load_pair(source + i);
      store_pair(target + i, keep * x.first + take * y.first, keep * x.second + take * y.second);
    }
  }
#pragma omp simd
  for (int64_t i = done; i < dim; ++i) target[i] = narrow<A>(keep * widen(target[i]) + take * widen(source[i]));
}

}  // namespace neuroflow
