"""`hunyuan-vllm bench`: vLLM's own serving benchmark against a running server, and runs compared."""
