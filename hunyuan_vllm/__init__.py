"""Tencent's Hunyuan-Large on vLLM: one K and one V cache per group of layers."""

__version__ = "0.1.0"
