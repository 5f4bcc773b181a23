#!/bin/sh
# Fine-tune on this machine, or on several nodes: sh train/train.sh [--dry-run] [flags of python -m hunyuan_vllm.train].
# Without flags: LoRA on the demo model. The published variables are HOST_GPU_NUM, LOCAL_IP, NODE_IP_LIST="ip1:8,ip2:8",
# NODES and NODE_NUM; it is started on one node, which starts the others over SSH.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/deploy/bootstrap/help.sh"

sh "$root/deploy/setup_env.sh" --train --for ../train/train.sh "$@"
exec "${HUNYUAN_VENV:-$root/.venv}/bin/python" -m hunyuan_vllm.train.launch "$@"
