#include "neuroflow/linear_rows.h"

#include "cpu.h"

namespace neuroflow::cpu {

Tensor linear_rows(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  require(x, "x", {any, any}, x);
  require(weight, "weight", {any, x.size(1)}, x);
  if (bias) require(*bias, "bias", {weight.size(0)}, x);
  const int64_t rows = x.size(0), inner = x.size(1), width = weight.size(0);
  Tensor result = torch::stable::new_empty(x, {rows, width});
  dispatch(x.scalar_type(), "x", [&](auto zero) {
    using T = decltype(zero);
    const T* tokens = data<T>(x, "x");
    const T* weights = data<T>(weight, "weight");
    const T* shift = bias ? data<T>(*bias, "bias") : nullptr;
    T* out = data<T>(result, "result");
    constexpr int64_t panel = 4;  // rows of weight computed together
    const int64_t panels = (width + panel - 1) / panel;
    torch::stable::parallel_for(0, panels, grain(computed, panel * inner), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * panel, last = std::min(end * panel, width);
      neuroflow::linear_rows(tokens, weights, shift, out, rows, inner, width, first, last);
    });
  });
  return result;
}

}  // namespace neuroflow::cpu

STABLE_TORCH_LIBRARY_IMPL(neuroflow, CPU, m) { m.impl("linear_rows", TORCH_BOX(&neuroflow::cpu::linear_rows)); }
