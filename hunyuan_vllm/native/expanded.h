// int8 weights for many rows: expanded, some blocks at a time, for torch's own matrix product. That pays with AMX, whose
// tiles our product does not use; with AVX2 it computes the same, and does not pay (cpu_kernels.py).
#pragma once

#include <initializer_list>
#include <type_traits>

#include "experts.h"
#include "tensors.h"
#ifdef __AVX512F__
#include "bf16_rows.h"
#else
#include "avx2.h"
#endif

namespace hunyuan {

constexpr int64_t kExpandedBytes = 2 << 20;  // a thread's, so that they stay in a cache

#ifdef __AVX512F__
using Wide = bf16;
inline int32_t wide_type() { return aoti_torch_dtype_bfloat16(); }
inline Floats load_wide(const Wide* from, Lanes lanes) { return load_bf16(from, lanes); }
inline void store_wide(Wide* to, Lanes lanes, Floats values) { store_bf16(to, lanes, values); }

// A piece of a block: two inputs of 16 channels of either half.
inline void expand(const uint8_t* piece, Wide* first, Wide* second, int64_t columns) {
  const W8A16::Reader read;
  __m512i pairs[2];
  read(piece, pairs[0], pairs[1]);
  for (Wide* to : {first, second}) {
    const __m512i both = to == first ? pairs[0] : pairs[1];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + columns), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
  }
}
#else
using Wide = float;
inline int32_t wide_type() { return aoti_torch_dtype_float32(); }
inline Floats load_wide(const Wide* from, Lanes lanes) { return load(from, lanes); }
inline void store_wide(Wide* to, Lanes lanes, Floats values) {  // rounded as activations are
  alignas(32) bf16 rounded[kLanes];
  store_bf16(rounded, kLanes, values);
  store(to, lanes, load_bf16(rounded, kLanes));
}

// A piece of a block: one input of 16 channels of either half.
inline void expand(const uint8_t* piece, Wide* first, Wide* second, int64_t) {
  for (int half = 0; half < 2; ++half) {
    Wide* to = half ? second : first;
    const uint8_t* from = piece + half * kLanes;
    store(to, Floats{W8A16::floats(from), W8A16::floats(from + 8)});
  }
}
#endif

inline Tensor empty_wide(int64_t rows, int64_t columns) { return empty(rows, columns, wide_type()); }

// [count, width]: the rows of x that `indices` names, or the first ones where it is null.
inline Tensor wide_rows(const bf16* x, int64_t stride, const int32_t* indices, int64_t count, int64_t width) {
  Tensor rows = empty_wide(count, width);
  Wide* to = write<Wide>(rows);
  parallel(count * width, [&] {
    const auto [begin, end] = part_of(count);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < width; i += kLanes) {
        const Lanes lanes = first_lanes(width - i);
        store_wide(to + row * width + i, lanes, load_bf16(x + stride * (indices ? indices[row] : row) + i, lanes));
      }
  });
  return rows;
}

// store(row, block, first, second) for all rows and blocks, as `product` does; no row is stored by two threads at a time.
template <typename Store>
void expanded_product(const Tensor& x, const Weight<W8A16>& weight, const Store& store) {
  const int64_t rows = x.size(0), inputs = weight.inputs, blocks = weight.blocks();
  const int64_t most = kExpandedBytes * omp_get_max_threads() / (kBlock * inputs * static_cast<int64_t>(sizeof(Wide)));
  const int64_t parts = (blocks + std::max<int64_t>(most, 1) - 1) / std::max<int64_t>(most, 1);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = blocks * part / parts, count = blocks * (part + 1) / parts - first;
    const int64_t half = count * kLanes, columns = 2 * half;
    Tensor expanded = empty_wide(inputs, columns);
    Wide* to = write<Wide>(expanded);
    parallel(inputs * columns, [&] {
      const auto [begin, end] = part_of(count);
      for (int64_t b = begin; b < end; ++b) {
        const uint8_t* from = weight.block(first + b) + W8A16::kHeadBytes;
        for (int64_t p = 0; p < weight.pieces(); ++p) {
          Wide* at = to + p * W8A16::kInputs * columns + b * kLanes;
          expand(from + p * W8A16::kBytes, at, at + half, columns);
        }
      }
    });
    const Tensor product = torch::stable::matmul(x, expanded);
    const Wide* sums = read<Wide>(product);
    const Lanes whole = first_lanes(kLanes);  // with AVX-512 a mask
    parallel(rows * columns, [&] {
      const auto [begin, end] = part_of(rows);
      for (int64_t row = begin; row < end; ++row)
        for (int64_t b = 0; b < count; ++b) {
          const Wide* at = sums + row * columns + b * kLanes;
          store(row, first + b, load_wide(at, whole), load_wide(at + half, whole));
        }
    });
  }
}

