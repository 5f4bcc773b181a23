// The kernels as operators of torch, by its stable C++ interface: no Python between torch and them.

#include <optional>
#include <tuple>

#include "attention.h"
#include "expanded.h"
#include "rotary.h"
#include "routing.h"
#include "tensors.h"
#ifdef __AVX512F__
#include "w8a8.h"
#endif

namespace hunyuan {

using torch::headeronly::ScalarType;

// Any stride from row to row will do.
Tensor with_dense_rows(const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); }

// [experts, out, in] → uint8 [experts, blocks, bytes]
template <class Scheme>
Tensor pack_experts(Tensor weight) {
  const int64_t experts = weight.size(0), outputs = weight.size(1), inputs = weight.size(2);
  const Weight<Scheme> one{nullptr, inputs, outputs};
  weight = torch::stable::contiguous(weight);
  Tensor packed = torch::stable::new_empty(weight, {experts, one.blocks(), one.block_bytes()}, ScalarType::Byte);
  for (int64_t e = 0; e < experts; ++e) {
    uint8_t* to = write<uint8_t>(packed) + e * one.blocks() * one.block_bytes();
    pack<Scheme>(to, read<typename Scheme::Value>(weight) + e * outputs * inputs, outputs, inputs);
  }
  return packed;
}

template <class Scheme>
Tensor multiply_rows(Tensor x, const Tensor& packed, const float* scale, const std::optional<Tensor>& bias,
                     int64_t outputs, int64_t expand_from = 0) {
  const int64_t rows = x.size(0), inputs = x.size(1);
  x = with_dense_rows(x);
  Tensor y = empty(rows, outputs, aoti_torch_dtype_bfloat16());
  const auto multiply = expands<Scheme>(rows, expand_from, {inputs}) ? &expanded_linear : &linear<Scheme>;
  multiply(write<bf16>(y), read<bf16>(x), x.stride(0), read<uint8_t>(packed), scale,
           bias ? read<float>(*bias) : nullptr, rows, outputs, inputs);
  return y;
}

// From `expand_from` rows the weight is expanded first; 0 is never, as always with W8A8.
template <class Scheme>
Tensor linear_operator(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> bias, int64_t expand_from) {
  return multiply_rows<Scheme>(x, packed, read<float>(scale), bias, scale.numel(), expand_from);
}

// The experts of `routed`, and the shared one's, where there is one.
template <class Scheme>
Tensor add_experts(Tensor x, const ExpertsWeights& routed, const std::optional<ExpertsWeights>& shared,
                   const Tensor& topk_weights, const Tensor& topk_ids, int64_t count, int64_t width,
                   int64_t expand_from = 0) {
  const ExpertsShape shape{x.size(0), topk_ids.size(1), count, x.size(1), width};
  x = with_dense_rows(x);
  Tensor y = empty(shape.tokens, shape.hidden, aoti_torch_dtype_bfloat16());
  const int64_t rows_each = shape.tokens * shape.k / count;  // of an expert, on average
  const bool expand = expands<Scheme>(rows_each, expand_from, {shape.hidden, shape.width});
  (expand ? &expanded_experts : &experts<Scheme>)(
      write<bf16>(y), read<bf16>(x), x.stride(0), routed, shared ? &*shared : nullptr, read<float>(topk_weights),
      read<int32_t>(topk_ids), shape);
  return y;
}

// The four of the shared expert are given, or none of them.
template <class Scheme>
Tensor experts_operator(Tensor x, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale, Tensor topk_weights,
                        Tensor topk_ids, std::optional<Tensor> shared_w13, std::optional<Tensor> shared_w2,
                        std::optional<Tensor> shared_w13_scale, std::optional<Tensor> shared_w2_scale,
                        int64_t expand_from) {
  const auto weights_of = [](const Tensor& w13, const Tensor& w2, const Tensor& scale13, const Tensor& scale2) {
    return ExpertsWeights{read<uint8_t>(w13), read<uint8_t>(w2), read<float>(scale13), read<float>(scale2)};
  };
  std::optional<ExpertsWeights> shared;
  if (shared_w13) shared = weights_of(*shared_w13, *shared_w2, *shared_w13_scale, *shared_w2_scale);
  return add_experts<Scheme>(x, weights_of(w13, w2, w13_scale, w2_scale), shared, topk_weights, topk_ids,
                             w2_scale.size(0), w13_scale.size(1) / 2, expand_from);
}

