#pragma once

#include "neuroflow/scalar.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) { return neuroflow::widen(neuroflow::BFloat16{value.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {neuroflow::narrow<neuroflow::BFloat16>(value).bits}; }
