#!/bin/sh
# Start Ray on this machine as the head of a cluster: sh deploy/ray_head.sh [--ifname bond1] [--gpus 8] [--tls]
# Its address is LOCAL_IP, or the only one it has. All hosts at once: hunyuan-vllm cluster up --help
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/deploy/bootstrap/help.sh"

sh "$root/deploy/setup_env.sh" --for ray_head.sh "$@"
exec "${HUNYUAN_VENV:-$root/.venv}/bin/python" -m hunyuan_vllm.cli.ray head "$@"
