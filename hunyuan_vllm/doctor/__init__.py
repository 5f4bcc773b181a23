"""`hunyuan-vllm doctor`: whether this machine and this installation can serve, and what to mend."""
