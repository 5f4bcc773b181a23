#!/bin/sh
# Ask the running server a question with curl: sh deploy/openapi.sh [--raw] ["a question"]
# Prints the answer as it comes, or with --raw the server's JSON once it is complete.
# Reads the variables that run_server.sh does: HOST or LOCAL_IP, PORT, VLLM_API_KEY or HUNYUAN_VLLM_API_KEY_FILE; and
# TLS_CA_FILE, the certificate to trust of a server with --ssl-certfile ("system" for those the system trusts).
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
standalone=yes
. "$root/deploy/bootstrap/help.sh"

stream=true
case ${1:-} in
    -h | --help)
        sed -n '2,/^set/s/^# //p' "$0"
        exit
        ;;
    --raw)
        stream=false
        shift
        ;;
esac
question=${1:-Why is sea water salty?}
host=${HOST:-${LOCAL_IP:-127.0.0.1}}
case $host in
    0.0.0.0) host=127.0.0.1 ;;
    *:*) host="[$host]" ;;
esac
scheme=http
authority=
case ${TLS_CA_FILE:-} in
    '') ;;
    system) scheme=https ;;
    *) scheme=https authority="cacert = \"$TLS_CA_FILE\"" ;;
esac
server="$scheme://$host:${PORT:-8020}"

key=${VLLM_API_KEY:-}
key_file=${HUNYUAN_VLLM_API_KEY_FILE:-${XDG_CONFIG_HOME:-$HOME/.config}/hunyuan-vllm/api-key}
if [ -z "$key" ] && [ -r "$key_file" ]; then
    # The first key: its line is "NAME KEY", or the key alone.
    while read -r first second rest || [ -n "$first" ]; do
        case $first in '' | '#'*) continue ;; esac
        key=${second:-$first}
        break
    done <"$key_file"
fi

# post PATH JSON: the answer's body, whatever its status. The key goes through standard input, where `ps` does not see it.
post() {
    printf 'header = "Authorization: Bearer %s"\n%s\n' "$key" "$authority" |
        curl -sSN --noproxy '*' -K - -H 'Content-Type: application/json' -d "$2" "$server$1"
}

# A JSON string's inside, for printf %b. Escapes of control characters (\u001b) stay as they are: a terminal would obey them.
unescape='s/\\\\/\\0134/g; s/\\u/\\0134u/g; s/\\"/"/g; s/\\\//\//g'

# fail ANSWER: end with its message, or with all of it.
fail() {
    message=$(printf '%s\n' "$1" | sed -En '/.*"message" *: *"(([^"\\]|\\.)*)".*/{s//\1/;'"$unescape"';p;q;}')
    printf '%b\n' "${message:-$1}" >&2
    exit 1
}

# Reads an answer as server-sent events, and prints its text.
print_text() {
    sed -Eun '
        /^$/d
        /^data: *\[DONE]/{s/.*/end/;p;d;}
        /^data: .*"error" *:/{s/^data:/error/;p;d;}
        /^data:/!{s/^/error /;p;d;}
        /.*"content" *: *"(([^"\\]|\\.)*)".*/{s//text \1/;'"$unescape"';p;}
    ' | {
        while IFS= read -r line || [ -n "$line" ]; do
            case $line in
                end) echo && exit ;;
                'text '*) printf '%b' "${line#text }" ;;
                'error '*) fail "${line#error }" ;;
            esac
        done
        fail 'the connection ended in the middle of the answer'
    }
}

if ! command -v curl >/dev/null; then
    echo "curl is not installed (Debian, Ubuntu: apt-get install curl)" >&2
    exit 1
fi
answer=$(post /tokenize '{"prompt": "<|eos|>", "add_special_tokens": false}') ||
    fail "no server answers at $server: start one with sh deploy/run_server.sh"
# 127960 for the published vocabulary; the demo model's is smaller.
stop=$(printf '%s' "$answer" | sed -n 's/.*"tokens": *\[\([0-9]*\)].*/\1/p')
[ -n "$stop" ] || fail "$answer"

content=$(printf '%s' "$question" | tr '\000-\037' ' ' | sed 's/\\/\\\\/g; s/"/\\"/g')
request='{
  "messages": [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "'"$content"'"}
  ],
  "max_tokens": 256,
  "temperature": 0.7,
  "top_p": 0.6,
  "top_k": 20,
  "repetition_penalty": 1.05,
  "stop_token_ids": ['"$stop"'],
  "stream": '$stream'
}'
if [ "$stream" = true ]; then
    post /v1/chat/completions "$request" | print_text
    exit
fi
answer=$(post /v1/chat/completions "$request")
case $answer in
    *'"choices"'*) printf '%s\n' "$answer" ;;
    *) fail "$answer" ;;
esac
