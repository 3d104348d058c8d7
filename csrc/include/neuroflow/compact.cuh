#pragma once

#include <algorithm>
#include <bit>

#include "neuroflow/select.cuh"

namespace neuroflow::cuda {

/// One block per stream, in the order in which blocks begin. `progress`: a word that counts them, and one for each, all
/// 0 at first.
__global__ void __launch_bounds__(1024)
    compact_kernel(const float* surprise, const float* threshold, const int32_t* budget, int floor, int tokens,
                   int64_t streams, int32_t* index, int32_t* cu_seqlens, uint64_t* progress) {
  __shared__ SelectScratch scratch;
  __shared__ int block, base;
  if (threadIdx.x == 0) block = streams == 1 ? 0 : static_cast<int>(add_relaxed(progress, uint64_t{1}));
  __syncthreads();
  const int stream = block;
  surprise += int64_t{stream} * tokens;

  Cutoff cutoff{Cutoff::all, 0};
  int count = tokens, found = tokens;
  if (threshold != nullptr) {
    if (!(threshold[stream] <= 0)) cutoff.key = ordered_key(threshold[stream]);
    found = count_active(surprise, tokens, cutoff.key, scratch);
    count = std::max(found, std::min(floor, tokens));
  } else {
    count = std::min(std::max(budget[stream], floor), tokens);
    if (count < tokens) cutoff.key = Cutoff::none;
    found = count < tokens ? 0 : tokens;
  }
  if (count > found) cutoff = select_most(surprise, tokens, count, scratch);
  if (count > found || threshold == nullptr) count_active(surprise, tokens, cutoff.key, scratch);

  if (threadIdx.x < warp_size) {
    int before = 0;
    if (streams > 1) {
      if (threadIdx.x == 0) publish(progress + 1 + stream, own_sum, count);
      before = look_back(progress + 1, stream);
      if (threadIdx.x == 0) publish(progress + 1 + stream, inclusive_sum, before + count);
    }
    if (threadIdx.x == 0) base = before;
  }
  __syncthreads();
  const int64_t passed = int64_t{stream} * tokens - base;  // inactive tokens of earlier streams
  write_active(surprise, tokens, cutoff, stream * tokens, index + base, scratch);
  write_unused(passed, passed + tokens - count, streams * tokens, index);
  if (threadIdx.x == 0) {
    if (stream == 0) cu_seqlens[0] = 0;
    cu_seqlens[stream + 1] = base + count;
  }
}

/// Words that `launch_compact` needs and sets to 0. They are not kept between calls, because then they could not serve
/// two CUDA streams at once. A single stream needs none, since its only block never waits.
inline int64_t compact_words(int64_t streams) { return streams > 1 ? streams + 1 : 0; }

/// surprise: [streams, tokens]; threshold or budget: [streams]; index: [streams * tokens]; cu_seqlens: [streams + 1].
inline void launch_compact(const float* surprise, const float* threshold, const int32_t* budget, int64_t floor,
                           int64_t streams, int64_t tokens, int32_t* index, int32_t* cu_seqlens, uint64_t* progress,
                           cudaStream_t stream) {
  if (streams > 1) check(cudaMemsetAsync(progress, 0, compact_words(streams) * sizeof(uint64_t), stream));
  const unsigned threads = std::bit_ceil(static_cast<unsigned>(std::clamp<int64_t>(tokens, warp_size, 1024)));
  launch(compact_kernel, static_cast<unsigned>(streams), threads, 0, stream, surprise, threshold, budget,
         std::min(floor, tokens), tokens, streams, index, cu_seqlens, progress);
}

}  // namespace neuroflow::cuda
