"""`hunyuan-vllm plan`: whether a network fits on some GPUs, what it can do there, and what to change if not."""
