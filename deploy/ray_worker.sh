#!/bin/sh
# Let this machine join a cluster: sh deploy/ray_worker.sh HEAD_IP [--ifname bond1] [--gpus 8] [--tls]
# It needs the head's token, ~/.ray/auth_token (mode 600). All hosts at once: hunyuan-vllm cluster up --help
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/deploy/bootstrap/help.sh"

sh "$root/deploy/setup_env.sh" --for ray_worker.sh "$@"
exec "${HUNYUAN_VENV:-$root/.venv}/bin/python" -m hunyuan_vllm.cli.ray worker "$@"
