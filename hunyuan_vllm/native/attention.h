// Attention of one query of each sequence to a bfloat16 cache, in the layout of vLLM's vector kernel: each block has,
// for each key head, keys [size, block] and then values [block, size]; both are multiples of 32.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace hunyuan {

constexpr int64_t kUnit = 32;    // tokens that one thread attends to at least
constexpr int kHeadsAtOnce = 2;  // of the query heads that share a key head
#ifdef __AVX512F__
constexpr int kSums = 16;  // registers of sums
#else
constexpr int kSums = 4;  // of two registers each
#endif

struct AttentionShape {
  int64_t sequences, heads, key_heads, size, block;
  int64_t query_stride, output_stride;  // from sequence to sequence, as is table_stride
  int64_t block_stride, head_stride, table_stride;
};

// sums[h, i] (+)= Σ_n left[h, n] · right[n, i], for `Heads` h and `Vectors` · 16 i; rows of `right` are `right_stride` apart
template <int Heads, int Vectors, bool Adds>
inline void multiply_cached(float* sums, int64_t sums_stride, const float* left, int64_t left_stride, const bf16* right,
                            int64_t right_stride, int64_t count) {
  Floats all_sums[Heads][Vectors];
#pragma GCC unroll 16
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v)
      all_sums[h][v] = Adds ? load(sums + h * sums_stride + v * kLanes) : zeros();
  for (int64_t n = 0; n < count; ++n) {
    Floats row[Vectors];
    for (int v = 0; v < Vectors; v += 2)
      _mm_prefetch(reinterpret_cast<const char*>(right + (n + 12) * right_stride + v * kLanes), _MM_HINT_T0);
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) row[v] = load_bf16(right + n * right_stride + v * kLanes, first_lanes(kLanes));
#pragma GCC unroll 16
    for (int h = 0; h < Heads; ++h) {
      const Floats factor = all(left[h * left_stride + n]);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) all_sums[h][v] = multiply_add(factor, row[v], all_sums[h][v]);
    }
  }
#pragma GCC unroll 16
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) store(sums + h * sums_stride + v * kLanes, all_sums[h][v]);
}

// The same for `columns`, a multiple of 32, and `heads` up to kHeadsAtOnce.
template <bool Adds, int Heads = kHeadsAtOnce>
inline void multiply_cached(int64_t heads, float* sums, int64_t sums_stride, const float* left, int64_t left_stride,
                            const bf16* right, int64_t right_stride, int64_t count, int64_t columns) {
  if constexpr (Heads > 1)
    if (heads < Heads)
      return multiply_cached<Adds, Heads - 1>(heads, sums, sums_stride, left, left_stride, right, right_stride, count,
                                              columns);
  constexpr int kVectors = std::min(8, kSums / Heads / 2 * 2), kWide = kVectors * kLanes;
  int64_t i = 0;
  if constexpr (kVectors > 2)
    for (; i + kWide <= columns; i += kWide)
      multiply_cached<Heads, kVectors, Adds>(sums + i, sums_stride, left, left_stride, right + i, right_stride, count);
  for (; i < columns; i += kLanes)
    multiply_cached<Heads, 1, Adds>(sums + i, sums_stride, left, left_stride, right + i, right_stride, count);
}

// The sums of a softmax over a part of a sequence, for the query heads of one key head.
struct PartialAttention {
  int64_t heads, size;
  float *values, *greatest, *total;  // [heads, size], [heads], [heads]

  static int64_t floats(int64_t heads, int64_t size) { return heads * (size + 2); }
  PartialAttention(float* memory, int64_t heads, int64_t size)
      : heads(heads), size(size), values(memory), greatest(memory + heads * size), total(greatest + heads) {}

  void clear() {
    std::fill(values, greatest, 0.f);
    std::fill(greatest, total, -std::numeric_limits<float>::infinity());
    std::fill(total, total + heads, 0.f);
  }

  void scale(int64_t head, float by) {
    if (by == 1) return;
    total[head] *= by;
    for (int64_t i = 0; i < size; i += kLanes)
      store(values + head * size + i, multiply(load(values + head * size + i), all(by)));
  }

  // scores [heads, stride] of `count` more tokens; exp(score - greatest) replaces them
  void add_scores(float* scores, int64_t stride, int64_t count) {
    for (int64_t h = 0; h < heads; ++h, scores += stride) {
      std::fill(scores + count, scores + (count + kLanes - 1) / kLanes * kLanes,
                -std::numeric_limits<float>::infinity());
      Floats most = all(greatest[h]);
      for (int64_t i = 0; i < count; i += kLanes) most = maximum(most, load(scores + i));
      const float now = largest(most);
      scale(h, std::exp(greatest[h] - now));
      greatest[h] = now;
      Floats sums = zeros();
      for (int64_t i = 0; i < count; i += kLanes) {
        const Floats power = exponential(subtract(load(scores + i), all(now)));
        store(scores + i, power);
        sums = add(sums, power);
      }
      total[h] += sum(sums);
    }
  }

