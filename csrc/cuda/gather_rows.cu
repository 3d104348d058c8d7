#include "cuda.h"
#include "neuroflow/gather_rows.cuh"

namespace neuroflow::cuda {

Tensor gather_rows(Tensor x, Tensor index, Tensor cu_seqlens, int64_t rows, std::optional<Tensor> norm_weight,
                   std::optional<Tensor> norm_bias, double eps) {
  require_gather(x, index, cu_seqlens, rows, norm_weight, norm_bias);
  const Device device(x);
  const int64_t dim = x.size(2);
  const Selection chosen = selection(index, cu_seqlens, rows, x.size(0) * x.size(1));
  Tensor packed = torch::stable::new_empty(x, {rows, dim});
  dispatch(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    const T* source = data<T>(x, "x");
    T* target = data<T>(packed, "packed");
    const T* weight = norm_weight ? data<const T>(*norm_weight, "norm_weight") : nullptr;
    const T* bias = norm_bias ? data<const T>(*norm_bias, "norm_bias") : nullptr;
    if (rows * dim == 0) return;
    if (weight)
      gather_rows_normalized(source, chosen, weight, bias, eps, target, rows, dim, device.stream);
    else
      gather_rows_plain(source, chosen, target, rows, dim, device.stream);
  });
  return packed;
}

}  // namespace neuroflow::cuda

STABLE_TORCH_LIBRARY_IMPL(neuroflow, NEUROFLOW_KEY, m) {
  m.impl("gather_rows", TORCH_BOX(&neuroflow::cuda::gather_rows));
}
