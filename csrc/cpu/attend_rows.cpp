#include "neuroflow/attend_rows.h"

#include "cpu.h"

namespace neuroflow::cpu {

Tensor attend_rows(Tensor query, Tensor key, Tensor value, double scale) {
  const int64_t rows = query.size(0), heads = query.size(1), dim = query.size(2), tokens = key.size(0);
  Tensor result = torch::stable::new_empty(query, {rows, heads, dim});
  dispatch(query.scalar_type(), "query", [&](auto zero) {
    using T = decltype(zero);
    const T* queries = data<T>(query, "query");
    const T* keys = data<T>(key, "key");
    const T* values = data<T>(value, "value");
    T* out = data<T>(result, "result");
    // Queries that share the work of bringing keys and values into order.
    constexpr int64_t chunk = 96;
    const int64_t chunks = (rows + chunk - 1) / chunk;
    const int64_t work = std::min(rows, chunk) * tokens * dim;
    torch::stable::parallel_for(0, heads * chunks, grain(computed, work), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit % chunks * chunk, head = unit / chunks * dim, offset = first * heads * dim + head;
        const Head<T> part{queries + offset, keys + head, values + head, out + offset, std::min(chunk, rows - first),
                           tokens,           dim,         heads * dim,   scale};
        neuroflow::attend_rows(part);
      }
    });
  });
  return result;
}

}  // namespace neuroflow::cpu

STABLE_TORCH_LIBRARY_IMPL(neuroflow, CPU, m) { m.impl("attend_rows", TORCH_BOX(&neuroflow::cpu::attend_rows)); }
