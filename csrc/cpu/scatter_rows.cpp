#include "neuroflow/scatter_rows.h"

#include "cpu.h"

namespace neuroflow::cpu {

void scatter_rows_(Tensor cache, Tensor packed, Tensor index, Tensor cu_seqlens, double blend) {
  require_scatter(cache, packed, index, cu_seqlens);
  require_apart(cache, index);
  const int64_t dim = cache.size(2);
  const auto [chosen, count] = selection(index, cu_seqlens, packed.size(0), cache.size(0) * cache.size(1));
  dispatch(cache.scalar_type(), "cache", [&, chosen = chosen, count = count](auto zero) {
    using T = decltype(zero);
    T* target = data<T>(cache, "cache");
    const T* source = data<T>(packed, "packed");
    torch::stable::parallel_for(0, count, grain(blend == 1 ? copied : computed, dim), [&](int64_t begin, int64_t end) {
      if (blend == 1)
        scatter_rows(target, source + begin * dim, chosen + begin, end - begin, dim);
      else
        scatter_rows_blended(target, source + begin * dim, chosen + begin, blend, end - begin, dim);
    });
  });
}

}  // namespace neuroflow::cpu

STABLE_TORCH_LIBRARY_IMPL(neuroflow, CPU, m) { m.impl("scatter_rows_", TORCH_BOX(&neuroflow::cpu::scatter_rows_)); }
