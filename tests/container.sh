#!/bin/sh
# Build the CPU form of deploy/Dockerfile, run it as documented and ask it a question: sh tests/container.sh
# As root; it takes about ten minutes, and 5 GB in TMPDIR and in buildah's storage, where the image stays.
#   BASE_IMAGE  an image to build on; default: one that mmdebstrap makes of Debian bookworm's packages
#   WHEELS      a directory with the wheels of requirements/; default: pip downloads them with its own configuration
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
image=localhost/hunyuan-vllm-test

fail() {
    echo "container.sh: $*" >&2
    exit 1
}
say() { printf '== %s\n' "$*"; }

[ "$(id -u)" = 0 ] || fail "needs root, which mounts the image and makes its namespaces"
for program in buildah mmdebstrap curl openssl ip unshare nsenter setpriv; do
    command -v "$program" >/dev/null ||
        fail "$program is not installed (Debian, Ubuntu: apt-get install buildah mmdebstrap curl openssl iproute2)"
done

work=$(mktemp -d)
container=
outer=
cleanup() {
    [ -z "$outer" ] || kill -9 "$outer" 2>/dev/null || true
    [ -z "$container" ] || buildah rm "$container" >/dev/null
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
export BUILDAH_ISOLATION=chroot

if [ -z "${BASE_IMAGE:-}" ]; then
    BASE_IMAGE=localhost/hunyuan-vllm-test-base
    say "a base of Debian packages"
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,libnuma1,libgomp1 bookworm "$work/base.tar"
    base=$(buildah from scratch)
    buildah add --quiet "$base" "$work/base.tar" / >/dev/null
    buildah commit --quiet --rm "$base" "$BASE_IMAGE" >/dev/null
    rm "$work/base.tar"
fi
if [ -z "${WHEELS:-}" ]; then
    WHEELS=$work/wheels
    say "wheels"
    get() { python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --dest "$WHEELS" "$@"; }
    get -r "$root/requirements/uv.txt" -r "$root/requirements/cpu.txt"
    get -r "$root/requirements/torch-cpu.txt" \
        ${HUNYUAN_TORCH_SOURCE:+--find-links "$HUNYUAN_TORCH_SOURCE" --extra-index-url "$HUNYUAN_TORCH_SOURCE"} ||
        get -r "$root/requirements/torch-pypi.txt"
fi

say "the image"
buildah build --quiet --format docker --build-context "wheels=$WHEELS" --build-arg PIP_NO_INDEX=1 \
    --build-arg DEVICE=cpu --build-arg "BASE_IMAGE=$BASE_IMAGE" --file "$root/deploy/Dockerfile" --tag "$image" "$root"
container=$(buildah from "$image")
mounted=$(buildah mount "$container")
inspect() { buildah inspect --type image --format "$1" "$image"; }
user=$(inspect '{{.Docker.Config.User}}')
[ "$user" = 10001 ] || fail "the image runs as $user"

# What `docker run --read-only --cap-drop all --security-opt no-new-privileges` does, with the mounts of docs/serving.md.
mkdir -p "$mounted/model" "$mounted/run/secrets/hunyuan"
umask 077
mkdir "$work/keys"
openssl rand -hex 32 >"$work/keys/api-key"
chown -R "$user" "$work/keys"
inspect '{{range .Docker.Config.Env}}{{println .}}{{end}}' >"$work/env"
inspect '{{range .Docker.Config.Entrypoint}}{{println .}}{{end}}' >"$work/entrypoint"
inspect '{{index .Docker.Config.Healthcheck.Test 3}}' >"$work/check"
cat >"$work/start" <<'SCRIPT'
set -eu
ip link set lo up
mount --bind "$mounted" "$mounted"
mount -t proc proc "$mounted/proc"
mount -t sysfs -o ro sysfs "$mounted/sys"
mount -t tmpfs -o mode=0755 tmpfs "$mounted/dev"
for device in null zero full random urandom; do
    touch "$mounted/dev/$device"
    mount --bind "/dev/$device" "$mounted/dev/$device"
done
ln -s /proc/self/fd "$mounted/dev/fd"
mkdir "$mounted/dev/shm"
for directory in dev/shm tmp home/hunyuan; do mount -t tmpfs -o mode=1777 tmpfs "$mounted/$directory"; done
mount --bind "$root/hunyuan_vllm/demo" "$mounted/model"
mount --bind "$work/keys" "$mounted/run/secrets/hunyuan"
for directory in "$mounted/model" "$mounted/run/secrets/hunyuan" "$mounted"; do mount -o remount,bind,ro "$directory"; done
exec chroot "$mounted" setpriv --reuid="$user" --regid="$user" --clear-groups \
    --no-new-privs --bounding-set=-all --inh-caps=-all \
    env -i $(cat "$work/env") HOME=/home/hunyuan sh -c 'cd && exec "$@"' sh $(cat "$work/entrypoint")
SCRIPT
export root work mounted user
say "the container"
unshare --mount --pid --net --ipc --uts --fork --kill-child sh "$work/start" >"$work/log" 2>&1 &
outer=$!
seconds=0
until server=$(cat "/proc/$outer/task/$outer/children") && [ -n "$server" ]; do sleep 0.1; done
server=${server% }

# inside COMMAND...: in the container's network, with the rights and programs of this script
inside() { nsenter --net --target "$server" "$@"; }
# ask KEY-FILE JSON [CURL OPTIONS]: the status; the answer goes to the file "answer"
ask() {
    key_file=$1 body=$2
    shift 2
    printf 'header = "Authorization: Bearer %s"\n' "$(cat "$key_file")" | inside curl --silent --config - \
        --output "$work/answer" --write-out '%{http_code}' --header 'Content-Type: application/json' \
        --data "$body" "$@" http://127.0.0.1:8020/v1/chat/completions
}
# expect STATUS KEY-FILE
expect() {
    got=$(ask "$2" "$question") || true
    [ "$got" = "$1" ] || fail "$1 was expected, $got came: $(cat "$work/answer" "$work/log")"
}
question='{"model": "hunyuan", "temperature": 0, "messages": [{"role": "user", "content": "Why is sea water salty?"}]}'

# check: the image's HEALTHCHECK
check() {
    # shellcheck disable=SC2046 # no value of the image has a blank
    nsenter --mount --pid --net --ipc --root --target "$server" --setuid "$user" --setgid "$user" \
        env -i $(cat "$work/env") python3 -c "$(cat "$work/check")"
}
until check >/dev/null 2>&1; do
    kill -0 "$outer" 2>/dev/null || fail "it ended: $(cat "$work/log")"
    [ "$((seconds += 1))" -lt 300 ] || fail "it is not healthy after 300 s: $(cat "$work/log")"
    sleep 1
done

grep -q '^[^ ]* / [^ ]* ro' "/proc/$server/mounts" || fail "its root can be written to: $(cat "/proc/$server/mounts")"

say "an answer"
cp "$work/keys/api-key" "$work/first"
echo wrong >"$work/wrong"
expect 401 "$work/wrong"
expect 200 "$work/first"
grep -q salt "$work/answer" || fail "an answer of the demo model speaks of salt: $(cat "$work/answer")"

say "another key, while it serves"
openssl rand -hex 32 >"$work/keys/.new"
chown "$user" "$work/keys/.new"
mv "$work/keys/.new" "$work/keys/api-key"
expect 401 "$work/first"
expect 200 "$work/keys/api-key"

say "the end, with an answer under way"
rm "$work/answer"
ask "$work/keys/api-key" "${question%\}}, \"max_tokens\": 400, \"ignore_eos\": true, \"stream\": true}" --no-buffer >/dev/null &
streaming=$!
until grep -q '"content"' "$work/answer" 2>/dev/null; do sleep 0.05; done
kill -TERM "$server"
wait "$streaming" || fail "the stream was cut"
grep -q '^data: \[DONE\]' "$work/answer" || fail "the stream has no end: $(tail -n 3 "$work/answer")"
status=0
wait "$outer" || status=$?
outer=
[ "$status" = 0 ] || fail "it ended with $status: $(cat "$work/log")"
say "built, asked, given another key and stopped: all as documented"
