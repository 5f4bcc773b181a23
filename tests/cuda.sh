#!/bin/sh
# vLLM's CUDA wheel on a machine without a GPU: its choice of kernels, its Triton kernels interpreted, Model Runner V2,
# and the parsers, options, routes and fields of a server, in which the versions of vLLM differ.
# sh tests/cuda.sh [VLLM_VERSION] [pytest arguments]. HUNYUAN_CUDA_VENV= is where its environment is made, 9 GB.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
version=0.33.0
case "${1:-}" in
[0-9]*) version=$1 && shift ;;
esac
cuda="${HUNYUAN_CUDA_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/hunyuan-vllm/cuda-$version}"
needed=20 # GB while it is made: what is downloaded, and what is unpacked

cc="${CC:-cc}"
if ! command -v "$cc" >/dev/null 2>&1; then
    echo "tests/cuda.sh needs a C compiler, and $cc is none: install one (Debian, Ubuntu: apt-get install gcc) or name one with CC=" >&2
    exit 1
fi
if [ ! -e "$cuda/complete" ]; then
    mkdir -p "$cuda"
    if [ -n "$(ls -A "$cuda")" ] && [ ! -e "$cuda/incomplete" ]; then
        echo "tests/cuda.sh makes its environment in a directory of its own, and $cuda holds something else: name another with HUNYUAN_CUDA_VENV=" >&2
        exit 1
    fi
    free=$(($(df -Pk "$cuda" | awk 'NR == 2 {print $4}') / 1000000))
    if [ "$free" -lt "$needed" ]; then
        echo "tests/cuda.sh needs $needed GB in $cuda, and $free GB are free: name another place with HUNYUAN_CUDA_VENV=" >&2
        exit 1
    fi
fi

# The environment of the other tests: it has uv, and the build of vLLM for CPUs that Model Runner V2 is run in.
sh "$root/deploy/setup_env.sh" --test
cpu="${HUNYUAN_VENV:-$root/.venv}"
unset PYTHONDONTWRITEBYTECODE
if [ ! -e "$cuda/complete" ]; then
    echo "Installing vllm $version for CUDA into $cuda (about 9 GB)"
    "$cpu/bin/uv" venv --quiet --clear --python "$cpu/bin/python" "$cuda"
    : >"$cuda/incomplete"
    "$cpu/bin/uv" pip install --python "$cuda/bin/python" "vllm==$version" -e "${root}[cuda]" pytest pytest-asyncio pytest-timeout pytest-xdist hypothesis
    packages=$("$cuda/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # The wheel's libraries want the driver's, which comes with a GPU. What they name of it is not called here.
    mkdir "$cuda/driver" "$cuda/triton"
    nm -D --undefined-only "$packages"/vllm/*.so | sed -n 's/^ *U \(cu[A-Z][A-Za-z0-9_]*\)$/int \1(void) { return 100; }/p' | sort -u |
        "$cc" -shared -fPIC -Wl,-soname,libcuda.so.1 -x c - -o "$cuda/driver/libcuda.so.1"
    ln -s "$packages/triton" "$cuda/triton/triton" # alone, for the build for CPUs, which comes without
    mv "$cuda/incomplete" "$cuda/complete"
fi

cd "$root"
# The one test left out starts a process that asks which GPU is there.
LD_LIBRARY_PATH="$cuda/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$cuda/bin/python" -m pytest -p no:cacheprovider \
    --deselect=tests/server/test_vllm_parser.py::test_vllm_is_imported_once "$@" tests/cuda/wheel \
    tests/test_v1_parsers.py tests/test_tool_calls.py tests/test_streaming.py tests/test_rendered_chat.py \
    tests/server/test_vllm_parser.py tests/server/test_vllm_serve.py tests/server/test_launch.py \
    tests/server/test_routes.py tests/server/test_request_fields.py tests/server/test_error_handler.py \
    tests/server/test_token_counts.py tests/server/test_scheduler.py
PYTHONPATH="$cuda/triton${PYTHONPATH:+:$PYTHONPATH}" "$cpu/bin/python" -m pytest -p no:cacheprovider "$@" tests/cuda/model_runner_v2
