#include "cuda.h"
#include "neuroflow/scatter_rows.cuh"

namespace neuroflow::cuda {

void scatter_rows_(Tensor cache, Tensor packed, Tensor index, Tensor cu_seqlens, double blend) {
  require_scatter(cache, packed, index, cu_seqlens);
  const Device device(cache);
  const int64_t dim = cache.size(2);
  const Selection chosen = selection(index, cu_seqlens, packed.size(0), cache.size(0) * cache.size(1));
  dispatch(cache.scalar_type(), "cache", [&](auto zero) {
    using T = decltype(zero);
    T* target = data<T>(cache, "cache");
    const T* source = data<T>(packed, "packed");
    if (chosen.slots * dim == 0) return;
    if (blend == 1)
      scatter_rows(target, source, chosen, dim, device.stream);
    else
      scatter_rows_blended(target, source, chosen, blend, dim, device.stream);
  });
}

}  // namespace neuroflow::cuda

STABLE_TORCH_LIBRARY_IMPL(neuroflow, NEUROFLOW_KEY, m) {
  m.impl("scatter_rows_", TORCH_BOX(&neuroflow::cuda::scatter_rows_));
}
