#!/bin/sh
# Serve a checkpoint with 4-bit weights (GPTQ, AWQ or compressed-tensors int4, as published):
# sh deploy/run_server_int4.sh [--dry-run] [vLLM flags]. Settings as in run_server.sh; up to 8 GPUs unless TP_SIZE is set.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
docstring=hunyuan_vllm/cli/serve.py
. "$root/deploy/bootstrap/help.sh"

sh "$root/deploy/setup_env.sh" --for run_server_int4.sh "$@"
exec "${HUNYUAN_VENV:-$root/.venv}/bin/hunyuan-vllm" serve --scheme int4 "$@"
