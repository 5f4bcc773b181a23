// Rotary embedding, rotate-half, of queries and keys, and the norm of each head behind it.
#pragma once

#include <cmath>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace hunyuan {

// to, from [size]: rotated by the position whose cosines and sines (size / 2 of each) are given, divided by its
// root mean square, times `weight`, which may be null.
inline void rotate_and_normalize(bf16* to, const bf16* from, const bf16* cos_sin, const bf16* weight, int64_t size,
                                 float eps, float* scratch) {
  const int64_t half = size / 2;
  Floats squares = zeros();
  for (int64_t i = 0; i < half; i += kLanes) {
    const Lanes lanes = first_lanes(half - i);
    const Floats cosine = load_bf16(cos_sin + i, lanes), sine = load_bf16(cos_sin + half + i, lanes);
    const Floats first = load_bf16(from + i, lanes), second = load_bf16(from + half + i, lanes);
    const Floats one = subtract(multiply(first, cosine), multiply(second, sine));
    const Floats other = multiply_add(second, cosine, multiply(first, sine));
    squares = multiply_add(one, one, multiply_add(other, other, squares));
    store(scratch + i, lanes, one);
    store(scratch + half + i, lanes, other);
  }
  const Floats scale = all(1 / std::sqrt(sum(squares) / static_cast<float>(size) + eps));
  for (int64_t i = 0; i < size; i += kLanes) {
    const Lanes lanes = first_lanes(size - i);
    Floats values = multiply(load(scratch + i, lanes), scale);
    if (weight) values = multiply(values, load_bf16(weight + i, lanes));
    store_bf16(to + i, lanes, values);
  }
}

// rows [tokens, heads + key heads + …] of heads → queries, keys; keys have no weight
inline void rotate_and_normalize(bf16* queries, bf16* keys, const bf16* rows, int64_t stride, const int64_t* positions,
                                 const bf16* cos_sin, const bf16* weight, int64_t tokens, int64_t heads,
                                 int64_t key_heads, int64_t size, float eps) {
  const int64_t both = heads + key_heads;
  parallel(tokens * both * size * 8, [&] {
    std::vector<float> scratch(size);
    const auto [first, last] = part_of(tokens * both);
    for (int64_t n = first; n < last; ++n) {
      const int64_t token = n / both, head = n % both;
      const bool is_key = head >= heads;
      bf16* to = is_key ? keys + (token * key_heads + head - heads) * size : queries + (token * heads + head) * size;
      rotate_and_normalize(to, rows + token * stride + head * size, cos_sin + positions[token] * size,
                           is_key ? nullptr : weight, size, eps, scratch.data());
    }
  });
}

}  // namespace hunyuan
