"""`hunyuan-vllm check`: whether a checkpoint folder is whole and fits together, without loading it."""