Tensor bf16_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, int64_t outputs) {
  return multiply_rows<BF16>(x, packed, nullptr, bias, outputs);
}

// w2(silu(gate) ⊙ up): a shared expert alone.
Tensor bf16_mlp(Tensor x, Tensor w13, Tensor w2, int64_t width) {
  const ExpertsShape shape{x.size(0), 0, 0, x.size(1), width};
  const ExpertsWeights weights{read<uint8_t>(w13), read<uint8_t>(w2), nullptr, nullptr};
  x = with_dense_rows(x);
  Tensor y = empty(shape.tokens, shape.hidden, aoti_torch_dtype_bfloat16());
  experts<BF16>(write<bf16>(y), read<bf16>(x), x.stride(0), {}, &weights, nullptr, nullptr, shape);
  return y;
}

// The shared expert is as wide as the others.
Tensor bf16_experts(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, int64_t width,
                    std::optional<Tensor> shared_w13, std::optional<Tensor> shared_w2) {
  const auto weights_of = [](const Tensor& w13, const Tensor& w2) {
    return ExpertsWeights{read<uint8_t>(w13), read<uint8_t>(w2), nullptr, nullptr};
  };
  std::optional<ExpertsWeights> shared;
  if (shared_w13) shared = weights_of(*shared_w13, *shared_w2);
  return add_experts<BF16>(x, weights_of(w13, w2), shared, topk_weights, topk_ids, w13.size(0), width);
}

// Queries [tokens, heads · size] and keys [tokens, key_heads · size] of rows that hold them one behind the other.
std::tuple<Tensor, Tensor> rotate_and_normalize_operator(Tensor rows, Tensor positions, Tensor cos_sin, Tensor weight,
                                                         int64_t heads, int64_t key_heads, double eps) {
  const int64_t tokens = rows.size(0), size = cos_sin.size(1);
  rows = with_dense_rows(rows);
  Tensor queries = empty(tokens, heads * size, aoti_torch_dtype_bfloat16());
  Tensor keys = empty(tokens, key_heads * size, aoti_torch_dtype_bfloat16());
  rotate_and_normalize(write<bf16>(queries), write<bf16>(keys), read<bf16>(rows), rows.stride(0),
                       read<int64_t>(positions), read<bf16>(cos_sin), read<bf16>(weight), tokens, heads, key_heads, size,
                       static_cast<float>(eps));
  return {queries, keys};
}

Tensor router_logits_operator(Tensor x, Tensor gate) {
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = gate.size(0);
  x = with_dense_rows(x);
  Tensor logits = empty(tokens, experts, aoti_torch_dtype_float32());
  router_logits(write<float>(logits), read<bf16>(x), x.stride(0), read<float>(gate), tokens, experts, hidden);
  return logits;
}

std::tuple<Tensor, Tensor> choose_experts_operator(Tensor logits, int64_t topk, bool renormalize) {
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  logits = torch::stable::contiguous(logits);
  Tensor weights = empty(tokens, topk, aoti_torch_dtype_float32());
  Tensor ids = empty(tokens, topk, aoti_torch_dtype_int32());
  choose_experts(write<float>(weights), write<int32_t>(ids), read<float>(logits), tokens, topk, experts, renormalize);
  return {weights, ids};
}

