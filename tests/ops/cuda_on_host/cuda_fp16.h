#pragma once

#include "neuroflow/scalar.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return neuroflow::widen(neuroflow::Float16{value.bits}); }
inline __half __float2half_rn(float value) { return {neuroflow::narrow<neuroflow::Float16>(value).bits}; }
