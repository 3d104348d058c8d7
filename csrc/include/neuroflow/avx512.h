// Multiplying rows with AVX-512: 32-bit lanes that hold one float or two bfloat16, with products summed in float.
#pragma once

#include "neuroflow/scalar.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define NEUROFLOW_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define NEUROFLOW_AVX512_INLINE inline __attribute__((always_inline)) NEUROFLOW_AVX512

// GCC 12 warns of its own header's undefined vectors once they are inlined.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdlib>
#include <string_view>

namespace neuroflow {

/// Whether this processor has AVX-512, and torch was not told to do without it.
inline bool has_avx512() {
  static const bool has = [] {
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    return (asked == nullptr || std::string_view(asked) == "avx512") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }();
  return has;
}

inline bool has_avx512_bf16() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return has;
}

/// float: one per lane.
struct FloatLanes {
  using Element = float;
  using Operand = __m512;
  static constexpr int64_t step = 16;  // elements per vector
  static constexpr int64_t lane = 1;   // elements per lane

  static NEUROFLOW_AVX512_INLINE Operand load(const float* x) { return _mm512_loadu_ps(x); }
  static NEUROFLOW_AVX512_INLINE Operand load(const float* x, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), x);
  }
  static NEUROFLOW_AVX512_INLINE __m512i bits(const float* x) { return _mm512_castps_si512(load(x)); }
  static NEUROFLOW_AVX512_INLINE __m512i bits(const float* x, int64_t count) {
    return _mm512_castps_si512(load(x, count));
  }
  /// A vector of 16 columns; each lane holds an element of one row. bfloat16 takes two rows.
  static NEUROFLOW_AVX512_INLINE __m512i interleave(const float* x, const float*) { return bits(x); }
  static NEUROFLOW_AVX512_INLINE __m512i interleave(const float* x, int64_t count, const float*, int64_t) {
    return bits(x, count);
  }
  static NEUROFLOW_AVX512_INLINE Operand broadcast(const float* x) { return _mm512_set1_ps(*x); }
  static NEUROFLOW_AVX512_INLINE __m512 multiply_add(Operand a, Operand b, __m512 sum) {
    return _mm512_fmadd_ps(a, b, sum);
  }
  static NEUROFLOW_AVX512_INLINE void store(float* out, __m512 value) { _mm512_storeu_ps(out, value); }
  static NEUROFLOW_AVX512_INLINE void store(float* out, __m128 value, __mmask8 valid) {
    _mm_mask_storeu_ps(out, valid, value);
  }
  static NEUROFLOW_AVX512_INLINE __m128 load4(const float* x, __mmask8 valid) { return _mm_maskz_loadu_ps(valid, x); }
};

/// bfloat16: two per lane.
struct BFloat16Storage {
  using Element = BFloat16;
  static constexpr int64_t step = 32;
  static constexpr int64_t lane = 2;

  static NEUROFLOW_AVX512_INLINE __m512i bits(const BFloat16* x) { return _mm512_loadu_si512(x); }
  static NEUROFLOW_AVX512_INLINE __m512i bits(const BFloat16* x, int64_t count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), x);
  }
  /// A vector of 16 columns; each lane holds an element of each of two rows.
  static NEUROFLOW_AVX512_INLINE __m512i interleave(const BFloat16* x, const BFloat16* y) {
    return interleave(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y)));
  }
  static NEUROFLOW_AVX512_INLINE __m512i interleave(const BFloat16* x, int64_t count, const BFloat16* y,
                                                    int64_t y_count) {
    return interleave(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), x),
                      _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << y_count) - 1), y));
  }
  static NEUROFLOW_AVX512_INLINE __m512i interleave(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  static NEUROFLOW_AVX512_INLINE __m512i broadcast_bits(const BFloat16* x) {
    return _mm512_set1_epi32(static_cast<int32_t>(uint32_t{x[1].bits} << 16 | x[0].bits));
  }
  static NEUROFLOW_AVX512_INLINE void store(BFloat16* out, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  static NEUROFLOW_AVX512_INLINE void store(BFloat16* out, __m128 value, __mmask8 valid) {
    const __m128i bits = _mm_castps_si128(value);
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    __m128i rounded = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd);
    rounded = _mm_mask_or_epi32(rounded, _mm_cmp_ps_mask(value, value, _CMP_UNORD_Q), bits, _mm_set1_epi32(0x400000));
    _mm_mask_storeu_epi16(out, valid, _mm_cvtepi32_epi16(_mm_srli_epi32(rounded, 16)));
  }
  static NEUROFLOW_AVX512_INLINE __m128 load4(const BFloat16* x, __mmask8 valid) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(valid, x)), 16));
  }
};

/// Multiplied in pairs by the bfloat16 dot product instruction.
struct BFloat16Lanes : BFloat16Storage {
  using Operand = __m512bh;

  static NEUROFLOW_AVX512_INLINE Operand load(const BFloat16* x) { return (__m512bh)bits(x); }
  static NEUROFLOW_AVX512_INLINE Operand load(const BFloat16* x, int64_t count) { return (__m512bh)bits(x, count); }
  static NEUROFLOW_AVX512_INLINE Operand broadcast(const BFloat16* x) { return (__m512bh)broadcast_bits(x); }
  static NEUROFLOW_AVX512_INLINE __m512 multiply_add(Operand a, Operand b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, a, b);
  }
  using BFloat16Storage::store;
  static NEUROFLOW_AVX512_INLINE void store(BFloat16* out, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(value));
  }
};

/// Multiplied as floats, on processors without that instruction.
struct BFloat16AsFloatLanes : BFloat16Storage {
  struct Operand {
    __m512 even, odd;
  };

  static NEUROFLOW_AVX512_INLINE Operand widen(__m512i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
  }
  static NEUROFLOW_AVX512_INLINE Operand load(const BFloat16* x) { return widen(bits(x)); }
  static NEUROFLOW_AVX512_INLINE Operand load(const BFloat16* x, int64_t count) { return widen(bits(x, count)); }
  static NEUROFLOW_AVX512_INLINE Operand broadcast(const BFloat16* x) { return widen(broadcast_bits(x)); }
  static NEUROFLOW_AVX512_INLINE __m512 multiply_add(const Operand& a, const Operand& b, __m512 sum) {
    return _mm512_fmadd_ps(a.odd, b.odd, _mm512_fmadd_ps(a.even, b.even, sum));
  }
};

/// Calls f with the lanes that this processor has for T, or returns false.
template <typename T, typename F>
bool with_lanes(F&& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (has_avx512()) return f(FloatLanes{}), true;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_avx512_bf16()) return f(BFloat16Lanes{}), true;
    if (has_avx512()) return f(BFloat16AsFloatLanes{}), true;
  }
  return false;
}

}  // namespace neuroflow
#endif
