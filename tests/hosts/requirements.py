"""What the machine must have for hosts in namespaces, and what to do where it has not."""

import os
import shutil
import subprocess
from functools import cache

import pytest

TOOLS = {
    "ip": "install the Debian package iproute2",
    "sshd": "install the Debian package openssh-server",
    "ssh": "install the Debian package openssh-client",
    "nsenter": "install the Debian package util-linux",
}
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


@cache
def missing() -> str | None:
    """What keeps hosts from being made here and the remedy, or None."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root: run the tests as root"
    for tool, remedy in TOOLS.items():
        if shutil.which(tool, path=PATH) is None:
            return f"hosts in namespaces need {tool}: {remedy}"
    probe = "mount -t tmpfs probe /media && cd /media && mkdir u w r"
    probe += " && mount -t overlay -o lowerdir=/,upperdir=u,workdir=w probe r"
    probe += " && ip link add br0 type bridge && ip link add veth0 type veth peer name veth1"
    done = subprocess.run(
        ["unshare", "-m", "-u", "-i", "-n", "-p", "-f", "sh", "-c", probe], capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return f"hosts need namespaces ({reason[0]}): run the tests on a machine or in a container with CAP_SYS_ADMIN"
    return None


def need_hosts() -> None:
    """Skip the calling test where hosts cannot be made, saying what would let it run."""
    if reason := missing():
        pytest.skip(reason)
