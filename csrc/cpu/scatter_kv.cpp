#include "neuroflow/scatter_kv.h"

#include "cpu.h"

namespace neuroflow::cpu {

void scatter_kv_(Tensor key_cache, Tensor value_cache, Tensor key, Tensor value, Tensor index, Tensor cu_seqlens) {
  require_scatter_kv(key_cache, value_cache, key, value, index, cu_seqlens);
  require_apart(key_cache, index);
  require_apart(value_cache, index);
  const int64_t heads = key.size(1), dim = key.size(2);
  const auto [chosen, count] = selection(index, cu_seqlens, key.size(0), key_cache.size(0) * key_cache.size(1));
  dispatch(key_cache.scalar_type(), "key_cache", [&, chosen = chosen, count = count](auto zero) {
    using T = decltype(zero);
    T* keys = data<T>(key_cache, "key_cache");
    T* values = data<T>(value_cache, "value_cache");
    const Projected<T> fresh_keys{heads_data<T>(key, "key"), key.stride(0), key.stride(1), heads, dim};
    const Projected<T> fresh_values{heads_data<T>(value, "value"), value.stride(0), value.stride(1), heads, dim};
    torch::stable::parallel_for(0, count, grain(copied, 2 * heads * dim), [&](int64_t begin, int64_t end) {
      scatter_heads(keys, fresh_keys, chosen, begin, end);
      scatter_heads(values, fresh_values, chosen, begin, end);
    });
  });
}

}  // namespace neuroflow::cpu

STABLE_TORCH_LIBRARY_IMPL(neuroflow, CPU, m) { m.impl("scatter_kv_", TORCH_BOX(&neuroflow::cpu::scatter_kv_)); }
