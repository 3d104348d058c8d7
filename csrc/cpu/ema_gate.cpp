#include "cpu.h"

namespace neuroflow::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> ema_gate_(Tensor h, Tensor ema, double decay,
                                                     std::optional<Tensor> threshold, std::optional<Tensor> budget,
                                                     int64_t floor, std::optional<int64_t> rows) {
  require_gate(h, ema);
  require_rule(h, threshold, budget, floor);
  if (rows) require_rows(*rows);
  Tensor surprise = ema_surprise_(h, ema, decay);
  auto [index, cu_seqlens] = compact(surprise, threshold, budget, floor);
  const int64_t active = data<int32_t>(cu_seqlens, "cu_seqlens")[h.size(0)];
  Tensor packed = gather_rows(h, index, cu_seqlens, rows.value_or(active), std::nullopt, std::nullopt, 0);
  return {surprise, index, cu_seqlens, packed};
}

}  // namespace neuroflow::cpu

STABLE_TORCH_LIBRARY_IMPL(neuroflow, CPU, m) { m.impl("ema_gate_", TORCH_BOX(&neuroflow::cpu::ema_gate_)); }
