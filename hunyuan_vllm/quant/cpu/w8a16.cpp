// Products of bfloat16 rows with int8 weights for x86 CPUs with AVX-512 BF16 and VBMI. `native.py` compiles it.
//
// Weights lie in memory as int8 and become bfloat16, exactly, in registers: two table look-ups give the low and the high
// byte of |w|, and the sign is stored beside it. The look-ups run beside the multiplications of eight rows at no cost, so
// that it does not pay to keep what they give. Sums are float32.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

// OpenMP by its run-time calls, which GCC's and LLVM's libraries have, and linked with neither: torch has loaded one, and
// a second would start threads of its own.
extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_num_threads();
int omp_get_thread_num();
}

namespace {

using bf16 = uint16_t;

constexpr int kLanes = 16;          // float32 in a register
constexpr int kBlock = 2 * kLanes;  // output channels of a block: 16 of the first half of all, 16 of the second
constexpr int kPairBytes = 64;      // of a block, for two inputs
constexpr int kRows = 8;            // of a tile, whose sums are 16 of 32 registers
constexpr int kMostRows = 512;      // rows that pass a block of weights before the next: they stay in a cache
constexpr int64_t kAhead = 40 * kPairBytes;   // bytes to fetch ahead of their use
constexpr int64_t kWorthAThread = 64 * 1024;  // multiplications

// ---- Packed weights: [block][pair of inputs][4 groups of 4 channels][half][4 channels][2 inputs], bit 7 the sign.

struct Tables {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

constexpr Tables make_tables() {
  Tables tables{};
  for (int value = 1; value < 128; ++value) {
    int exponent = 0;
    while (value >> (exponent + 1)) ++exponent;
    const int bits = (127 + exponent) << 7 | ((value << (7 - exponent)) & 127);
    tables.low[value] = bits & 255;
    tables.high[value] = bits >> 8;
  }
  return tables;
}

constexpr Tables kTables = make_tables();

struct Expander {
  __m512i low0 = _mm512_load_si512(kTables.low), low1 = _mm512_load_si512(kTables.low + 64);
  __m512i high0 = _mm512_load_si512(kTables.high), high1 = _mm512_load_si512(kTables.high + 64);
  __m512i sign = _mm512_set1_epi8(-128);

  // 64 packed weights → pairs of 16 channels of either half.
  void operator()(const uint8_t* packed, __m512i& first, __m512i& second) const {
    const __m512i code = _mm512_loadu_si512(packed);
    const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);  // an index is 7 bits: the sign does not count
    __m512i high = _mm512_permutex2var_epi8(high0, code, high1);
    high = _mm512_ternarylogic_epi64(high, code, sign, 0xF8);  // high | (code & sign)
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }
};

inline __m512 add_product(__m512 sum, __m512i x, __m512i w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }

inline __m512i broadcast_pair(const bf16* x) {
  int pair;
  std::memcpy(&pair, x, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// ---- Rows times a packed weight.

struct Rows {
  const bf16* data;
  int64_t stride;          // elements from a row to the next
  const int32_t* indices;  // which rows, or null for the first `count`
  int64_t count;

  const bf16* operator[](int64_t i) const { return data + stride * (indices ? indices[i] : i); }
};

struct Weight {
  const uint8_t* packed;
  int64_t inputs, outputs;

  int64_t pairs() const { return inputs / 2; }
  int64_t half() const { return (outputs + 1) / 2; }
  int64_t blocks() const { return (half() + kLanes - 1) / kLanes; }
  const uint8_t* block(int64_t b) const { return packed + b * pairs() * kPairBytes; }
  Weight of_expert(int64_t expert) const { return {block(expert * blocks()), inputs, outputs}; }
};

// sums [R][32] of R rows with a block
template <int R>
void tile(const bf16* const* x, const uint8_t* w, int64_t pairs, float* sums) {
  const Expander expand;
  __m512 own[R][2];
  for (int r = 0; r < R; ++r) own[r][0] = own[r][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, w += kPairBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T0);
    __m512i first, second;
    expand(w, first, second);
    for (int r = 0; r < R; ++r) {
      int pair;
      std::memcpy(&pair, x[r] + 2 * p, sizeof pair);
      const __m512i inputs = _mm512_set1_epi32(pair);
      own[r][0] = _mm512_dpbf16_ps(own[r][0], (__m512bh)inputs, (__m512bh)first);
      own[r][1] = _mm512_dpbf16_ps(own[r][1], (__m512bh)inputs, (__m512bh)second);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(sums + r * kBlock + half * kLanes, own[r][half]);
}

using Tile = void (*)(const bf16* const*, const uint8_t*, int64_t, float*);
constexpr Tile kTiles[kRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};

// store(row, block, sums) for all rows (their place among `rows`) and blocks: the sums of channels 16·block onwards of the
// first half, then of the second.
template <typename Store>
void product(const Rows& rows, const Weight& weight, int64_t first, int64_t last, const Store& store) {
  for (int64_t done = 0; done < rows.count; done += kMostRows) {
    const int64_t count = std::min<int64_t>(kMostRows, rows.count - done), tiles = (count + kRows - 1) / kRows;
    for (int64_t block = first; block < last; ++block)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = done + count * t / tiles, end = done + count * (t + 1) / tiles;
        const bf16* x[kRows];
        float sums[kRows * kBlock];
        for (int64_t row = begin; row < end; ++row) x[row - begin] = rows[row];
        kTiles[end - begin - 1](x, weight.block(block), weight.pairs(), sums);
        for (int64_t row = begin; row < end; ++row) store(row, block, sums + (row - begin) * kBlock);
      }
  }
}

// ---- What is done with sums.

inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

inline void store_bf16(bf16* to, __mmask16 lanes, __m512 values) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

// e^x for x ≤ 88, 2^-22 exact; below the smallest normal number it is 0.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.f / 720);
  for (const float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  const __m512 negated = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.f));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), exponential(negated)));
}

