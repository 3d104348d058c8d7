#include "neuroflow/compact.h"

#include "cpu.h"

namespace neuroflow::cpu {

std::tuple<Tensor, Tensor> compact(Tensor surprise, std::optional<Tensor> threshold, std::optional<Tensor> budget,
                                   int64_t floor) {
  require(surprise, "surprise", {any, any}, surprise);
  require_rule(surprise, threshold, budget, floor);
  const int64_t streams = surprise.size(0), tokens = surprise.size(1);
  Tensor index = torch::stable::new_empty(surprise, {streams * tokens}, ScalarType::Int);
  Tensor cu_seqlens = torch::stable::new_empty(surprise, {streams + 1}, ScalarType::Int);
  const float* values = data<float>(surprise, "surprise");
  const float* thresholds = threshold ? data<float>(*threshold, "threshold") : nullptr;
  const int32_t* budgets = budget ? data<int32_t>(*budget, "budget") : nullptr;
  int32_t* rows = data<int32_t>(index, "index");
  std::vector<int64_t> counts(streams);
  torch::stable::parallel_for(0, streams, grain(computed, tokens), [&](int64_t begin, int64_t end) {
    for (int64_t stream = begin; stream < end; ++stream) {
      const int64_t base = stream * tokens;
      counts[stream] = thresholds ? compact_above(values + base, tokens, thresholds[stream], floor, base, rows + base)
                                  : compact_most(values + base, tokens, std::max<int64_t>(budgets[stream], floor), base,
                                                 rows + base);
    }
  });
  pack_streams(counts.data(), streams, tokens, rows, data<int32_t>(cu_seqlens, "cu_seqlens"));
  return {index, cu_seqlens};
}

}  // namespace neuroflow::cpu

STABLE_TORCH_LIBRARY_IMPL(neuroflow, CPU, m) { m.impl("compact", TORCH_BOX(&neuroflow::cpu::compact)); }
