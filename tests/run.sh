#!/bin/sh
# The whole check: lint, types, tests. sh tests/run.sh [pytest arguments]
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

sh "$root/deploy/setup_env.sh" --test
cd "$root"
bin="${HUNYUAN_VENV:-$root/.venv}/bin"
# Engines start twice as fast from bytecode.
unset PYTHONDONTWRITEBYTECODE
"$bin/ruff" check .
"$bin/mypy"
exec "$bin/python" -m pytest "$@"
