"""`hunyuan-vllm check`: whether a checkpoint directory is whole and fits together, without loading it."""
