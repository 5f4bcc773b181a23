// Rows rounded to int8 and int8 weights, with AVX-512.
//
// The instruction multiplies unsigned with signed bytes: rows are kept as 128 + their level, and −128 times the sum of the
// weights belongs to each sum.
#pragma once

#include <algorithm>
#include <cstring>

#include "vectors.h"

namespace hunyuan {

struct W8A8 {
  using Value = int8_t;
  using Element = uint8_t;
  using Vector = __m512i;
  using Sums = __m512i;
  using Stored = int32_t;
  static constexpr bool kRoundsRows = true;
  static constexpr int kInputs = 4;
  static constexpr int kBytes = 128;
  static constexpr int kHeadBytes = 128;  // int32 of 32 channels: what belongs to their sums
  static constexpr int kMostRows = 512;   // rows that pass a block before the next: they stay in a cache
  static constexpr int kTileRows = 8;

  static constexpr int chains(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

  static constexpr int half(int place) { return place / kLanes; }
  static constexpr int lane(int place) { return place % kLanes; }
  static void encode(uint8_t*) {}

  // Whether weights that are read once pass the caches by. On Intel that costs: one row took 670 µs, and 460 µs without
  // (4096 x 1280, one thread of a machine with AMX); W8A16 gained nothing from the caches there.
  static bool streams() {
    static const bool value = !__builtin_cpu_is("intel");
    return value;
  }

  static Sums zero() { return _mm512_setzero_si512(); }

  static __m512i broadcast(const Element* inputs) {
    int some;
    std::memcpy(&some, inputs, sizeof some);
    return _mm512_set1_epi32(some);
  }
  static void between_halves(__m512i&, int64_t&) {}

  struct Reader {
    void operator()(const uint8_t* packed, __m512i& first, __m512i& second) const {
      first = _mm512_loadu_si512(packed);
      second = _mm512_loadu_si512(packed + sizeof(__m512i));
    }
  };

  static Sums add(Sums sums, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sums, x, w); }
  static Sums sum(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static void store(int32_t* to, Sums sums, const uint8_t* head) {
    _mm512_storeu_si512(to, _mm512_add_epi32(sums, _mm512_loadu_si512(head)));
  }
  static __m512 values(const int32_t* sums, float scale) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), _mm512_set1_ps(scale));
  }

  // 128 + level of `count` values, and what a level is worth: the largest value is 127.
  static float prepare(const bf16* from, int64_t count, uint8_t* to) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += kLanes)
      largest = _mm512_max_ps(largest, _mm512_abs_ps(load_bf16(from + i, first_lanes(count - i))));
    const float most = _mm512_reduce_max_ps(largest), scale = most > 0 ? most / 127 : 1;
    const __m512 levels = _mm512_set1_ps(1 / scale);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Lanes lanes = first_lanes(count - i);
      const __m512i level = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(from + i, lanes), levels));
      _mm512_mask_cvtepi32_storeu_epi8(to + i, lanes, _mm512_add_epi32(level, _mm512_set1_epi32(128)));
    }
    return scale;
  }
};

}  // namespace hunyuan
