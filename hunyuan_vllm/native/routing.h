// A router: float32 logits; softmax over all experts, and the k most probable of them.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace hunyuan {

// x [tokens, hidden] (bfloat16) · gate [experts, hidden]ᵀ (float32) → logits [tokens, experts]
inline void router_logits(float* logits, const bf16* x, int64_t stride, const float* gate, int64_t tokens,
                          int64_t experts, int64_t hidden) {
  parallel(tokens * experts * hidden, [&] {
    std::vector<float> row(hidden + kLanes);
    const auto [first, last] = part_of(tokens);
    for (int64_t token = first; token < last; ++token) {
      for (int64_t i = 0; i < hidden; i += kLanes)
        store(&row[i], load_bf16(x + token * stride + i, first_lanes(hidden - i)));
      for (int64_t e = 0; e < experts; ++e) {
        const float* weights = gate + e * hidden;
        Floats even = zeros(), odd = even;  // two, since an addition takes longer than its place in line
        int64_t i = 0;
        for (; i + 2 * kLanes <= hidden; i += 2 * kLanes) {
          even = multiply_add(load(&row[i]), load(weights + i), even);
          odd = multiply_add(load(&row[i + kLanes]), load(weights + i + kLanes), odd);
        }
        for (; i < hidden; i += kLanes) {
          const Lanes lanes = first_lanes(hidden - i);
          even = multiply_add(load(&row[i]), load(weights + i, lanes), even);
        }
        logits[token * experts + e] = sum(add(even, odd));
      }
    }
  });
}

// logits [tokens, experts] → weights and ids [tokens, k], the most probable first: the softmax's values, or with
// `renormalize` what makes them sum to one.
inline void choose_experts(float* weights, int32_t* ids, const float* logits, int64_t tokens, int64_t k,
                           int64_t experts, bool renormalize) {
  std::vector<float> left(experts), powers(experts);
  for (int64_t token = 0; token < tokens; ++token, weights += k, ids += k, logits += experts) {
    left.assign(logits, logits + experts);
    const Floats greatest = all(*std::max_element(left.begin(), left.end()));
    float total = 0, chosen = 0;
    for (int64_t e = 0; e < experts; e += kLanes) {
      const Lanes lanes = first_lanes(experts - e);
      const Floats power = exponential(subtract(load(logits + e, lanes), greatest));
      store(&powers[e], lanes, power);
      total += sum(load(&powers[e], lanes));
    }
    for (int64_t n = 0; n < k; ++n) {
      const int64_t best = std::max_element(left.begin(), left.end()) - left.begin();
      left[best] = -std::numeric_limits<float>::infinity();
      ids[n] = static_cast<int32_t>(best);
      chosen += weights[n] = powers[best];
    }
    for (int64_t n = 0; n < k; ++n) weights[n] /= renormalize ? chosen : total;
  }
}

}  // namespace hunyuan
