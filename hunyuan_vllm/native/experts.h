// SiLU-gated experts: Σ over a token's experts of weight · w2(silu(gate) ⊙ up), and a shared one, which all tokens pass.
#pragma once

#include "gemm.h"

namespace hunyuan {

// Slots (token, n-th of its experts) in the order of their experts; behind them, one for each token at the shared expert.
struct Routes {
  std::vector<int32_t> slots, tokens;  // of each place
  std::vector<int64_t> ends;           // places of expert e: [ends[e], ends[e + 1])

  Routes(const int32_t* topk_ids, int64_t tokens_count, int64_t k, int64_t experts, bool shared)
      : slots(tokens_count * (k + shared)), tokens(slots.size()), ends(experts + 1) {
    const int64_t count = tokens_count * k;
    for (int64_t slot = 0; slot < count; ++slot) ++ends[topk_ids[slot] + 1];
    for (int64_t e = 0; e < experts; ++e) ends[e + 1] += ends[e];
    std::vector<int64_t> next(ends);
    for (int64_t slot = 0; slot < count; ++slot) {
      const int64_t place = next[topk_ids[slot]]++;
      slots[place] = static_cast<int32_t>(slot);
      tokens[place] = static_cast<int32_t>(slot / k);
    }
    for (size_t place = count; place < slots.size(); ++place) {
      slots[place] = static_cast<int32_t>(place);
      tokens[place] = static_cast<int32_t>(place - count);
    }
    if (shared) ends.push_back(static_cast<int64_t>(slots.size()));
  }
};

struct ExpertsShape {
  int64_t tokens, k, experts, hidden, width;
};

// Of [experts, 2 · width, hidden] and [experts, hidden, width], packed, and their scales, null where there are none.
struct ExpertsWeights {
  const uint8_t *w13, *w2;
  const float *scale13, *scale2;
};

// y, x [tokens, hidden]; `shared` may be null
template <class Scheme>
void experts(bf16* y, const bf16* x, int64_t stride, const ExpertsWeights& routed, const ExpertsWeights* shared,
             const float* topk_weights, const int32_t* topk_ids, const ExpertsShape& shape) {
  const auto [tokens, k, count, hidden, width] = shape;
  const int64_t of_routed = tokens * k, slots = of_routed + (shared ? tokens : 0), half = (hidden + 1) / 2;
  const bool one_part = slots == tokens;
  const Routes routes(topk_ids, tokens, k, count, shared != nullptr);
  const std::unique_ptr<bf16[]> inner(new bf16[slots * width]);
  const std::unique_ptr<float[]> parts(one_part ? nullptr : new float[slots * hidden]);
  const Prepared<Scheme> outer_rows(x, stride, tokens, hidden), inner_rows(inner.get(), width, slots, width);
  std::vector<Group<Scheme>> gate_up, down;
  const auto add_expert = [&](const ExpertsWeights& weights, int64_t e, int64_t begin, int64_t end) {
    if (begin == end) return;
    gate_up.push_back({outer_rows.rows(routes.tokens.data() + begin, end - begin),
                       Weight<Scheme>{weights.w13, hidden, 2 * width}.of_expert(e),
                       weights.scale13 ? weights.scale13 + e * 2 * width : nullptr});
    down.push_back({inner_rows.rows(routes.slots.data() + begin, end - begin),
                    Weight<Scheme>{weights.w2, width, hidden}.of_expert(e),
                    weights.scale2 ? weights.scale2 + e * hidden : nullptr});
  };
  for (int64_t e = 0; e < count; ++e) add_expert(routed, e, routes.ends[e], routes.ends[e + 1]);
  if (shared) add_expert(*shared, 0, of_routed, slots);

  const auto store_inner = [&](const Group<Scheme>& group, int64_t first, int64_t last) {
    const int32_t* slot = routes.slots.data() + (group.rows.indices - routes.tokens.data());
    product(group.rows, group.weight, first, last, [&](int64_t row, int64_t block, Floats gate, Floats up) {
      const int64_t channel = block * kLanes;
      const Lanes lanes = first_lanes(width - channel);
      gate = scaled(gate, group.scale, channel, lanes);
      up = scaled(up, group.scale, width + channel, lanes);
      store_bf16(&inner[slot[row] * width + channel], lanes, multiply(silu(gate), up));
    });
  };
  const auto store_part = [&](int64_t slot, int64_t channel, int64_t end, const float* scale, Floats value) {
    const Lanes lanes = first_lanes(end - channel);
    value = scaled(value, scale, channel, lanes);
    if (slot < of_routed) value = multiply(value, all(topk_weights[slot]));
    if (one_part)
      store_bf16(y + slot * hidden + channel, lanes, value);
    else
      ::hunyuan::store(&parts[slot * hidden + channel], lanes, value);
  };
  const auto store_down = [&](const Group<Scheme>& group, int64_t begin, int64_t end) {
    product(group.rows, group.weight, begin, end, [&](int64_t row, int64_t block, Floats first, Floats second) {
      const int64_t slot = group.rows.indices[row];
      store_part(slot, block * kLanes, half, group.scale, first);
      store_part(slot, half + block * kLanes, hidden, group.scale, second);
    });
  };
  const auto add_parts = [&](int64_t token) {
    for (int64_t channel = 0; channel < hidden; channel += kLanes) {
      const Lanes lanes = first_lanes(hidden - channel);
      const auto part = [&](int64_t slot) { return load(&parts[slot * hidden + channel], lanes); };
      Floats sum = shared ? part(of_routed + token) : zeros();
      for (int64_t slot = token * k; slot < (token + 1) * k; ++slot) sum = add(sum, part(slot));
      store_bf16(y + token * hidden + channel, lanes, sum);
    }
  };

  parallel(slots * hidden * width, [&] {
    outer_rows.prepare();
    share(gate_up, store_inner);
    barrier();
    inner_rows.prepare();
    share(down, store_down);
    if (one_part) return;
    barrier();
    const auto [first, last] = part_of(tokens);
    for (int64_t token = first; token < last; ++token) add_parts(token);
  });
}

}  // namespace hunyuan
