// Sixteen floats at a time: in one register with AVX-512, in two with AVX2.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace hunyuan {

using bf16 = uint16_t;

constexpr int kLanes = 16;

#ifdef __AVX512F__

using Floats = __m512;
using Lanes = __mmask16;

// The first `count` of sixteen lanes.
inline Lanes first_lanes(int64_t count) {
  return count >= kLanes ? 0xFFFF : count <= 0 ? 0 : static_cast<Lanes>((1 << count) - 1);
}

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const float* from, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
inline void store(float* to, Lanes lanes, Floats values) { _mm512_mask_storeu_ps(to, lanes, values); }

inline Floats load_bf16(const bf16* from, Lanes lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline void store_bf16(bf16* to, Lanes lanes, Floats values) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }  // a · b + c
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats absolute(Floats a) { return _mm512_abs_ps(a); }
inline Floats nearest(Floats a) { return _mm512_roundscale_ps(a, 0); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }

// x · 2^n
inline Floats scale_by_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

#else

struct Floats {
  __m256 low, high;
};
using Lanes = int;  // how many

inline Lanes first_lanes(int64_t count) { return static_cast<int>(std::clamp<int64_t>(count, 0, kLanes)); }

inline __m256i mask_of(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Floats load(const float* from, Lanes lanes) {
  if (lanes == kLanes) return load(from);
  return {_mm256_maskload_ps(from, mask_of(lanes)), _mm256_maskload_ps(from + 8, mask_of(lanes - 8))};
}
inline void store(float* to, Floats values) {
  _mm256_storeu_ps(to, values.low);
  _mm256_storeu_ps(to + 8, values.high);
}
inline void store(float* to, Lanes lanes, Floats values) {
  if (lanes == kLanes) return store(to, values);
  _mm256_maskstore_ps(to, mask_of(lanes), values.low);
  _mm256_maskstore_ps(to + 8, mask_of(lanes - 8), values.high);
}

inline __m256 bf16_to_float(__m128i values) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}

inline Floats load_bf16(const bf16* from, Lanes lanes) {
  alignas(32) bf16 filled[kLanes] = {};
  if (lanes < kLanes) from = static_cast<const bf16*>(std::memcpy(filled, from, lanes * sizeof *from));
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  return {bf16_to_float(_mm_loadu_si128(halves)), bf16_to_float(_mm_loadu_si128(halves + 1))};
}

// To the nearest, ties to even, in the low half of each 32 bits; a NaN stays one.
inline __m256i float_to_bf16(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
}

inline void store_bf16(bf16* to, Lanes lanes, Floats values) {
  const __m256i mixed = _mm256_packus_epi32(float_to_bf16(values.low), float_to_bf16(values.high));
  const __m256i ordered = _mm256_permute4x64_epi64(mixed, 0xD8);
  if (lanes == kLanes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), ordered);
  alignas(32) bf16 filled[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(filled), ordered);
  std::memcpy(to, filled, lanes * sizeof *to);
}

inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) {  // a · b + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats maximum(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats minimum(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats absolute(Floats a) { return maximum(a, subtract(zeros(), a)); }
inline Floats nearest(Floats a) { return {_mm256_round_ps(a.low, 8), _mm256_round_ps(a.high, 8)}; }

inline float sum(Floats a) {
  alignas(32) float values[8];
  _mm256_store_ps(values, _mm256_add_ps(a.low, a.high));
  return ((values[0] + values[4]) + (values[2] + values[6])) + ((values[1] + values[5]) + (values[3] + values[7]));
}

inline float largest(Floats a) {
  alignas(32) float values[8];
  _mm256_store_ps(values, _mm256_max_ps(a.low, a.high));
  return *std::max_element(values, values + 8);
}

// x · 2^n; 0 where that is below the smallest normal number.
inline Floats scale_by_power(Floats x, Floats n) {
  const auto scaled = [](__m256 x, __m256 n) {
    const __m256 lowest = _mm256_set1_ps(-126.f);
    const __m256i exponent = _mm256_cvtps_epi32(_mm256_max_ps(n, lowest));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23);
    const __m256 normal = _mm256_cmp_ps(n, lowest, _CMP_GE_OQ);
    return _mm256_and_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(power)), normal);
  };
  return {scaled(x.low, n.low), scaled(x.high, n.high)};
}

#endif

// e^x for x ≤ 88, to 2^-22; 0 below the smallest normal number.
inline Floats exponential(Floats x) {
  x = maximum(x, all(-104.f));
  const Floats n = nearest(multiply(x, all(1.44269504f)));
  Floats r = multiply_add(n, all(-0.693359375f), x);  // ln 2 in two parts, the first exact times n
  r = multiply_add(n, all(2.12194440e-4f), r);
  Floats p = all(1.f / 720);
  for (const float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = multiply_add(p, r, all(c));
  return scale_by_power(p, n);
}

inline Floats silu(Floats x) {
  const Floats negated = minimum(subtract(zeros(), x), all(88.f));
  return divide(x, add(all(1.f), exponential(negated)));
}

}  // namespace hunyuan
