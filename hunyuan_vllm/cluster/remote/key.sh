# Make the account's ed25519 key if it has none, and print the public half that belongs to the private one.
# A key gets its name only when it is complete, and never replaces an existing one.
set -eu
umask 077
cd "$HOME"
mkdir -p .ssh
key=.ssh/id_ed25519

if [ ! -e "$key" ]; then
    if [ -e "$key.pub" ]; then
        echo "$key.pub is there without the private key that belongs to it" >&2
        exit 1
    fi
    new=$(mktemp -d .ssh/new-key-XXXXXX)
    trap 'rm -rf "$new"' EXIT
    trap 'exit 1' HUP INT TERM
    ssh-keygen -q -t ed25519 -N '' -f "$new/key"
    if ln "$new/key" "$key"; then
        mv -f "$new/key.pub" "$key.pub"
        echo made
    elif [ ! -e "$key" ]; then
        exit 1
    fi
fi
ssh-keygen -y -P '' -f "$key"
