// One block finds and writes the most surprising tokens of a stream.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include "neuroflow/device.cuh"

namespace neuroflow::cuda {

/// Unsigned integers in the order of the floats, with NaN as +inf and -0 as 0; none is 0 or 2^32 - 1.
__device__ inline uint32_t ordered_key(float surprise) {
  const float known = surprise == surprise ? surprise + 0.0f : std::numeric_limits<float>::infinity();
  const uint32_t bits = std::bit_cast<uint32_t>(known);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/// Tokens above the key are active, and of those equal to it the first `ties`.
struct Cutoff {
  static constexpr uint32_t all = 0, none = 0xffffffff;

  uint32_t key;
  int ties;
};

/// Shared memory of a block that selects among the tokens of one stream.
struct SelectScratch {
  static constexpr int bins = 2048;

  int histogram[bins];
  int sums[warp_size];
  int above[warp_size], equal[warp_size];  // tokens of each warp's part of the stream
  int digit, left;
};

/// Calls visit(token, key) for every `stride`-th token from first + lane on, after loading several. The whole warp
/// visits together; past `end` the key is 0.
template <typename Visit>
__device__ inline void visit_keys(const float* surprise, int64_t first, int64_t end, int stride, Visit&& visit) {
  constexpr int batch = 8;
  const int lane = threadIdx.x % warp_size;
#pragma unroll 1
  for (; first < end; first += batch * stride) {
    uint32_t keys[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int64_t token = first + i * stride + lane;
      keys[i] = token < end ? ordered_key(surprise[token]) : 0;
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) visit(first + i * stride + lane, keys[i]);
  }
}

/// The part of a stream that a warp counts, and later writes.
struct WarpPart {
  int64_t first, end;

  __device__ explicit WarpPart(int64_t tokens) {
    const int64_t length = ceil_div<int64_t>(tokens, blockDim.x) * warp_size;
    first = std::min(threadIdx.x / warp_size * length, tokens);
    end = std::min(first + length, tokens);
  }
};

/// Counts, with a whole block, the tokens above the key, and leaves the counts of each warp's part for `write_active`.
/// Not to be called twice in a row: only the barriers of `select_most` ensure that no thread still reads the last
/// count.
__device__ inline int count_active(const float* surprise, int tokens, uint32_t key, SelectScratch& scratch) {
  const int warp = threadIdx.x / warp_size;
  const WarpPart part(tokens);
  int above = 0, equal = 0;
  visit_keys(surprise, part.first, part.end, warp_size, [&](int64_t, uint32_t other) {
    above += other > key;
    equal += other == key;
  });
  above = warp_sum(above);
  equal = warp_sum(equal);
  if (threadIdx.x % warp_size == 0) {
    scratch.above[warp] = above;
    scratch.equal[warp] = equal;
  }
  __syncthreads();
  int total = 0;
  for (int other = 0; other < static_cast<int>(blockDim.x) / warp_size; ++other) total += scratch.above[other];
  return total;
}

/// The cutoff that separates the `count` most surprising tokens, 1 to all, from the others. A whole block, whose
/// threads are a power of two, does a radix search for the least key of these from the top, eleven bits at a time.
__device__ inline Cutoff select_most(const float* surprise, int tokens, int count, SelectScratch& scratch) {
  constexpr int digit_bits = 11, bins = SelectScratch::bins;
  const int lane = threadIdx.x % warp_size, threads = blockDim.x;
  uint32_t key = 0, known = 0;  // the bits found so far, and their mask
  int left = count;             // still to be found among the tokens with these bits
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const uint32_t mask = shift == 0 ? (1u << 10) - 1 : (1u << digit_bits) - 1;
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += threads) scratch.histogram[bin] = 0;
    __syncthreads();
    visit_keys(surprise, threadIdx.x - lane, tokens, threads, [&](int64_t, uint32_t other) {
      const bool counts = other != 0 && ((other ^ key) & known) == 0;
      const int digit = other >> shift & mask;
      // Frames without motion are full of equal keys, which would queue up for one bin.
      const int first = __shfl_sync(all_lanes, digit, 0);
      if (__all_sync(all_lanes, counts && digit == first)) {
        if (lane == 0) atomicAdd(scratch.histogram + digit, warp_size);
      } else if (counts) {
        atomicAdd(scratch.histogram + digit, 1);
      }
    });
    __syncthreads();
    const int each = bins / threads, last = bins - 1 - static_cast<int>(threadIdx.x) * each;  // from the top
    int own = 0;
    for (int i = 0; i < each; ++i) own += scratch.histogram[last - i];
    int above = block_exclusive_sum(own, scratch.sums);
    if (above < left && left <= above + own) {
      int digit = last;
      for (; above + scratch.histogram[digit] < left; --digit) above += scratch.histogram[digit];
      scratch.digit = digit;
      scratch.left = left - above;
    }
    __syncthreads();
    key |= static_cast<uint32_t>(scratch.digit) << shift;
    known |= mask << shift;
    left = scratch.left;
  }
  return {key, left};
}

/// Writes the rows of the active tokens, ascending. To be called by the block that counted them last.
__device__ inline void write_active(const float* surprise, int tokens, Cutoff cutoff, int first_row, int32_t* index,
                                    const SelectScratch& scratch) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const unsigned lower_lanes = (1u << lane) - 1;
  const WarpPart part(tokens);
  int above = 0, equal = 0;  // among the tokens before the visited ones
  for (int other = 0; other < warp; ++other) {
    above += scratch.above[other];
    equal += scratch.equal[other];
  }
  visit_keys(surprise, part.first, part.end, warp_size, [&](int64_t token, uint32_t key) {
    const unsigned aboves = __ballot_sync(all_lanes, key > cutoff.key);
    const unsigned equals = __ballot_sync(all_lanes, key == cutoff.key);
    const int rank = above + __popc(aboves & lower_lanes), tie = equal + __popc(equals & lower_lanes);
    if (key > cutoff.key || (key == cutoff.key && tie < cutoff.ties))
      index[rank + std::min(tie, cutoff.ties)] = first_row + static_cast<int>(token);
    above += __popc(aboves);
    equal += __popc(equals);
  });
}

/// Writes -1 to one slot past the last active token for each of the inactive tokens numbered `first` to `end`. They are
/// numbered from 0 over all streams, and their slots taken from the end of `index`.
__device__ inline void write_unused(int64_t first, int64_t end, int64_t slots, int32_t* index) {
  for (int64_t slot = slots - end + threadIdx.x; slot < slots - first; slot += blockDim.x) index[slot] = -1;
}

}  // namespace neuroflow::cuda
