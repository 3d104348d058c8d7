#include "cuda.h"
#include "neuroflow/compact.cuh"

namespace neuroflow::cuda {

std::tuple<Tensor, Tensor> compact(Tensor surprise, std::optional<Tensor> threshold, std::optional<Tensor> budget,
                                   int64_t floor) {
  require(surprise, "surprise", {any, any}, surprise);
  require_rule(surprise, threshold, budget, floor);
  const Device device(surprise);
  const int64_t streams = surprise.size(0), tokens = surprise.size(1);
  Tensor index = torch::stable::new_empty(surprise, {streams * tokens}, ScalarType::Int);
  Tensor cu_seqlens = torch::stable::new_empty(surprise, {streams + 1}, ScalarType::Int);
  const float* values = data<const float>(surprise, "surprise");
  int32_t* ends = data<int32_t>(cu_seqlens, "cu_seqlens");
  if (streams * tokens == 0) {
    check(cudaMemsetAsync(ends, 0, (streams + 1) * sizeof(int32_t), device.stream));
    return {index, cu_seqlens};
  }
  Tensor words = torch::stable::new_empty(surprise, {compact_words(streams)}, ScalarType::Long);
  launch_compact(values, threshold ? data<const float>(*threshold, "threshold") : nullptr,
                 budget ? data<const int32_t>(*budget, "budget") : nullptr, floor, streams, tokens,
                 data<int32_t>(index, "index"), ends, data<uint64_t>(words, "words"), device.stream);
  return {index, cu_seqlens};
}

}  // namespace neuroflow::cuda

STABLE_TORCH_LIBRARY_IMPL(neuroflow, NEUROFLOW_KEY, m) { m.impl("compact", TORCH_BOX(&neuroflow::cuda::compact)); }
