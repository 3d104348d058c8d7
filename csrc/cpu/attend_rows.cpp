#include "neuroflow/attend_rows.h"

#include <vector>

#include "cpu.h"

namespace neuroflow::cpu {

Tensor attend_rows(Tensor query, Tensor key, Tensor value, std::optional<Tensor> cu_seqlens, double scale) {
  require(query, "query", {any, any, any}, query);
  const int64_t rows = query.size(0), heads = query.size(1), dim = query.size(2), width = heads * dim;
  require(key, "key", {cu_seqlens ? any : 1, any, heads, dim}, query);
  const int64_t streams = key.size(0), tokens = key.size(1);
  require(value, "value", {streams, tokens, heads, dim}, query);
  if (cu_seqlens) require(*cu_seqlens, "cu_seqlens", {streams + 1}, query);
  Tensor result = torch::stable::new_empty(query, {rows, heads, dim});

  // Queries that share the work of packing keys and values.
  constexpr int64_t chunk = 96;
  struct Part {
    int64_t stream, first, rows;
  };
  std::vector<Part> parts;
  int64_t end = 0;
  const int32_t* ends = cu_seqlens ? data<int32_t>(*cu_seqlens, "cu_seqlens") + 1 : nullptr;
  for (int64_t stream = 0; stream < streams; ++stream) {
    const int64_t begin = end;
    end = ends ? std::clamp<int64_t>(ends[stream], begin, rows) : rows;
    for (int64_t first = begin; first < end; first += chunk)
      parts.push_back({stream, first, std::min(chunk, end - first)});
  }

  dispatch(query.scalar_type(), "query", [&](auto zero) {
    using T = decltype(zero);
    const T* queries = heads_data<T>(query, "query");
    const T* keys = data<T>(key, "key");
    const T* values = data<T>(value, "value");
    T* out = data<T>(result, "result");
    if (rows * width == 0) return;
    std::fill(out + end * width, out + rows * width, T{});
    const int64_t count = static_cast<int64_t>(parts.size()), work = std::min(rows, chunk) * tokens * dim;
    torch::stable::parallel_for(0, heads * count, grain(computed, work), [&](int64_t from, int64_t to) {
      for (int64_t unit = from; unit < to; ++unit) {
        const auto [stream, first, some] = parts[unit % count];
        const int64_t head = unit / count, cached = stream * tokens * width + head * dim;
        const Head<T> part{queries + first * query.stride(0) + head * query.stride(1),
                           keys + cached,
                           values + cached,
                           out + first * width + head * dim,
                           some,
                           tokens,
                           dim,
                           width,
                           query.stride(0),
                           scale};
        neuroflow::attend_rows(part);
      }
    });
  });
  return result;
}

}  // namespace neuroflow::cpu

STABLE_TORCH_LIBRARY_IMPL(neuroflow, CPU, m) { m.impl("attend_rows", TORCH_BOX(&neuroflow::cpu::attend_rows)); }