  void add_part(const PartialAttention& other) {
    for (int64_t h = 0; h < heads; ++h) {
      const float now = std::max(greatest[h], other.greatest[h]), by = std::exp(other.greatest[h] - now);
      scale(h, std::exp(greatest[h] - now));
      greatest[h] = now;
      total[h] += other.total[h] * by;
      for (int64_t i = h * size; i < (h + 1) * size; i += kLanes)
        store(values + i, multiply_add(load(other.values + i), all(by), load(values + i)));
    }
  }

  void write(bf16* output) const {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = h * size; i < (h + 1) * size; i += kLanes)
        store_bf16(output + i, first_lanes(kLanes), multiply(load(values + i), all(1 / total[h])));
  }
};

// queries, output [sequences, heads, size], with query_stride and output_stride from sequence to sequence
inline void decode_attention(bf16* output, const bf16* queries, const bf16* cache, const int32_t* table,
                             const int32_t* lengths, float scale, const AttentionShape& shape) {
  const int64_t group = shape.heads / shape.key_heads, size = shape.size;
  const int64_t partial_floats = PartialAttention::floats(group, size);
  // Units are numbered by sequence, then by key head, then by place.
  std::vector<int64_t> starts(shape.sequences + 1);
  for (int64_t s = 0; s < shape.sequences; ++s)
    starts[s + 1] = starts[s] + (lengths[s] + kUnit - 1) / kUnit * shape.key_heads;
  const int64_t units = starts.back();
  std::vector<float> partials(2 * omp_get_max_threads() * partial_floats);

  parallel(2 * units * kUnit * size * group, [&] {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    // Of a key head whose units several threads share: [1] for the thread with the first unit, [0] for the others.
    const auto partial = [&](int64_t thread, int which) {
      return PartialAttention(partials.data() + (2 * thread + which) * partial_floats, group, size);
    };
    std::vector<float> query(group * size), scores(group * shape.block), memory(partial_floats);
    const auto [first, last] = part_of(units);

    // Attends to tokens [from, to) of a sequence.
    const auto attend = [&](PartialAttention sums, int64_t sequence, int64_t key_head, int64_t from, int64_t to) {
      const bf16* rows = queries + sequence * shape.query_stride + key_head * group * size;
      for (int64_t i = 0; i < group * size; i += kLanes)
        store(&query[i], multiply(load_bf16(rows + i, first_lanes(kLanes)), all(scale)));
      sums.clear();
      while (from < to) {
        const int64_t offset = from % shape.block, count = std::min(shape.block - offset, to - from);
        const int64_t columns = (count + kUnit - 1) / kUnit * kUnit;
        const int64_t block = table[sequence * shape.table_stride + from / shape.block];
        const bf16* keys = cache + block * shape.block_stride + key_head * shape.head_stride;
        const bf16* values = keys + shape.block * size + offset * size;
        for (int64_t h = 0; h < group; h += kHeadsAtOnce)
          multiply_cached<false>(std::min<int64_t>(kHeadsAtOnce, group - h), &scores[h * shape.block], shape.block,
                                 &query[h * size], size, keys + offset, shape.block, size, columns);
        sums.add_scores(scores.data(), shape.block, count);
        for (int64_t h = 0; h < group; h += kHeadsAtOnce)
          multiply_cached<true>(std::min<int64_t>(kHeadsAtOnce, group - h), sums.values + h * size, size,
                                &scores[h * shape.block], shape.block, values, size, count, size);
        from += count;
      }
    };

    const auto each_part = [&](const auto& work) {
      int64_t sequence = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
      for (int64_t unit = first; unit < last;) {
        while (unit >= starts[sequence + 1]) ++sequence;
        const int64_t each = (starts[sequence + 1] - starts[sequence]) / shape.key_heads;
        const int64_t key_head = (unit - starts[sequence]) / each, begin = starts[sequence] + key_head * each;
        const int64_t end = std::min(begin + each, last);
        work(sequence, key_head, begin, begin + each, unit, end);
        unit = end;
      }
    };

    const auto place = [&](int64_t sequence, int64_t key_head) {
      return output + sequence * shape.output_stride + key_head * group * size;
    };
    each_part([&](int64_t sequence, int64_t key_head, int64_t begin, int64_t end, int64_t from, int64_t to) {
      const bool whole = from == begin && to == end;
      const PartialAttention sums =
          whole ? PartialAttention(memory.data(), group, size) : partial(thread, from == begin);
      attend(sums, sequence, key_head, (from - begin) * kUnit,
             std::min<int64_t>((to - begin) * kUnit, lengths[sequence]));
      if (whole) sums.write(place(sequence, key_head));
    });
    barrier();
    each_part([&](int64_t sequence, int64_t key_head, int64_t begin, int64_t end, int64_t from, int64_t to) {
      if (from != begin || to == end) return;
      PartialAttention sums = partial(thread, 1);
      for (int64_t other = thread + 1; other < threads && units * other / threads < end; ++other)
        sums.add_part(partial(other, 0));
      sums.write(place(sequence, key_head));
    });
  });
}

}  // namespace hunyuan
