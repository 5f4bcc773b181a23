#!/bin/sh
# Serve Hunyuan-Large, or the demo model if MODEL_PATH is not set: sh deploy/run_server.sh [--dry-run] [vLLM flags]
# Settings by environment variable: sh deploy/run_server.sh --help lists them.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
docstring=hunyuan_vllm/cli/serve.py
. "$root/deploy/bootstrap/help.sh"

sh "$root/deploy/setup_env.sh" --for run_server.sh "$@"
exec "${HUNYUAN_VENV:-$root/.venv}/bin/hunyuan-vllm" serve "$@"
