// Torch's tensors by its stable C++ interface.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace hunyuan {

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
inline Tensor empty(int64_t rows, int64_t columns, int32_t type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace hunyuan