// ---- Sharing work out.

// Runs work() on as many of `threads` threads as are worth their start.
template <typename Work>
void parallel(int threads, int64_t multiplications, const Work& work) {
  const auto call = [](void* data) { (*static_cast<const Work*>(data))(); };
  const int64_t worth = std::clamp<int64_t>(multiplications / kWorthAThread, 1, threads);
  GOMP_parallel(call, const_cast<Work*>(&work), static_cast<unsigned>(worth), 0);
}

// This thread's part of `count` things: [first, last).
std::pair<int64_t, int64_t> part_of(int64_t count) {
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  return {count * thread / threads, count * (thread + 1) / threads};
}

struct Group {
  Rows rows;
  Weight weight;
  const float* scale;
};

// Calls work(group, first block, last block) for this thread's part of all blocks: equal parts by cost, and contiguous, so
// that a thread streams through memory.
template <typename Work>
void share(const std::vector<Group>& groups, const Work& work) {
  const auto cost = [](const Group& group) {  // reading a weight takes as long as multiplying it with some rows
    return group.weight.pairs() * (group.rows.count + kRows);
  };
  int64_t total = 0, before = 0;
  for (const Group& group : groups) total += cost(group) * group.weight.blocks();
  const auto [from, to] = part_of(total);
  for (const Group& group : groups) {
    const int64_t each = cost(group), blocks = group.weight.blocks();
    const auto place = [&](int64_t at) { return std::clamp<int64_t>((at - before + each - 1) / each, 0, blocks); };
    const int64_t first = place(from), last = place(to);
    if (first < last) work(group, first, last);
    before += each * blocks;
  }
}

}  // namespace

extern "C" {

int64_t w8a16_blocks(int64_t outputs) { return Weight{nullptr, 0, outputs}.blocks(); }

// weight [outputs, inputs] → packed [blocks, inputs / 2, 64], zero where there is no channel
void w8a16_pack(uint8_t* packed, const int8_t* weight, int64_t outputs, int64_t inputs, int threads) {
  const Weight to{packed, inputs, outputs};
  const std::vector<int8_t> zeros(inputs);
  const __m512i sign = _mm512_set1_epi8(-128);
  parallel(threads, outputs * inputs, [&] {
    const auto [first, last] = part_of(to.blocks());
    for (int64_t block = first; block < last; ++block) {
      const int8_t* rows[kBlock];  // in the order of a block's bytes: two of a row lie together
      for (int place = 0; place < kBlock; ++place) {
        const int half = place / 4 % 2, lane = place / 8 * 4 + place % 4;
        const int64_t channel = half * to.half() + block * kLanes + lane, end = half ? outputs : to.half();
        rows[place] = channel < end ? weight + channel * inputs : zeros.data();
      }
      for (int64_t p = 0; p < to.pairs(); ++p) {
        int16_t pairs[kBlock];
        for (int place = 0; place < kBlock; ++place) std::memcpy(pairs + place, rows[place] + 2 * p, sizeof *pairs);
        const __m512i values = _mm512_loadu_si512(pairs);
        const __m512i code = _mm512_or_si512(_mm512_abs_epi8(values), _mm512_and_si512(values, sign));
        _mm512_storeu_si512(packed + (block * to.pairs() + p) * kPairBytes, code);
      }
    }
  });
}

// y [rows, outputs] = x [rows, inputs] · (scale ⊙ weight)ᵀ + bias
void w8a16_linear(bf16* y, const bf16* x, int64_t stride, const uint8_t* packed, const float* scale, const float* bias,
                  int64_t rows, int64_t outputs, int64_t inputs, int threads) {
  const std::vector<Group> groups{{{x, stride, nullptr, rows}, {packed, inputs, outputs}, scale}};
  const int64_t half = groups[0].weight.half();
  parallel(threads, rows * outputs * inputs, [&] {
    share(groups, [&](const Group& group, int64_t first, int64_t last) {
      product(group.rows, group.weight, first, last, [&](int64_t row, int64_t block, const float* sums) {
        for (int h = 0; h < 2; ++h) {
          const int64_t channel = h * half + block * kLanes;
          const __mmask16 lanes = first_lanes((h ? outputs : half) - channel);
          __m512 value = _mm512_mul_ps(_mm512_loadu_ps(sums + h * kLanes), _mm512_maskz_loadu_ps(lanes, scale + channel));
          if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, bias + channel));
          store_bf16(y + row * outputs + channel, lanes, value);
        }
      });
    });
  });
}

