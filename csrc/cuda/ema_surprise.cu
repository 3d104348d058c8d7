#include "cuda.h"
#include "neuroflow/ema_surprise.cuh"

namespace neuroflow::cuda {

Tensor ema_surprise_(Tensor h, Tensor ema, double decay) {
  require_gate(h, ema);
  const Device device(h);
  const int64_t rows = h.size(0) * h.size(1), dim = h.size(2);
  Tensor surprise = torch::stable::new_empty(h, {h.size(0), h.size(1)}, ScalarType::Float);
  dispatch_gate(h, ema, [&](auto token, auto reference) {
    const auto* tokens = data<const decltype(token)>(h, "h");
    auto* references = data<decltype(reference)>(ema, "ema");
    if (rows > 0)
      launch_ema_surprise(tokens, references, data<float>(surprise, "surprise"), rows, dim, decay, device.stream);
  });
  return surprise;
}

}  // namespace neuroflow::cuda

STABLE_TORCH_LIBRARY_IMPL(neuroflow, NEUROFLOW_KEY, m) {
  m.impl("ema_surprise_", TORCH_BOX(&neuroflow::cuda::ema_surprise_));
}
