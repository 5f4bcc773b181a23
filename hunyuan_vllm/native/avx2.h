// The schemes with AVX2: bfloat16 and int8 weights for float rows, and int8 weights for rows rounded to int8.
//
// There are no products of bfloat16 and few registers: weights become floats (or 16-bit integers) as they are read, and
// each half of a block's channels is multiplied with all rows before the other is read.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace hunyuan {

// Rows are floats in memory of their own, and their products with 32 channels are summed in floats.
struct FloatRows {
  using Element = float;
  using Sums = Floats;
  using Stored = float;
  using Vector = const uint8_t*;  // of half a block's weights, read where they are multiplied
  static constexpr bool kRoundsRows = true;
  static constexpr int kInputs = 1;     // that lie together
  static constexpr int kHeadBytes = 0;  // before a block's weights
  static constexpr int kMostRows = 96;  // rows that pass a block before the next: they stay in the second cache
  static constexpr int kTileRows = 3;   // 12 of 16 registers hold their sums
  static constexpr int chains(int) { return 1; }
  static void encode(uint8_t*) {}
  static bool streams() { return true; }  // weights that are read once pass the caches by
  static Sums zero() { return zeros(); }
  static __m256 broadcast(const float* input) { return _mm256_broadcast_ss(input); }
  // Or the compiler would keep what it has read of rows and weights, for which there are no registers.
  static void between_halves(Vector& second, int64_t& place) { asm volatile("" : "+r"(second), "+r"(place)); }

  static Sums sum(Sums a, Sums b) { return hunyuan::add(a, b); }
  static void store(float* to, Sums sums, const uint8_t*) { hunyuan::store(to, sums); }
  static Floats values(const float* sums, float) { return load(sums); }

  static Sums multiply_add(Sums sums, __m256 x, __m256 low, __m256 high) {
    return {_mm256_fmadd_ps(x, low, sums.low), _mm256_fmadd_ps(x, high, sums.high)};
  }

  static float prepare(const bf16* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Lanes lanes = first_lanes(count - i);
      hunyuan::store(to + i, lanes, load_bf16(from + i, lanes));
    }
    return 1;
  }
};

struct BF16 : FloatRows {
  using Value = bf16;
  static constexpr int kBytes = 64;  // of 32 channels

  static constexpr int half(int place) { return place / kLanes; }
  static constexpr int lane(int place) {  // as unpacking leaves them in order
    const int fours = place % kLanes / 4;
    return (fours == 1 ? 2 : fours == 2 ? 1 : fours) * 4 + place % 4;
  }

  struct Reader {
    void operator()(const uint8_t* packed, Vector& first, Vector& second) const {
      first = packed;
      second = packed + kBytes / 2;
    }
  };

  static Sums add(Sums sums, __m256 x, Vector weights) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
    return multiply_add(sums, x, _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, both)),
                        _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, both)));
  }
};

struct W8A16 : FloatRows {
  using Value = int8_t;
  static constexpr int kBytes = 32;

  static constexpr int half(int place) { return place / kLanes; }
  static constexpr int lane(int place) { return place % kLanes; }

  struct Reader {
    void operator()(const uint8_t* packed, Vector& first, Vector& second) const {
      first = packed;
      second = packed + kBytes / 2;
    }
  };

  static __m256 floats(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }

  static Sums add(Sums sums, __m256 x, Vector weights) {
    return multiply_add(sums, x, floats(weights), floats(weights + 8));
  }
};

// Pairs of products of 16-bit integers, which rows and weights become.
struct W8A8 {
  struct Sums {
    __m256i low, high;
  };
  using Value = int8_t;
  using Element = int16_t;
  using Stored = int32_t;
  using Vector = const uint8_t*;
  static constexpr bool kRoundsRows = true;
  static constexpr int kInputs = 2;
  static constexpr int kBytes = 64;
  static constexpr int kHeadBytes = 0;
  static constexpr int kMostRows = 192;
  static constexpr int kTileRows = 3;
  static constexpr int chains(int) { return 1; }

  static constexpr int half(int place) { return place / kLanes; }
  static constexpr int lane(int place) { return place % kLanes; }
  static void encode(uint8_t*) {}
  static bool streams() { return true; }
  static Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static __m256i broadcast(const int16_t* inputs) {
    int some;
    std::memcpy(&some, inputs, sizeof some);
    return _mm256_set1_epi32(some);
  }
  static void between_halves(Vector& second, int64_t& place) { FloatRows::between_halves(second, place); }

  struct Reader {
    void operator()(const uint8_t* packed, Vector& first, Vector& second) const {
      first = packed;
      second = packed + kBytes / 2;
    }
  };

  static __m256i words(const uint8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Sums add(Sums sums, __m256i x, Vector weights) {
    return {_mm256_add_epi32(sums.low, _mm256_madd_epi16(x, words(weights))),
            _mm256_add_epi32(sums.high, _mm256_madd_epi16(x, words(weights + 16)))};
  }
  static Sums sum(Sums a, Sums b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  static void store(int32_t* to, Sums sums, const uint8_t*) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sums.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), sums.high);
  }
  static Floats values(const int32_t* sums, float scale) {
    const auto* halves = reinterpret_cast<const __m256i*>(sums);
    const Floats values{_mm256_cvtepi32_ps(_mm256_loadu_si256(halves)), _mm256_cvtepi32_ps(_mm256_loadu_si256(halves + 1))};
    return multiply(values, all(scale));
  }

  // Level of `count` values, and what a level is worth: the largest value is 127.
  static float prepare(const bf16* from, int64_t count, int16_t* to) {
    Floats greatest = zeros();
    for (int64_t i = 0; i < count; i += kLanes)
      greatest = maximum(greatest, absolute(load_bf16(from + i, first_lanes(count - i))));
    const float most = largest(greatest), scale = most > 0 ? most / 127 : 1;
    const Floats levels = all(1 / scale);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Lanes lanes = first_lanes(count - i);
      const Floats level = multiply(load_bf16(from + i, lanes), levels);
      const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(level.low), _mm256_cvtps_epi32(level.high));
      alignas(32) int16_t ordered[kLanes];
      _mm256_store_si256(reinterpret_cast<__m256i*>(ordered), _mm256_permute4x64_epi64(words, 0xD8));
      std::memcpy(to + i, ordered, lanes * sizeof *to);
    }
    return scale;
  }
};

}  // namespace hunyuan
