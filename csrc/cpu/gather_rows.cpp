#include "neuroflow/gather_rows.h"

#include "cpu.h"

namespace neuroflow::cpu {

Tensor gather_rows(Tensor x, Tensor index, Tensor cu_seqlens, int64_t rows, std::optional<Tensor> norm_weight,
                   std::optional<Tensor> norm_bias, double eps) {
  require_gather(x, index, cu_seqlens, rows, norm_weight, norm_bias);
  const int64_t dim = x.size(2);
  const auto [chosen, count] = selection(index, cu_seqlens, rows, x.size(0) * x.size(1));
  Tensor packed = torch::stable::new_empty(x, {rows, dim});
  dispatch(x.scalar_type(), "x", [&, chosen = chosen, count = count](auto zero) {
    using T = decltype(zero);
    const T* source = data<T>(x, "x");
    const T* weight = norm_weight ? data<T>(*norm_weight, "norm_weight") : nullptr;
    const T* bias = norm_bias ? data<T>(*norm_bias, "norm_bias") : nullptr;
    T* target = data<T>(packed, "packed");
    torch::stable::parallel_for(0, count, grain(weight ? computed : copied, dim), [&](int64_t begin, int64_t end) {
      if (weight)
        gather_rows_normalized(source, chosen + begin, weight, bias, eps, target + begin * dim, end - begin, dim);
      else
        neuroflow::gather_rows(source, chosen + begin, target + begin * dim, end - begin, dim);
    });
    std::fill(target + count * dim, target + rows * dim, zero);
  });
  return packed;
}

}  // namespace neuroflow::cpu

STABLE_TORCH_LIBRARY_IMPL(neuroflow, CPU, m) { m.impl("gather_rows", TORCH_BOX(&neuroflow::cpu::gather_rows)); }
