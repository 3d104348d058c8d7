#pragma once

#include "neuroflow/rows.cuh"

namespace neuroflow::cuda {

template <typename Word>
__global__ void scatter_rows_kernel(Word* cache, const Word* packed, Selection selection, int64_t words) {
  const int64_t row = row_of_warp(), to = selection[row];
  if (to < 0) return;
  write_row(cache + to * words, words, [&](int64_t i) { return packed[row * words + i]; });
}

/// cache[selection[r]] = packed[r]. cache: [*, dim]; packed: [selection.slots, dim].
template <typename T>
void scatter_rows(T* cache, const T* packed, const Selection& selection, int64_t dim, cudaStream_t stream) {
  dispatch_words(address(cache) | address(packed) | dim * sizeof(T), [&](auto word) {
    using Word = decltype(word);
    launch(scatter_rows_kernel<Word>, row_blocks(selection.slots), row_threads, 0, stream,
           reinterpret_cast<Word*>(cache), reinterpret_cast<const Word*>(packed), selection, words_of<T, Word>(dim));
  });
}

template <typename T, typename Word>
__global__ void scatter_rows_blended_kernel(Word* cache, const Word* packed, Selection selection, float keep,
                                            float take, int64_t words) {
  constexpr int width = sizeof(Word) / sizeof(T);
  struct Pair {
    Word old, fresh;
  };
  const int64_t row = row_of_warp(), to = selection[row];
  if (to < 0) return;
  const auto load = [&](int64_t i) { return Pair{cache[to * words + i], packed[row * words + i]}; };
  write_row(cache + to * words, words, load, [&](const Pair& pair) {
    auto mixed = std::bit_cast<Vector<T, width>>(pair.old);
    const auto fresh = std::bit_cast<Vector<T, width>>(pair.fresh);
#pragma unroll
    for (int i = 0; i < width; ++i) mixed[i] = narrow<T>(keep * widen(mixed[i]) + take * widen(fresh[i]));
    return std::bit_cast<Word>(mixed);
  });
}

/// cache[selection[r]] = (1 - blend) cache[selection[r]] + blend packed[r].
template <typename T>
void scatter_rows_blended(T* cache, const T* packed, const Selection& selection, double blend, int64_t dim,
                          cudaStream_t stream) {
  const auto in_words_of = [&](auto word) {
    using Word = decltype(word);
    launch(scatter_rows_blended_kernel<T, Word>, row_blocks(selection.slots), row_threads, 0, stream,
           reinterpret_cast<Word*>(cache), reinterpret_cast<const Word*>(packed), selection, 1 - blend, blend,
           words_of<T, Word>(dim));
  };
  if (is_aligned(cache, dim) && is_aligned(packed, dim))
    in_words_of(uint4{});
  else
    in_words_of(T{});
}

}  // namespace neuroflow::cuda
