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
        _mm512_storeu_ps(&row[i], load_bf16(x + token * stride + i, first_lanes(hidden - i)));
      for (int64_t e = 0; e < experts; ++e) {
        const float* weights = gate + e * hidden;
        __m512 even = _mm512_setzero_ps(), odd = even;  // two, since an addition takes longer than its place in line
        int64_t i = 0;
        for (; i + 2 * kLanes <= hidden; i += 2 * kLanes) {
          even = _mm512_fmadd_ps(_mm512_loadu_ps(&row[i]), _mm512_loadu_ps(weights + i), even);
          odd = _mm512_fmadd_ps(_mm512_loadu_ps(&row[i + kLanes]), _mm512_loadu_ps(weights + i + kLanes), odd);
        }
        for (; i < hidden; i += kLanes) {
          const __mmask16 lanes = first_lanes(hidden - i);
          even = _mm512_fmadd_ps(_mm512_loadu_ps(&row[i]), _mm512_maskz_loadu_ps(lanes, weights + i), even);
        }
        logits[token * experts + e] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
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
    const __m512 largest = _mm512_set1_ps(*std::max_element(left.begin(), left.end()));
    float all = 0, chosen = 0;
    for (int64_t e = 0; e < experts; e += kLanes) {
      const __mmask16 lanes = first_lanes(experts - e);
      const __m512 power = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, logits + e), largest));
      all += _mm512_mask_reduce_add_ps(lanes, power);
      _mm512_mask_storeu_ps(&powers[e], lanes, power);
    }
    for (int64_t n = 0; n < k; ++n) {
      const int64_t best = std::max_element(left.begin(), left.end()) - left.begin();
      left[best] = -std::numeric_limits<float>::infinity();
      ids[n] = static_cast<int32_t>(best);
      chosen += weights[n] = powers[best];
    }
    for (int64_t n = 0; n < k; ++n) weights[n] /= renormalize ? chosen : all;
  }
}

}  // namespace hunyuan
