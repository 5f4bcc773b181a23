// The kernels as operators of torch, by its stable C++ interface: no Python between torch and them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "experts.h"
#include "gemm.h"
#include "routing.h"
#include "w8a16.h"
#include "w8a8.h"

namespace hunyuan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// What torch's own `empty` takes a dispatch for.
Tensor empty(int64_t rows, int64_t columns, int32_t type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Any stride from row to row will do.
Tensor with_dense_rows(const Tensor& x) { return x.stride(1) == 1 ? x : torch::stable::contiguous(x); }

// int8 [experts, out, in] → uint8 [experts, blocks, bytes]
template <class Scheme>
Tensor pack_experts(Tensor weight) {
  const int64_t experts = weight.size(0), outputs = weight.size(1), inputs = weight.size(2);
  const Weight<Scheme> one{nullptr, inputs, outputs};
  weight = torch::stable::contiguous(weight);
  Tensor packed = torch::stable::new_empty(weight, {experts, one.blocks(), one.block_bytes()}, ScalarType::Byte);
  for (int64_t e = 0; e < experts; ++e) {
    uint8_t* to = write<uint8_t>(packed) + e * one.blocks() * one.block_bytes();
    pack<Scheme>(to, read<int8_t>(weight) + e * outputs * inputs, outputs, inputs);
  }
  return packed;
}

template <class Scheme>
Tensor linear_operator(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> bias) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = scale.numel();
  x = with_dense_rows(x);
  Tensor y = empty(rows, outputs, aoti_torch_dtype_bfloat16());
  linear<Scheme>(write<bf16>(y), read<bf16>(x), x.stride(0), read<uint8_t>(packed), read<float>(scale),
                 bias ? read<float>(*bias) : nullptr, rows, outputs, inputs);
  return y;
}

inline ExpertsWeights weights_of(const Tensor& w13, const Tensor& w2, const Tensor& scale13, const Tensor& scale2) {
  return {read<uint8_t>(w13), read<uint8_t>(w2), read<float>(scale13), read<float>(scale2)};
}

// The four of the shared expert are given, or none of them.
template <class Scheme>
Tensor experts_operator(Tensor x, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale, Tensor topk_weights,
                        Tensor topk_ids, std::optional<Tensor> shared_w13, std::optional<Tensor> shared_w2,
                        std::optional<Tensor> shared_w13_scale, std::optional<Tensor> shared_w2_scale) {
  const ExpertsShape shape{x.size(0), topk_ids.size(1), w2_scale.size(0), x.size(1), w13_scale.size(1) / 2};
  x = with_dense_rows(x);
  Tensor y = empty(shape.tokens, shape.hidden, aoti_torch_dtype_bfloat16());
  std::optional<ExpertsWeights> shared;
  if (shared_w13) shared = weights_of(*shared_w13, *shared_w2, *shared_w13_scale, *shared_w2_scale);
  experts<Scheme>(write<bf16>(y), read<bf16>(x), x.stride(0), weights_of(w13, w2, w13_scale, w2_scale),
                  shared ? &*shared : nullptr, read<float>(topk_weights), read<int32_t>(topk_ids), shape);
  return y;
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

}  // namespace hunyuan

STABLE_TORCH_LIBRARY_FRAGMENT(hunyuan_vllm, library) {
  for (const char* schema : {
           "w8a16_pack_experts(Tensor weight) -> Tensor",
           "w8a8_pack_experts(Tensor weight) -> Tensor",
           "w8a16_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor",
           "w8a8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor",
           "w8a16_experts(Tensor hidden, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale, "
           "Tensor topk_weights, Tensor topk_ids, Tensor? shared_w13, Tensor? shared_w2, Tensor? shared_w13_scale, "
           "Tensor? shared_w2_scale) -> Tensor",
           "w8a8_experts(Tensor hidden, Tensor w13, Tensor w2, Tensor w13_scale, Tensor w2_scale, "
           "Tensor topk_weights, Tensor topk_ids, Tensor? shared_w13, Tensor? shared_w2, Tensor? shared_w13_scale, "
           "Tensor? shared_w2_scale) -> Tensor",
           "router_logits(Tensor x, Tensor gate) -> Tensor",
           "choose_experts(Tensor logits, int topk, bool renormalize) -> (Tensor, Tensor)",
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
  library.impl("router_logits", TORCH_BOX(&hunyuan::router_logits_operator));
  library.impl("choose_experts", TORCH_BOX(&hunyuan::choose_experts_operator));
}
