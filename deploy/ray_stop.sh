#!/bin/sh
# End Ray on this machine, and all that it started: sh deploy/ray_stop.sh. All hosts at once: hunyuan-vllm cluster down
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/deploy/bootstrap/help.sh"

exec "${HUNYUAN_VENV:-$root/.venv}/bin/python" -m hunyuan_vllm.cli.ray stop "$@"
