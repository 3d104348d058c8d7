#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "neuroflow/device.cuh"

namespace neuroflow::cuda {

constexpr int most_vectors = 4;  // per lane: many loads in flight at once, within the registers there are

/// How rows of h and ema are spread over a block: `warps` warps per row, and as many rows as fit.
struct RowShape {
  static constexpr int threads = 128;  // few, so that a few hundred rows reach every multiprocessor

  int dim;
  int warps;

  __host__ __device__ int row_threads() const { return warps * warp_size; }
  __host__ __device__ int rows_per_block() const { return threads / row_threads(); }
};

template <typename Sum>
struct RowSums {
  Sum product = 0, token_square = 0, reference_square = 0;

  __device__ void add(Sum token, Sum reference) {
    product += token * reference;
    token_square += token * token;
    reference_square += reference * reference;
  }

  /// Over all lanes of a row. Every thread of the block has to take part.
  __device__ void reduce(const RowShape& shape) {
    product = warp_sum(product);
    token_square = warp_sum(token_square);
    reference_square = warp_sum(reference_square);
    if (shape.warps == 1) return;
    __shared__ Sum scratch[3][RowShape::threads / warp_size];
    const int warp = threadIdx.x / warp_size, first = warp / shape.warps * shape.warps;
    __syncthreads();  // until earlier rows have read their scratch
    if (threadIdx.x % warp_size == 0) {
      scratch[0][warp] = product;
      scratch[1][warp] = token_square;
      scratch[2][warp] = reference_square;
    }
    __syncthreads();
    product = token_square = reference_square = 0;
    for (int other = first; other < first + shape.warps; ++other) {
      product += scratch[0][other];
      token_square += scratch[1][other];
      reference_square += scratch[2][other];
    }
  }

  __device__ bool finite() const { return token_square < std::numeric_limits<Sum>::infinity(); }  // nor NaN

  __device__ float surprise() const {
    const Sum norm_floor = static_cast<Sum>(1e-8);
    const Sum norms = std::max(std::sqrt(token_square), norm_floor) * std::max(std::sqrt(reference_square), norm_floor);
    const Sum cosine = product / norms;
    return finite() && cosine == cosine ? static_cast<float>(1 - cosine) : std::numeric_limits<float>::infinity();
  }
};

/// 1 - cos(h, ema) of a row, then ema = keep ema + take h, where `move` is set and the row's squared norm is finite. h,
/// ema: the row, left alone unless `inside`. Every thread of the block has to take part; all threads of a row get its
/// value.
///
/// A lane keeps `vectors` times 16 bytes of h, and the matching part of ema, in registers. With 0 vectors rows may have
/// any length and alignment; they are then read twice, element by element. Sums are taken in the same order either way.
template <typename Token, typename Reference, int vectors>
__device__ inline float ema_surprise(const Token* h, Reference* ema, bool inside, const RowShape& shape,
                                     Accumulator<Token> keep, Accumulator<Token> take, bool move) {
  constexpr int width = vector_width<Token>;
  const int first = threadIdx.x % shape.row_threads() * width, stride = shape.row_threads() * width;
  RowSums<Accumulator<Token>> sums;
  if constexpr (vectors == 0) {
    const auto each = [&](auto&& visit) {
      for (int start = first; inside && start < shape.dim; start += stride)
        for (int column = start; column < std::min(start + width, shape.dim); ++column) visit(column);
    };
    each([&](int column) { sums.add(widen(h[column]), widen(ema[column])); });
    sums.reduce(shape);
    if (move && sums.finite())
      each([&](int column) { ema[column] = narrow<Reference>(keep * widen(ema[column]) + take * widen(h[column])); });
  } else {
    Vector<Token> token[vectors];
    Vector<Reference, width> reference[vectors];
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const bool loads = inside && first + i * stride < shape.dim;
      token[i] = loads ? load(h + first + i * stride) : Vector<Token>{};
      reference[i] = loads ? load<Reference, width>(ema + first + i * stride) : Vector<Reference, width>{};
    }
#pragma unroll
    for (int i = 0; i < vectors; ++i)
#pragma unroll
      for (int j = 0; j < width; ++j) sums.add(widen(token[i][j]), widen(reference[i][j]));
    sums.reduce(shape);
    if (inside && move && sums.finite())
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
#pragma unroll
        for (int j = 0; j < width; ++j)
          reference[i][j] = narrow<Reference>(keep * widen(reference[i][j]) + take * widen(token[i][j]));
        if (first + i * stride < shape.dim) store(ema + first + i * stride, reference[i]);
      }
  }
  return sums.surprise();
}

template <typename Token, typename Reference, int vectors>
__global__ void __launch_bounds__(RowShape::threads, vectors < most_vectors ? 6 : 5)
    ema_surprise_kernel(const Token* h, Reference* ema, float* surprise, int64_t rows, RowShape shape,
                        Accumulator<Token> keep, Accumulator<Token> take, bool move) {
  const int64_t row = int64_t{blockIdx.x} * shape.rows_per_block() + threadIdx.x / shape.row_threads();
  const float value = ema_surprise<Token, Reference, vectors>(h + row * shape.dim, ema + row * shape.dim, row < rows,
                                                              shape, keep, take, move);
  if (row < rows && threadIdx.x % shape.row_threads() == 0) surprise[row] = value;
}

template <typename Token>
RowShape row_shape(int64_t dim) {
  const int64_t lanes = ceil_div<int64_t>(dim, most_vectors * vector_width<Token>);
  return {static_cast<int>(dim), lanes <= warp_size ? 1 : lanes <= 2 * warp_size ? 2 : 4};
}

/// Calls f with the number of vectors per lane for rows of that shape, as a constant.
template <typename Token, typename Reference, typename F>
void dispatch_vectors(const Token* h, const Reference* ema, const RowShape& shape, F&& f) {
  const int vectors = ceil_div(shape.dim, shape.row_threads() * vector_width<Token>);
  if (!is_aligned(h, shape.dim) || !is_aligned(ema, shape.dim) || vectors > most_vectors)
    return f(std::integral_constant<int, 0>{});
  if (vectors <= 2) return f(std::integral_constant<int, 2>{});
  if (vectors == 3) return f(std::integral_constant<int, 3>{});
  return f(std::integral_constant<int, most_vectors>{});
}

/// h, ema: [rows, dim]; surprise: [rows].
template <typename Token, typename Reference>
void launch_ema_surprise(const Token* h, Reference* ema, float* surprise, int64_t rows, int64_t dim, double decay,
                         cudaStream_t stream) {
  const RowShape shape = row_shape<Token>(dim);
  const int64_t blocks = ceil_div<int64_t>(rows, shape.rows_per_block());
  dispatch_vectors(h, ema, shape, [&](auto vectors) {
    launch(ema_surprise_kernel<Token, Reference, vectors>, static_cast<unsigned>(blocks), RowShape::threads, 0, stream,
           h, ema, surprise, rows, shape, 1.0 - decay, decay, decay != 0);
  });
}

}  // namespace neuroflow::cuda
