"""`hunyuan-vllm bench`: the published workload on a running server, and runs compared."""
