"""Products of rows with int8 weights (weight-only quantisation): sums and scales are float32, nothing else is rounded.

The functions are those of `products.Products`.
"""

from __future__ import annotations

from hunyuan_vllm.quant.cpu.portable import weight_only_product
from hunyuan_vllm.quant.cpu.products import Products

__all__ = ["experts", "linear", "pack_experts", "pack_linear"]

_products = Products("w8a16", weight_only_product)
pack_linear, pack_experts = _products.pack_linear, _products.pack_experts
linear, experts = _products.linear, _products.experts
