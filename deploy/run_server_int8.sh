#!/bin/sh
# Serve a BF16 checkpoint with int8 weights, quantised while they load, or the demo model if MODEL_PATH is not set:
# sh deploy/run_server_int8.sh [--dry-run] [vLLM flags]. Settings as in run_server.sh; up to 8 GPUs unless TP_SIZE is set.
# With int8 activations too: sh deploy/run_server.sh --scheme int8-w8a8
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
docstring=hunyuan_vllm/cli/serve.py
. "$root/deploy/bootstrap/help.sh"

sh "$root/deploy/setup_env.sh" --for run_server_int8.sh "$@"
exec "${HUNYUAN_VENV:-$root/.venv}/bin/hunyuan-vllm" serve --scheme int8 "$@"
