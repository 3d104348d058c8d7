#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace neuroflow {

/// Writes base + token for each active token, ascending; returns how many. index: room for `tokens`.
template <typename Active>
int64_t write_active(int64_t tokens, int32_t base, int32_t* index, Active active) {
  constexpr int64_t block = 16;  // most blocks hold nothing and are skipped by one vector comparison
  int64_t count = 0;
  for (int64_t start = 0; start < tokens; start += block) {
    const int64_t end = std::min(start + block, tokens);
    int any = 0;
    for (int64_t token = start; token < end; ++token) any |= active(token) ? 1 : 0;
    if (!any) continue;
    for (int64_t token = start; token < end; ++token) {
      index[count] = base + static_cast<int32_t>(token);
      count += active(token) ? 1 : 0;
    }
  }
  return count;
}

inline float nan_as_inf(float surprise) {
  return std::isnan(surprise) ? std::numeric_limits<float>::infinity() : surprise;
}

/// The `count` most surprising tokens of one stream; ties go to the lower token.
inline int64_t compact_most(const float* surprise, int64_t tokens, int64_t count, int32_t base, int32_t* index) {
  count = std::clamp<int64_t>(count, 0, tokens);
  if (count == 0 || count == tokens) return write_active(count, base, index, [](int64_t) { return true; });
  // One integer per token, ordered by surprise and then by descending number: no two are equal.
  const auto key = [surprise](int64_t token) {
    const uint32_t bits = std::bit_cast<uint32_t>(nan_as_inf(surprise[token]) + 0.0f);  // + 0 makes -0 equal to 0
    const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t{ordered} << 32 | ~static_cast<uint32_t>(token);
  };
  std::vector<uint64_t> keys(tokens);
  for (int64_t token = 0; token < tokens; ++token) keys[token] = key(token);
  std::nth_element(keys.begin(), keys.begin() + count - 1, keys.end(), std::greater<>());
  const uint64_t least = keys[count - 1];
  return write_active(tokens, base, index, [&](int64_t token) { return key(token) >= least; });
}

/// The tokens of one stream above `threshold` (all, if it is 0), or the `floor` most surprising if fewer are above.
inline int64_t compact_above(const float* surprise, int64_t tokens, float threshold, int64_t floor, int32_t base,
                             int32_t* index) {
  if (threshold <= 0) return compact_most(surprise, tokens, tokens, base, index);
  const auto above = [=](int64_t token) { return nan_as_inf(surprise[token]) > threshold; };
  const int64_t count = write_active(tokens, base, index, above);
  return count < std::min(floor, tokens) ? compact_most(surprise, tokens, floor, base, index) : count;
}

/// Closes the gaps between streams, which wrote their counts[s] rows to index + s * tokens, and fills the rest with -1.
inline void pack_streams(const int64_t* counts, int64_t streams, int64_t tokens, int32_t* index, int32_t* cu_seqlens) {
  int32_t* end = index;
  cu_seqlens[0] = 0;
  for (int64_t stream = 0; stream < streams; ++stream) {
    const int32_t* rows = index + stream * tokens;
    end = rows == end ? end + counts[stream] : std::copy(rows, rows + counts[stream], end);
    cu_seqlens[stream + 1] = static_cast<int32_t>(end - index);
  }
  std::fill(end, index + streams * tokens, -1);
}

}  // namespace neuroflow
