"""`hunyuan-vllm doctor`: whether this machine and installation can serve, and what to change"""
