#!/bin/sh
# Serve an FP8 checkpoint (W8A8) with an FP8 KV cache (C8), or the demo model in FP8 if MODEL_PATH is not set:
# sh deploy/run_server_fp8.sh [--dry-run] [vLLM flags]. Settings as in run_server.sh; up to 8 GPUs unless TP_SIZE is set.
# A BF16 checkpoint is converted with: hunyuan-vllm quantize SOURCE DESTINATION --scheme fp8
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
docstring=hunyuan_vllm/cli/serve.py
. "$root/deploy/bootstrap/help.sh"

sh "$root/deploy/setup_env.sh" --for run_server_fp8.sh "$@"
exec "${HUNYUAN_VENV:-$root/.venv}/bin/hunyuan-vllm" serve --scheme fp8 "$@"