// As `linear` and `experts`, of W8A16, where `expands` says so.
inline void expanded_linear(bf16* y, const bf16* x, int64_t stride, const uint8_t* packed, const float* scale,
                            const float* bias, int64_t rows, int64_t outputs, int64_t inputs) {
  const Weight<W8A16> weight{packed, inputs, outputs};
  const LinearResult result{y, scale, bias, outputs, weight.half()};
  expanded_product(wide_rows(x, stride, nullptr, rows, inputs), weight, result);
}

inline void expanded_experts(bf16* y, const bf16* x, int64_t stride, const ExpertsWeights& routed,
                             const ExpertsWeights* shared, const float* topk_weights, const int32_t* topk_ids,
                             const ExpertsShape& shape) {
  const auto [tokens, k, count, hidden, width] = shape;
  const int64_t of_routed = tokens * k, half = (hidden + 1) / 2;
  const Routes routes(topk_ids, tokens, k, count, shared != nullptr);
  const std::unique_ptr<float[]> sums(new float[tokens * hidden]());
  const auto add_expert = [&](const ExpertsWeights& weights, int64_t e, int64_t begin, int64_t end) {
    if (begin == end) return;
    const int32_t *rows = routes.tokens.data() + begin, *slots = routes.slots.data() + begin;
    const float *scale13 = weights.scale13 + e * 2 * width, *scale2 = weights.scale2 + e * hidden;
    Tensor inner = empty_wide(end - begin, width);
    Wide* to = write<Wide>(inner);
    const Weight<W8A16> w13{weights.w13, hidden, 2 * width}, w2{weights.w2, width, hidden};
    expanded_product(wide_rows(x, stride, rows, end - begin, hidden), w13.of_expert(e),
                     [&](int64_t row, int64_t block, Floats gate, Floats up) {
      const int64_t channel = block * kLanes;
      const Lanes lanes = first_lanes(width - channel);
      gate = scaled(gate, scale13, channel, lanes);
      up = scaled(up, scale13, width + channel, lanes);
      store_wide(to + row * width + channel, lanes, multiply(silu(gate), up));
    });
    const auto add_part = [&](int64_t row, int64_t channel, int64_t last, Floats value) {
      const Lanes lanes = first_lanes(last - channel);
      float* sum = &sums[rows[row] * hidden + channel];
      const float gate = slots[row] < of_routed ? topk_weights[slots[row]] : 1;
      store(sum, lanes, multiply_add(scaled(value, scale2, channel, lanes), all(gate), load(sum, lanes)));
    };
    expanded_product(inner, w2.of_expert(e), [&](int64_t row, int64_t block, Floats first, Floats second) {
      add_part(row, block * kLanes, half, first);
      add_part(row, half + block * kLanes, hidden, second);
    });
  };
  for (int64_t e = 0; e < count; ++e) add_expert(routed, e, routes.ends[e], routes.ends[e + 1]);
  if (shared) add_expert(*shared, 0, of_routed, of_routed + tokens);
  parallel(tokens * hidden, [&] {
    const auto [first, last] = part_of(tokens * hidden);
    for (int64_t i = first; i < last; i += kLanes) {
      const Lanes lanes = first_lanes(last - i);
      store_bf16(y + i, lanes, load(&sums[i], lanes));
    }
  });
}

// Whether a scheme expands weights for so many rows (0: never) that have so many inputs.
template <class Scheme>
bool expands(int64_t rows, int64_t expand_from, std::initializer_list<int64_t> inputs) {
  if (!std::is_same_v<Scheme, W8A16> || expand_from <= 0 || rows < expand_from) return false;
  return std::all_of(inputs.begin(), inputs.end(), [](int64_t count) { return count % Scheme::kInputs == 0; });
}

}  // namespace hunyuan