// One query of each sequence, [sequences, heads, size]; cache [blocks, key heads, block, 2 · size] of vLLM's vector kernel.
void decode_attention_operator(Tensor output, Tensor query, Tensor cache, Tensor table, Tensor lengths, double scale) {
  const AttentionShape shape{query.size(0),   query.size(1),   cache.size(1),  query.size(2),  cache.size(2),
                             query.stride(0), output.stride(0), cache.stride(0), cache.stride(1), table.stride(0)};
  decode_attention(write<bf16>(output), read<bf16>(query), read<bf16>(cache), read<int32_t>(table),
                   read<int32_t>(lengths), static_cast<float>(scale), shape);
}

}  // namespace hunyuan

STABLE_TORCH_LIBRARY_FRAGMENT(hunyuan_vllm, library) {
  for (const char* schema : {
           "w8a16_pack_experts(Tensor weight) -> Tensor",
           "w8a8_pack_experts(Tensor weight) -> Tensor",
           "w8a16_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int expand_from) -> Tensor",
           "w8a8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int expand_from) -> Tensor",
           "w8a16_experts(Tensor hidden, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale, "
           "Tensor topk_weights, Tensor topk_ids, Tensor? shared_w13, Tensor? shared_w2, Tensor? shared_w13_scale, "
           "Tensor? shared_w2_scale, int expand_from) -> Tensor",
           "w8a8_experts(Tensor hidden, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale, "
           "Tensor topk_weights, Tensor topk_ids, Tensor? shared_w13, Tensor? shared_w2, Tensor? shared_w13_scale, "
           "Tensor? shared_w2_scale, int expand_from) -> Tensor",
           "bf16_pack_experts(Tensor weight) -> Tensor",
           "bf16_linear(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor",
           "bf16_mlp(Tensor x, Tensor w13, Tensor w2, int width) -> Tensor",
           "bf16_experts(Tensor hidden, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, int width, "
           "Tensor? shared_w13, Tensor? shared_w2) -> Tensor",
           "rotate_and_normalize(Tensor rows, Tensor positions, Tensor cos_sin, Tensor weight, int heads, "
           "int key_heads, float eps) -> (Tensor, Tensor)",
           "router_logits(Tensor x, Tensor gate) -> Tensor",
           "choose_experts(Tensor logits, int topk, bool renormalize) -> (Tensor, Tensor)",
           "decode_attention(Tensor(a!) output, Tensor query, Tensor cache, Tensor table, Tensor lengths, "
           "float scale) -> ()",
       })
    library.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(hunyuan_vllm, CPU, library) {
  library.impl("w8a16_pack_experts", TORCH_BOX(&hunyuan::pack_experts<hunyuan::W8A16>));
  library.impl("w8a8_pack_experts", TORCH_BOX(&hunyuan::pack_experts<hunyuan::W8A8>));
  library.impl("w8a16_linear", TORCH_BOX(&hunyuan::linear_operator<hunyuan::W8A16>));
  library.impl("w8a8_linear", TORCH_BOX(&hunyuan::linear_operator<hunyuan::W8A8>));
  library.impl("w8a16_experts", TORCH_BOX(&hunyuan::experts_operator<hunyuan::W8A16>));
  library.impl("w8a8_experts", TORCH_BOX(&hunyuan::experts_operator<hunyuan::W8A8>));
  library.impl("bf16_pack_experts", TORCH_BOX(&hunyuan::pack_experts<hunyuan::BF16>));
  library.impl("bf16_linear", TORCH_BOX(&hunyuan::bf16_linear));
  library.impl("bf16_mlp", TORCH_BOX(&hunyuan::bf16_mlp));
  library.impl("bf16_experts", TORCH_BOX(&hunyuan::bf16_experts));
  library.impl("rotate_and_normalize", TORCH_BOX(&hunyuan::rotate_and_normalize_operator));
  library.impl("router_logits", TORCH_BOX(&hunyuan::router_logits_operator));
  library.impl("choose_experts", TORCH_BOX(&hunyuan::choose_experts_operator));
  library.impl("decode_attention", TORCH_BOX(&hunyuan::decode_attention_operator));
}
