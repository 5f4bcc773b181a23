// bfloat16 rows, with bfloat16 or int8 weights, with AVX-512.
//
// int8 weights become bfloat16, exactly, in registers: two table look-ups give the low and the high byte of |w|, and the
// sign is stored beside it. The look-ups run beside the multiplications of eight rows at no cost, so that it does not pay
// to keep what they give.
#pragma once

#include <algorithm>
#include <cstring>

#include "vectors.h"

namespace hunyuan {

// Rows as they are. Two inputs of 16 channels are multiplied at a time, and summed in floats.
struct Bf16Rows {
  using Element = bf16;
  using Vector = __m512i;
  using Sums = __m512;
  using Stored = float;
  static constexpr bool kRoundsRows = false;
  static constexpr int kInputs = 2;      // that lie together
  static constexpr int kHeadBytes = 0;   // before a block's weights
  static constexpr int kMostRows = 512;  // rows that pass a block before the next: they stay in a cache
  static constexpr int kTileRows = 8;    // 16 of 32 registers hold their sums

  static constexpr int chains(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
  static bool streams() { return true; }  // weights that are read once pass the caches by
  static Sums zero() { return _mm512_setzero_ps(); }

  static __m512i broadcast(const Element* inputs) {
    int some;
    std::memcpy(&some, inputs, sizeof some);
    return _mm512_set1_epi32(some);
  }
  static void between_halves(__m512i&, int64_t&) {}

  static Sums add(Sums sums, __m512i x, __m512i w) { return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)w); }
  static Sums sum(Sums a, Sums b) { return _mm512_add_ps(a, b); }
  static void store(float* to, Sums sums, const uint8_t*) { _mm512_storeu_ps(to, sums); }
  static __m512 values(const float* sums, float) { return _mm512_loadu_ps(sums); }

  static float prepare(const bf16* from, int64_t count, bf16* to) {
    std::copy(from, from + count, to);
    return 1;
  }
};

struct BF16 : Bf16Rows {
  using Value = bf16;
  static constexpr int kBytes = 128;  // of 32 channels for two inputs

  static constexpr int half(int place) { return place / kLanes; }
  static constexpr int lane(int place) { return place % kLanes; }
  static void encode(uint8_t*) {}

  struct Reader {
    void operator()(const uint8_t* packed, __m512i& first, __m512i& second) const {
      first = _mm512_loadu_si512(packed);
      second = _mm512_loadu_si512(packed + sizeof(__m512i));
    }
  };
};

struct Bf16Bytes {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

// The bytes of 0 … 127 in bfloat16.
constexpr Bf16Bytes bf16_bytes() {
  Bf16Bytes bytes{};
  for (int value = 1; value < 128; ++value) {
    int exponent = 0;
    while (value >> (exponent + 1)) ++exponent;
    const int bits = (127 + exponent) << 7 | ((value << (7 - exponent)) & 127);
    bytes.low[value] = bits & 255;
    bytes.high[value] = bits >> 8;
  }
  return bytes;
}

struct W8A16 : Bf16Rows {
  using Value = int8_t;
  static constexpr int kBytes = 64;  // of 32 channels for two inputs

  // Which half of the channels and which of its 16 a block's n-th pair belongs to: as unpacking leaves them in order.
  static constexpr int half(int place) { return place / 4 % 2; }
  static constexpr int lane(int place) { return place / 8 * 4 + place % 4; }

  // Sign and magnitude.
  static void encode(uint8_t* piece) {
    const __m512i values = _mm512_loadu_si512(piece), sign = _mm512_and_si512(values, _mm512_set1_epi8(-128));
    _mm512_storeu_si512(piece, _mm512_or_si512(_mm512_abs_epi8(values), sign));
  }

  struct Reader {
    static constexpr Bf16Bytes kBytesOf = bf16_bytes();
    __m512i low0 = _mm512_load_si512(kBytesOf.low), low1 = _mm512_load_si512(kBytesOf.low + 64);
    __m512i high0 = _mm512_load_si512(kBytesOf.high), high1 = _mm512_load_si512(kBytesOf.high + 64);
    __m512i sign = _mm512_set1_epi8(-128);

    // Pairs of 16 channels of either half.
    void operator()(const uint8_t* packed, __m512i& first, __m512i& second) const {
      const __m512i code = _mm512_loadu_si512(packed);
      const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);  // an index is 7 bits: the sign does not count
      __m512i high = _mm512_permutex2var_epi8(high0, code, high1);
      high = _mm512_ternarylogic_epi64(high, code, sign, 0xF8);  // high | (code & sign)
      first = _mm512_unpacklo_epi8(low, high);
      second = _mm512_unpackhi_epi8(low, high);
    }
  };
};

}  // namespace hunyuan
