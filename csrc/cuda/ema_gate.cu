#include "cuda.h"
#include "neuroflow/ema_gate.cuh"

namespace neuroflow::cuda {

namespace {

/// Waits for the stream.
int64_t count_on_host(const Tensor& cu_seqlens, cudaStream_t stream) {
  int32_t count = 0;
  const int32_t* end = data<const int32_t>(cu_seqlens, "cu_seqlens") + cu_seqlens.numel() - 1;
  check(cudaMemcpyAsync(&count, end, sizeof(count), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  return count;
}

Tensor gather(const Tensor& h, const Tensor& index, const Tensor& cu_seqlens, std::optional<int64_t> rows,
              cudaStream_t stream) {
  return gather_rows(h, index, cu_seqlens, rows ? *rows : count_on_host(cu_seqlens, stream), std::nullopt, std::nullopt,
                     0);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> ema_gate_(Tensor h, Tensor ema, double decay,
                                                     std::optional<Tensor> threshold, std::optional<Tensor> budget,
                                                     int64_t floor, std::optional<int64_t> rows) {
  require_gate(h, ema);
  require_rule(h, threshold, budget, floor);
  if (rows) require_rows(*rows);
  const Device device(h);
  const int64_t streams = h.size(0), tokens = h.size(1), dim = h.size(2);
  if (budget || streams * tokens == 0) {
    Tensor surprise = ema_surprise_(h, ema, decay);
    auto [index, cu_seqlens] = compact(surprise, threshold, budget, floor);
    return {surprise, index, cu_seqlens, gather(h, index, cu_seqlens, rows, device.stream)};
  }
  Tensor surprise = torch::stable::new_empty(h, {streams, tokens}, ScalarType::Float);
  Tensor index = torch::stable::new_empty(h, {streams * tokens}, ScalarType::Int);
  Tensor cu_seqlens = torch::stable::new_empty(h, {streams + 1}, ScalarType::Int);
  Tensor packed = torch::stable::new_empty(h, {rows.value_or(0), dim});
  dispatch_gate(h, ema, [&](auto token, auto reference) {
    using Token = decltype(token);
    const Tiles tiles = gate_tiles<Token>(streams, tokens, dim);
    Tensor words = torch::stable::new_empty(h, {tiles.words()}, ScalarType::Long);
    launch_ema_gate(data<const Token>(h, "h"), data<decltype(reference)>(ema, "ema"), decay,
                    data<const float>(*threshold, "threshold"), floor, tiles, dim, data<uint64_t>(words, "words"),
                    data<float>(surprise, "surprise"), data<int32_t>(index, "index"),
                    data<int32_t>(cu_seqlens, "cu_seqlens"), data<Token>(packed, "packed"), rows.value_or(0),
                    device.stream);
  });
  if (!rows) packed = gather(h, index, cu_seqlens, rows, device.stream);
  return {surprise, index, cu_seqlens, packed};
}

}  // namespace neuroflow::cuda

STABLE_TORCH_LIBRARY_IMPL(neuroflow, NEUROFLOW_KEY, m) { m.impl("ema_gate_", TORCH_BOX(&neuroflow::cuda::ema_gate_)); }
