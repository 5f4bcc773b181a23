# Log in from here to $user@$address by key alone, with the host key known. No prompts, no new host keys, no shared connection.
exec ssh -n -T \
    -o BatchMode=yes -o PreferredAuthentications=publickey -o IdentityAgent=none \
    -o StrictHostKeyChecking=yes -o UpdateHostKeys=no \
    -o ControlMaster=no -o ControlPath=none \
    -o ConnectTimeout="$seconds" -o ServerAliveInterval="$seconds" -o ServerAliveCountMax=1 \
    -p "$port" -l "$user" -- "$address" true
