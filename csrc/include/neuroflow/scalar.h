// Element types: storage in float, double or 16 bits, arithmetic in float or double.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

// A function marked so is compiled once per x86-64 level, and the loader picks: one binary, every machine's vectors.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define NEUROFLOW_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef NEUROFLOW_MULTIVERSION
#define NEUROFLOW_MULTIVERSION
#endif

// What such a function calls must become part of it, or it runs with the oldest level's instructions.
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

// The 16-bit conversions have no branch, so that loops over them vectorise without any instruction set of their own.

NEUROFLOW_INLINE float widen(float value) { return value; }
NEUROFLOW_INLINE double widen(double value) { return value; }
NEUROFLOW_INLINE float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

NEUROFLOW_INLINE float widen(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const uint32_t rebias = 112u << 23;  // 127 - 15
  // A subnormal is its mantissa times 2^-24, the last place of 0.5.
  const float subnormal = std::bit_cast<float>(0x3f000000u | (magnitude >> 13)) - 0.5f;
  const uint32_t normal = magnitude + rebias + (magnitude >= 0x0f800000u ? rebias : 0u);  // Inf and NaN: twice
  return std::bit_cast<float>(sign | (magnitude < 0x00800000u ? std::bit_cast<uint32_t>(subnormal) : normal));
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

template <>
NEUROFLOW_INLINE BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
NEUROFLOW_INLINE Float16 narrow<Float16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the addition rounds to the last place of 0.5, which is a subnormal's unit.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, or from 65536 on Inf
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite))};
}

}  // namespace neuroflow
