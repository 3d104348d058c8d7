#include "cuda.h"
#include "neuroflow/scatter_kv.cuh"

namespace neuroflow::cuda {

template <typename T>
Heads<T> heads_of(const Tensor& tensor, const char* name) {
  return {heads_data<T>(tensor, name), tensor.stride(0), tensor.stride(1)};
}

void scatter_kv_(Tensor key_cache, Tensor value_cache, Tensor key, Tensor value, Tensor index, Tensor cu_seqlens) {
  require_scatter_kv(key_cache, value_cache, key, value, index, cu_seqlens);
  const Device device(key_cache);
  const int64_t heads = key.size(1), head_dim = key.size(2);
  const Selection chosen = selection(index, cu_seqlens, key.size(0), key_cache.size(0) * key_cache.size(1));
  dispatch(key_cache.scalar_type(), "key_cache", [&](auto zero) {
    using T = decltype(zero);
    T *keys = data<T>(key_cache, "key_cache"), *values = data<T>(value_cache, "value_cache");
    const Heads<T> fresh_keys = heads_of<T>(key, "key"), fresh_values = heads_of<T>(value, "value");
    if (chosen.slots * heads * head_dim == 0) return;
    scatter_kv(keys, values, fresh_keys, fresh_values, chosen, heads, head_dim, device.stream);
  });
}

}  // namespace neuroflow::cuda

STABLE_TORCH_LIBRARY_IMPL(neuroflow, NEUROFLOW_KEY, m) {
  m.impl("scatter_kv_", TORCH_BOX(&neuroflow::cuda::scatter_kv_));
}
