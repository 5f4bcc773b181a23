# Run a module of this package with the host's Python: $arguments are shell words, $given is standard input (secrets).
# LOCAL_IP is set as for a server.
cd /
if ! [ -x "$python" ]; then
    echo "no Python at $python" >&2
    exit 1
fi
export LOCAL_IP="$local_ip"
eval "set -- $arguments"
# printf is part of the shell: what it prints is in no process's arguments.
printf '%s' "$given" | "$python" -m "$@"
