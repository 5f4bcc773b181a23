# Run a module of ours with the node's Python: $arguments are shell words. LOCAL_IP as for a server.
cd /
if ! [ -x "$python" ]; then
    echo "no Python at $python" >&2
    exit 1
fi
export LOCAL_IP="$local_ip"
eval "set -- $arguments"
exec "$python" -m "$@"
