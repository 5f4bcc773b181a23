#!/bin/sh
# Become PID 1 of a host: boot.sh NAME SHARED..., inside its new namespaces. The SHARED directories are the machine's own.
# The root is a copy-on-write view of the machine's; /root, /run, /tmp, /dev/shm and the host name are the host's own.
set -eu
name=$1
shift
mount --make-rprivate /
disk=/media # any directory that is there: only this host sees what lies on it now
mount -t tmpfs -o mode=755 "$name" "$disk"
mkdir "$disk/upper" "$disk/work" "$disk/root"
root=$disk/root
mount -t overlay -o "lowerdir=/,upperdir=$disk/upper,workdir=$disk/work" "$name" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mount -t tmpfs -o mode=700 home "$root/root"
mkdir -p "$root/run/sshd"
for directory in "$@"; do
    mkdir -p "$root$directory"
    mount --rbind "$directory" "$root$directory"
done
hostname "$name"
# A host has booted once it is inside its root: what entered it before would write to the machine's files.
# A shell that waits for a child also reaps every orphan of the host, as an init must.
exec chroot "$root" sh -c 'cd /; echo booted; exec >/dev/null 2>&1; while :; do sleep 3600; done'
