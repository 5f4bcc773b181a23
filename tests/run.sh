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
# Types beside the tests, and their errors below those of the tests.
types=$(mktemp)
"$bin/mypy" >"$types" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null || :; rm -f "$types"' EXIT
trap 'exit 130' INT TERM
status=0
# Three at a time, a file's tests in one process: most of them wait for a process that starts (-n 0: one by one).
"$bin/python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@" || status=$?
wait "$mypy" || status=1
cat "$types"
exit "$status"
