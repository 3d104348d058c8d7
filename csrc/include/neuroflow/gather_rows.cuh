#pragma once

#include "neuroflow/rows.cuh"

namespace neuroflow::cuda {

template <typename Word>
__global__ void gather_rows_kernel(const Word* x, Selection selection, Word* packed, int64_t rows, int64_t words) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int64_t from = selection[row];
  if (from < 0)
    write_row(packed + row * words, words, [](int64_t) { return Word{}; });
  else
    write_row(packed + row * words, words, [&](int64_t i) { return x[from * words + i]; });
}

/// packed[r] = x[selection[r]], zeros if it selects none. x: [*, dim]; packed: [rows, dim].
template <typename T>
void gather_rows_plain(const T* x, const Selection& selection, T* packed, int64_t rows, int64_t dim,
                       cudaStream_t stream) {
  dispatch_words(address(x) | address(packed) | dim * sizeof(T), [&](auto word) {
    using Word = decltype(word);
    launch(gather_rows_kernel<Word>, row_blocks(rows), row_threads, 0, stream, reinterpret_cast<const Word*>(x),
           selection, reinterpret_cast<Word*>(packed), rows, words_of<T, Word>(dim));
  });
}

/// For rows that a warp holds in its registers, `vectors` times 16 bytes per lane.
template <typename T, int vectors>
__global__ void gather_rows_normalized_kernel(const T* x, Selection selection, const T* weight, const T* bias,
                                              float eps, T* packed, int64_t rows, int dim) {
  constexpr int width = vector_width<T>, stride = warp_size * width;
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int64_t from = selection[row];
  const int first = threadIdx.x % warp_size * width;
  Vector<T> held[vectors];
#pragma unroll
  for (int i = 0; i < vectors; ++i)
    held[i] = from >= 0 && first + i * stride < dim ? load(x + from * dim + first + i * stride) : Vector<T>{};

  if (from >= 0) {
    float sum = 0, square = 0;
#pragma unroll
    for (int i = 0; i < vectors; ++i)
#pragma unroll
      for (int j = 0; j < width; ++j) sum += widen(held[i][j]);
    const float mean = warp_sum(sum) / static_cast<float>(dim);
#pragma unroll
    for (int i = 0; i < vectors; ++i)
      if (first + i * stride < dim)
#pragma unroll
        for (int j = 0; j < width; ++j) square += (widen(held[i][j]) - mean) * (widen(held[i][j]) - mean);
    const float scale = 1 / sqrtf(warp_sum(square) / static_cast<float>(dim) + eps);
#pragma unroll
    for (int i = 0; i < vectors; ++i)
      if (first + i * stride < dim) {
        const Vector<T> w = load(weight + first + i * stride), b = load(bias + first + i * stride);
#pragma unroll
        for (int j = 0; j < width; ++j)
          held[i][j] = narrow<T>((widen(held[i][j]) - mean) * scale * widen(w[j]) + widen(b[j]));
      }
  }
#pragma unroll
  for (int i = 0; i < vectors; ++i)
    if (first + i * stride < dim) store(packed + row * dim + first + i * stride, held[i]);
}

/// For rows of any width and alignment, which a warp reads three times.
template <typename T>
__global__ void gather_rows_normalized_kernel(const T* x, Selection selection, const T* weight, const T* bias,
                                              float eps, T* packed, int64_t rows, int64_t dim) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int64_t from = selection[row];
  const int lane = threadIdx.x % warp_size;
  T* target = packed + row * dim;
  if (from < 0) {
    for (int64_t i = lane; i < dim; i += warp_size) target[i] = T{};
    return;
  }
  const T* token = x + from * dim;
  float sum = 0, square = 0;
  for (int64_t i = lane; i < dim; i += warp_size) sum += widen(token[i]);
  const float mean = warp_sum(sum) / static_cast<float>(dim);
  for (int64_t i = lane; i < dim; i += warp_size) square += (widen(token[i]) - mean) * (widen(token[i]) - mean);
  const float scale = 1 / sqrtf(warp_sum(square) / static_cast<float>(dim) + eps);
  for (int64_t i = lane; i < dim; i += warp_size)
    target[i] = narrow<T>((widen(token[i]) - mean) * scale * widen(weight[i]) + widen(bias[i]));
}

/// packed[r] = LayerNorm(x[selection[r]]), zeros if it selects none. weight, bias: [dim]. Mean and variance in two
/// passes over the row.
template <typename T>
void gather_rows_normalized(const T* x, const Selection& selection, const T* weight, const T* bias, double eps,
                            T* packed, int64_t rows, int64_t dim, cudaStream_t stream) {
  constexpr int lane_width = warp_size * vector_width<T>;
  void (*whole)(const T*, Selection, const T*, const T*, float, T*, int64_t, int) =
      dim <= 512    ? gather_rows_normalized_kernel<T, 512 / lane_width>
      : dim <= 1024 ? gather_rows_normalized_kernel<T, 1024 / lane_width>
                    : gather_rows_normalized_kernel<T, 2048 / lane_width>;
  void (*any)(const T*, Selection, const T*, const T*, float, T*, int64_t, int64_t) = gather_rows_normalized_kernel<T>;
  const bool aligned = is_aligned(x, dim) && is_aligned(weight, dim) && is_aligned(bias, dim);
  if (aligned && is_aligned(packed, dim) && dim <= 2048)
    launch(whole, row_blocks(rows), row_threads, 0, stream, x, selection, weight, bias, eps, packed, rows, dim);
  else
    launch(any, row_blocks(rows), row_threads, 0, stream, x, selection, weight, bias, eps, packed, rows, dim);
}

}  // namespace neuroflow::cuda
