// Element types: storage in float, double or 16 bits, arithmetic in float or double.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

// Compiles a function once per x86-64 level; the loader picks one, so a single binary uses every machine's vectors.
// Clang cannot clone templates, so its builds have the vectors of the level that they were compiled for.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define NEUROFLOW_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#ifndef NEUROFLOW_MULTIVERSION
#define NEUROFLOW_MULTIVERSION
#endif

// For what such a function calls: unless it is inlined, it runs with the oldest level's instructions.
#if defined(__GNUC__)
#define NEUROFLOW_INLINE inline __attribute__((always_inline))
#else
#define NEUROFLOW_INLINE inline
#endif

namespace neuroflow {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

/// The type that sums over elements of T are kept in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The 16-bit conversions have no branch and stay in 32 bits until the last shift, so loops over them vectorise without
// special instructions and without repacking halfway.

NEUROFLOW_INLINE float widen(float value) { return value; }
NEUROFLOW_INLINE double widen(double value) { return value; }
NEUROFLOW_INLINE float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

NEUROFLOW_INLINE float widen(Float16 value) {
  const int32_t bits = static_cast<int16_t>(value.bits);
  const int32_t magnitude = (bits & 0x7fff) << 13;
  const int32_t rebias = (127 - 15) << 23;
  // With the exponent of 2^-14, a subnormal comes out too large by exactly 2^-14.
  const float subnormal = std::bit_cast<float>(magnitude + rebias + (1 << 23)) - 0x1p-14f;
  const int32_t normal = magnitude + rebias + (-(magnitude >= 31 << 23) & rebias);  // Inf and NaN: the highest exponent
  const int32_t unsigned_bits = magnitude < 1 << 23 ? std::bit_cast<int32_t>(subnormal) : normal;
  return std::bit_cast<float>(unsigned_bits | (bits & INT32_MIN));
}

/// Rounds to nearest, ties to even; NaN stays NaN.
template <typename T>
NEUROFLOW_INLINE T narrow(Accumulator<T> value);

template <>
NEUROFLOW_INLINE float narrow<float>(float value) {
  return value;
}

template <>
NEUROFLOW_INLINE double narrow<double>(double value) {
  return value;
}

/// The bits of `value` rounded to bfloat16, in the upper half; the lower half is garbage.
NEUROFLOW_INLINE uint32_t round_to_upper_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value != value ? bits | 0x400000u : rounded;
}

template <>
NEUROFLOW_INLINE BFloat16 narrow<BFloat16>(float value) {
  return {static_cast<uint16_t>(round_to_upper_half(value) >> 16)};
}

template <>
NEUROFLOW_INLINE Float16 narrow<Float16>(float value) {
  const int32_t bits = std::bit_cast<int32_t>(value);
  const int32_t magnitude = std::min(bits & INT32_MAX, (16 + 127) << 23);  // 2^16 and above round to Inf
  // The result is built in the upper half. Below 2^-14, adding 0.5 rounds to the last place of 0.5, which is the unit
  // of a subnormal.
  const uint32_t normal = static_cast<uint32_t>(magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) << 3;
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) << 16;
  const uint32_t finite = magnitude < (127 - 14) << 23 ? subnormal : normal;
  const uint32_t kept = value != value ? 0x7e000000u : finite;
  return {static_cast<uint16_t>((kept | (bits & INT32_MIN)) >> 16)};
}

}  // namespace neuroflow
