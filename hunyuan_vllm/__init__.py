"""Tencent's Hunyuan models on vLLM: Hunyuan-Large, with one K and one V cache per group of layers, and Hunyuan V1."""

__version__ = "0.1.0"
