#!/bin/sh
# Create or complete .venv: sh deploy/setup_env.sh [--train] [--test]. PYTHON= names the Python to build on.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

# usable PYTHON NEWEST_MINOR
usable() {
    "$1" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $2))" >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    if "$PYTHON" -c '' 2>/dev/null; then
        exec "$PYTHON" "$here/setup_env.py" "$@"
    fi
    echo "PYTHON=$PYTHON does not run: name a Python 3.11 or newer, or unset it" >&2
    exit 1
fi
# The environment's own first, so that it stays what it is; then the tested versions.
for newest in 13 14; do
    for python in "${HUNYUAN_VENV:-$here/../.venv}/bin/python" python3 python3.13 python3.12 python3.11 python3.14; do
        if usable "$python" "$newest"; then
            exec "$python" "$here/setup_env.py" "$@"
        fi
    done
done
echo "hunyuan-vllm needs Python 3.11 or newer, and none is on the PATH: install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name one with PYTHON=" >&2
exit 1
