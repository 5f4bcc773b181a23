"""Products of rows rounded to int8, token by token while computing, with int8 weights (W8A8): sums are integers.

The functions are those of `products.Products`.
"""

from __future__ import annotations

from hunyuan_vllm.quant.cpu.portable import w8a8_product
from hunyuan_vllm.quant.cpu.products import Products

__all__ = ["experts", "linear", "pack_experts", "pack_linear"]

_products = Products("w8a8", w8a8_product)
pack_linear, pack_experts = _products.pack_linear, _products.pack_experts
linear, experts = _products.linear, _products.experts
