"""Proof that one machine logs in to another by key: the machine's own ssh does it."""

from __future__ import annotations

import time

from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.problems import Problem, ssh_problem
from hunyuan_vllm.cluster.shell import Shell, load_script

__all__ = ["prove"]

# A server drops connections at random when many log in at once (MaxStartups in sshd_config): try again.
ATTEMPTS = 3
DROPPED = ("Connection closed", "Connection reset")


def prove(shell: Shell, target: Host, timeout: float) -> Problem | None:
    """Log in to `target` from where `shell` runs; None if that worked.

    Raises:
        HostError: nothing could be run there.
    """
    names = {"address": target.address, "port": str(target.port), "user": target.user}
    for attempt in range(ATTEMPTS):
        done = shell.run(load_script("prove"), 4 * timeout, **names, seconds=str(max(1, round(timeout))))
        if done.status == 0:
            return None
        if not any(sign in done.errors for sign in DROPPED):
            break
        time.sleep(0.5 + attempt)
    return ssh_problem(done.errors, target)
