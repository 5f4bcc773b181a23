// SiLU-gated experts: Σ over a token's experts of weight · w2(silu(gate) ⊙ up).
#pragma once

#include "products.h"

namespace hunyuan {

// Slots (token, n-th of its experts) in the order of their experts.
struct Routes {
  std::vector<int32_t> slots, tokens;  // of each place
  std::vector<int64_t> ends;           // places of expert e: [ends[e], ends[e + 1])

  Routes(const int32_t* topk_ids, int64_t tokens_count, int64_t k, int64_t experts)
      : slots(tokens_count * k), tokens(tokens_count * k), ends(experts + 1) {
    const int64_t count = tokens_count * k;
    for (int64_t slot = 0; slot < count; ++slot) ++ends[topk_ids[slot] + 1];
    for (int64_t e = 0; e < experts; ++e) ends[e + 1] += ends[e];
    std::vector<int64_t> next(ends);
    for (int64_t slot = 0; slot < count; ++slot) {
      const int64_t place = next[topk_ids[slot]]++;
      slots[place] = static_cast<int32_t>(slot);
      tokens[place] = static_cast<int32_t>(slot / k);
    }
  }
};

struct ExpertsShape {
  int64_t tokens, k, experts, hidden, width;
};

// y, x [tokens, hidden]; w13 of [experts, 2 · width, hidden], w2 of [experts, hidden, width], packed
template <class Scheme>
void experts(bf16* y, const bf16* x, int64_t stride, const uint8_t* w13, const uint8_t* w2, const float* scale13,
             const float* scale2, const float* topk_weights, const int32_t* topk_ids, const ExpertsShape& shape) {
  const auto [tokens, k, count, hidden, width] = shape;
  const int64_t slots = tokens * k, half = (hidden + 1) / 2;
  const Routes routes(topk_ids, tokens, k, count);
  const std::unique_ptr<bf16[]> inner(new bf16[slots * width]);
  const std::unique_ptr<float[]> parts(k > 1 ? new float[slots * hidden] : nullptr);
  const Prepared<Scheme> outer_rows(x, stride, tokens, hidden), inner_rows(inner.get(), width, slots, width);
  std::vector<Group<Scheme>> gate_up, down;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t begin = routes.ends[e], rows = routes.ends[e + 1] - begin;
    if (rows == 0) continue;
    gate_up.push_back({outer_rows.rows(routes.tokens.data() + begin, rows),
                       Weight<Scheme>{w13, hidden, 2 * width}.of_expert(e),
                       scale13 + e * 2 * width});
    down.push_back({inner_rows.rows(routes.slots.data() + begin, rows),
                    Weight<Scheme>{w2, width, hidden}.of_expert(e),
                    scale2 + e * hidden});
  }

  const auto store_inner = [&](const Group<Scheme>& group, int64_t first, int64_t last) {
    const int32_t* slot = routes.slots.data() + (group.rows.indices - routes.tokens.data());
    product(group.rows, group.weight, first, last, [&](int64_t row, int64_t block, __m512 gate, __m512 up) {
      const int64_t channel = block * kLanes;
      const __mmask16 lanes = first_lanes(width - channel);
      gate = _mm512_mul_ps(gate, _mm512_maskz_loadu_ps(lanes, group.scale + channel));
      up = _mm512_mul_ps(up, _mm512_maskz_loadu_ps(lanes, group.scale + width + channel));
      store_bf16(&inner[slot[row] * width + channel], lanes, _mm512_mul_ps(silu(gate), up));
    });
  };
  const auto store_part = [&](int64_t slot, int64_t channel, int64_t end, const float* scale, __m512 value) {
    const __mmask16 lanes = first_lanes(end - channel);
    value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, scale + channel));
    value = _mm512_mul_ps(value, _mm512_set1_ps(topk_weights[slot]));
    if (k == 1)
      store_bf16(y + slot * hidden + channel, lanes, value);
    else
      _mm512_mask_storeu_ps(&parts[slot * hidden + channel], lanes, value);
  };
  const auto store_down = [&](const Group<Scheme>& group, int64_t begin, int64_t end) {
    product(group.rows, group.weight, begin, end, [&](int64_t row, int64_t block, __m512 first, __m512 second) {
      const int64_t slot = group.rows.indices[row];
      store_part(slot, block * kLanes, half, group.scale, first);
      store_part(slot, half + block * kLanes, hidden, group.scale, second);
    });
  };
  const auto add_parts = [&](int64_t token) {
    for (int64_t channel = 0; channel < hidden; channel += kLanes) {
      const __mmask16 lanes = first_lanes(hidden - channel);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t slot = token * k; slot < (token + 1) * k; ++slot)
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, &parts[slot * hidden + channel]));
      store_bf16(y + token * hidden + channel, lanes, sum);
    }
  };

  parallel(slots * hidden * width, [&] {
    outer_rows.prepare();
    share(gate_up, store_inner);
    barrier();
    inner_rows.prepare();
    share(down, store_down);
    if (k == 1) return;
    barrier();
    const auto [first, last] = part_of(tokens);
    for (int64_t token = first; token < last; ++token) add_parts(token);
  });
}

}  // namespace hunyuan
