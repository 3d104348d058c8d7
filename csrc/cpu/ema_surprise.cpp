#include "neuroflow/ema_surprise.h"

#include "cpu.h"

namespace neuroflow::cpu {

Tensor ema_surprise_(Tensor h, Tensor ema, double decay) {
  require_gate(h, ema);
  const int64_t streams = h.size(0), tokens = h.size(1), dim = h.size(2);
  Tensor surprise = torch::stable::new_empty(h, {streams, tokens}, ScalarType::Float);
  const auto run = [&](auto token, auto reference) {
    const auto* rows = data<decltype(token)>(h, "h");
    auto* references = data<decltype(reference)>(ema, "ema");
    float* out = data<float>(surprise, "surprise");
    torch::stable::parallel_for(0, streams * tokens, grain(computed, dim), [&](int64_t begin, int64_t end) {
      ema_surprise(rows + begin * dim, references + begin * dim, out + begin, end - begin, dim, decay);
    });
  };
  dispatch(h.scalar_type(), "h", [&](auto token) {
    if (ema.scalar_type() == h.scalar_type()) return run(token, token);
    if (sizeof(token) != 2 || ema.scalar_type() != ScalarType::Float)
      throw std::invalid_argument("ema is neither of h's dtype nor, for an h of 16 bits, float32");
    run(token, float{});
  });
  return surprise;
}

}  // namespace neuroflow::cpu

STABLE_TORCH_LIBRARY_IMPL(neuroflow, CPU, m) { m.impl("ema_surprise_", TORCH_BOX(&neuroflow::cpu::ema_surprise_)); }
