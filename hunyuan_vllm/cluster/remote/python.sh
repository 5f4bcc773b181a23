# Run a module of ours with the node's Python: $arguments are shell words, $given is its standard input, where secrets are.
# LOCAL_IP as for a server.
cd /
if ! [ -x "$python" ]; then
    echo "no Python at $python" >&2
    exit 1
fi
export LOCAL_IP="$local_ip"
eval "set -- $arguments"
# printf is part of the shell: what it prints is in no one's arguments.
printf '%s' "$given" | "$python" -m "$@"
