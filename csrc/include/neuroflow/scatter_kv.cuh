#pragma once

#include "neuroflow/rows.cuh"

namespace neuroflow::cuda {

/// [rows, heads, head_dim], where the elements of a head are adjacent.
template <typename T>
struct Heads {
  const T* data;
  int64_t row_stride, head_stride;
};

/// Blocks with y = 0 write the keys, those with y = 1 the values.
template <typename Word>
__global__ void scatter_kv_kernel(Word* key_cache, Word* value_cache, Heads<Word> key, Heads<Word> value,
                                  Selection selection, int64_t words, int head_words) {
  const int64_t row = row_of_warp(), to = selection[row];
  if (to < 0) return;
  const bool of_key = blockIdx.y == 0;
  Word* target = (of_key ? key_cache : value_cache) + to * words;
  const Word* fresh = of_key ? key.data + row * key.row_stride : value.data + row * value.row_stride;
  const int64_t head_stride = of_key ? key.head_stride : value.head_stride;
  write_row(target, words, [&](int64_t i) {
    const int head = static_cast<int>(i) / head_words;
    return fresh[head * head_stride + (i - head * head_words)];
  });
}

/// key_cache[selection[r]] = key[r], value_cache[selection[r]] = value[r]. key_cache, value_cache: [*, heads *
/// head_dim]; key, value: [selection.slots, heads, head_dim].
template <typename T>
void scatter_kv(T* key_cache, T* value_cache, const Heads<T>& key, const Heads<T>& value, const Selection& selection,
                int64_t heads, int64_t head_dim, cudaStream_t stream) {
  const int64_t strides = key.row_stride | key.head_stride | value.row_stride | value.head_stride;
  const uintptr_t addresses = address(key_cache) | address(value_cache) | address(key.data) | address(value.data);
  dispatch_words(addresses | (strides | head_dim) * sizeof(T), [&](auto word) {
    using Word = decltype(word);
    const auto in_words = [](const Heads<T>& fresh) {
      return Heads<Word>{reinterpret_cast<const Word*>(fresh.data), words_of<T, Word>(fresh.row_stride),
                         words_of<T, Word>(fresh.head_stride)};
    };
    launch(scatter_kv_kernel<Word>, row_blocks(selection.slots, 2), row_threads, 0, stream,
           reinterpret_cast<Word*>(key_cache), reinterpret_cast<Word*>(value_cache), in_words(key), in_words(value),
           selection, words_of<T, Word>(heads * head_dim), words_of<T, Word>(head_dim));
  });
}

}  // namespace neuroflow::cuda
