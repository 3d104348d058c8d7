#include "cuda.h"
#include "neuroflow/scatter_kv.cuh"

namespace neuroflow::cuda {

template <typename T>
Heads<T> heads_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

void scatter_kv_(Tensor key_cache, Tensor value_cache, Tensor key, Tensor value, Tensor index, Tensor cu_seqlens) {
  const Device device(key_cache);
  const int64_t heads = key.size(1), head_dim = key.size(2);
  const Selection chosen = selection(index, cu_seqlens, key.size(0), key_cache.size(0) * key_cache.size(1));
  if (chosen.slots * heads * head_dim == 0) return;
  dispatch(key_cache.scalar_type(), "key_cache", [&](auto zero) {
    using T = decltype(zero);
    scatter_kv(data<T>(key_cache, "key_cache"), data<T>(value_cache, "value_cache"), heads_of<T>(key),
               heads_of<T>(value), chosen, heads, head_dim, device.stream);
  });
}

}  // namespace neuroflow::cuda

STABLE_TORCH_LIBRARY_IMPL(neuroflow, NEUROFLOW_KEY, m) {
  m.impl("scatter_kv_", TORCH_BOX(&neuroflow::cuda::scatter_kv_));
}
