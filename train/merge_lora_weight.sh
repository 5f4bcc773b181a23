#!/bin/sh
# Merge a LoRA adapter into its checkpoint, one tensor in memory at a time:
# sh train/merge_lora_weight.sh --base_model_path DIR --adapter_model_path DIR --output_path DIR [--save_dtype bf16|fp16|fp32]
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/deploy/bootstrap/help.sh"

exec "${HUNYUAN_VENV:-$root/.venv}/bin/hunyuan-vllm" merge-lora "$@"
