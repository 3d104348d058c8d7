// Shared by the kernels that move rows.
#pragma once

#include <functional>

#include "neuroflow/device.cuh"

namespace neuroflow::cuda {

/// One warp per row, in blocks small enough that a few hundred rows reach every multiprocessor.
constexpr int rows_per_block = 4;
constexpr int row_threads = rows_per_block * warp_size;

inline dim3 row_blocks(int64_t rows, unsigned int each = 1) {
  return {static_cast<unsigned int>(ceil_div<int64_t>(rows, rows_per_block)), each};
}

__device__ inline int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / warp_size;
}

/// The rows of a tensor listed in `index`, up to a count that only the device knows.
struct Selection {
  const int32_t* index;
  const int32_t* count;
  int64_t slots;  // entries of index that may be read
  int64_t limit;  // rows of the tensor

  /// The row of the tensor for this packed row; -1 if there is none, or if it is outside the tensor.
  __device__ int64_t operator[](int64_t packed) const {
    if (packed >= slots) return -1;
    const int32_t row = index[packed];  // before the count is known: one wait instead of two
    return packed < *count && row >= 0 && row < limit ? row : -1;
  }
};

/// Calls f with the widest word, of 16, 4 or 2 bytes, that divides every address and size OR-ed into `bits`.
template <typename F>
void dispatch_words(uintptr_t bits, F&& f) {
  if (bits % sizeof(uint4) == 0) return f(uint4{});
  if (bits % sizeof(uint32_t) == 0) return f(uint32_t{});
  return f(uint16_t{});
}

/// The number of words that `elements` of T fill.
template <typename T, typename Word>
int64_t words_of(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(Word));
}

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

/// target[i] = finish(load(i)), by a warp that loads several words before it writes the first.
template <typename Word, typename Load, typename Finish = std::identity>
__device__ inline void write_row(Word* target, int64_t words, Load&& load, Finish&& finish = {}) {
  constexpr int batch = 4;
#pragma unroll 1
  for (int64_t first = threadIdx.x % warp_size; first < words; first += batch * warp_size) {
    decltype(load(first)) loaded[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i)
      if (first + i * warp_size < words) loaded[i] = load(first + i * warp_size);
#pragma unroll
    for (int i = 0; i < batch; ++i)
      if (first + i * warp_size < words) target[first + i * warp_size] = finish(loaded[i]);
  }
}

}  // namespace neuroflow::cuda