// y [tokens, hidden] = Σ over a token's experts of weight · w2(silu(gate) ⊙ up); inner [tokens, k, intermediate] and,
// unless k is 1, parts [tokens, k, hidden] are scratch.
void w8a16_experts(bf16* y, const bf16* x, int64_t stride, const uint8_t* w13, const uint8_t* w2, const float* scale13,
                   const float* scale2, const float* topk_weights, const int32_t* topk_ids, bf16* inner, float* parts,
                   int64_t tokens, int64_t k, int64_t experts, int64_t hidden, int64_t intermediate, int threads) {
  const int64_t slots = tokens * k, half = (hidden + 1) / 2;
  std::vector<int32_t> ends(experts + 1), slot_of(slots), row_of(slots);
  for (int64_t slot = 0; slot < slots; ++slot) ++ends[topk_ids[slot] + 1];
  for (int64_t e = 0; e < experts; ++e) ends[e + 1] += ends[e];
  const std::vector<int32_t> begins(ends.begin(), ends.end() - 1);
  for (int64_t slot = 0, place; slot < slots; ++slot) {
    place = ends[topk_ids[slot]]++;
    slot_of[place] = slot;
    row_of[place] = slot / k;
  }
  std::vector<Group> first, second;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t begin = begins[e], count = ends[e] - begin;
    if (count == 0) continue;
    first.push_back({{x, stride, row_of.data() + begin, count},
                     Weight{w13, hidden, 2 * intermediate}.of_expert(e),
                     scale13 + e * 2 * intermediate});
    second.push_back({{inner, intermediate, slot_of.data() + begin, count},
                      Weight{w2, intermediate, hidden}.of_expert(e),
                      scale2 + e * hidden});
  }
  const auto gate_up = [&](const Group& group, int64_t begin, int64_t end) {
    const int32_t* slot = slot_of.data() + (group.rows.indices - row_of.data());
    product(group.rows, group.weight, begin, end, [&](int64_t row, int64_t block, const float* sums) {
      const int64_t channel = block * kLanes;
      const __mmask16 lanes = first_lanes(intermediate - channel);
      const float *gate_scale = group.scale + channel, *up_scale = gate_scale + intermediate;
      const __m512 gate = _mm512_mul_ps(_mm512_loadu_ps(sums), _mm512_maskz_loadu_ps(lanes, gate_scale));
      const __m512 up = _mm512_mul_ps(_mm512_loadu_ps(sums + kLanes), _mm512_maskz_loadu_ps(lanes, up_scale));
      store_bf16(inner + slot[row] * intermediate + channel, lanes, _mm512_mul_ps(silu(gate), up));
    });
  };
  const auto down = [&](const Group& group, int64_t begin, int64_t end) {
    product(group.rows, group.weight, begin, end, [&](int64_t row, int64_t block, const float* sums) {
      const int64_t slot = group.rows.indices[row];
      const __m512 weight = _mm512_set1_ps(topk_weights[slot]);
      for (int h = 0; h < 2; ++h) {
        const int64_t channel = h * half + block * kLanes;
        const __mmask16 lanes = first_lanes((h ? hidden : half) - channel);
        const __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, group.scale + channel), weight);
        const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(sums + h * kLanes), scale);
        if (k == 1)
          store_bf16(y + slot * hidden + channel, lanes, value);
        else
          _mm512_mask_storeu_ps(parts + slot * hidden + channel, lanes, value);
      }
    });
  };
  parallel(threads, slots * hidden * intermediate, [&] {
    share(first, gate_up);
    GOMP_barrier();
    share(second, down);
    if (k == 1) return;
    GOMP_barrier();
    const auto [begin, end] = part_of(tokens);
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t channel = 0; channel < hidden; channel += kLanes) {
        const __mmask16 lanes = first_lanes(hidden - channel);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t slot = token * k; slot < (token + 1) * k; ++slot)
          sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, parts + slot * hidden + channel));
        store_bf16(y + token * hidden + channel, lanes, sum);
      }
    }
  });
}

}  // extern "C"
