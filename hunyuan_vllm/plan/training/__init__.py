"""`hunyuan-vllm plan --train`: what fine-tuning takes of GPUs and hosts, and how long an iteration is."""
