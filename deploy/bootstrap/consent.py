"""Whether an environment for the other device may be replaced: asked on a terminal, refused elsewhere.

That nvidia-smi appeared or failed is no reason to download gigabytes or to throw them away.
"""

from __future__ import annotations

import sys

from bootstrap.checks import gigabytes
from bootstrap.environment import Environment
from bootstrap.errors import SetupError
from bootstrap.plan import ENGINE_SIZE, KINDS, Plan

__all__ = ["check_replacement", "needs_consent"]

FOUND = {"cpu": "finds no GPU", "cuda": "finds a GPU"}


def needs_consent(plan: Plan, environment: Environment) -> bool:
    """Whether what is there is for another device than the one that was found, and nobody named that one."""
    return not plan.device_named and environment.device() not in (None, plan.device)


def check_replacement(plan: Plan, environment: Environment, command: str) -> None:
    """Ask whoever sits at the terminal.

    Args:
        command: what was called, as its user would call it again.

    Raises:
        SetupError: nobody sits there, or the answer was not yes. It names both ways to go on.
    """
    if not needs_consent(plan, environment):
        return
    there = environment.device() or ""
    download, installed = (gigabytes(size) for size in ENGINE_SIZE[plan.device])
    size = f"about {download} to download, {installed} on disk"
    state = f"{environment.path} is for {KINDS[there]}, and nvidia-smi {FOUND[plan.device]} here"
    if sys.stdin.isatty() and sys.stderr.isatty():
        question = f"{state}.\nReplace it by one for {KINDS[plan.device]} ({size})? [y/N] "
        print(question, end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise SetupError(
        f"{state}. To replace it ({size}): sh deploy/setup_env.sh --yes. "
        f"To go on with it as it is: HUNYUAN_DEVICE={there} {command}"
    )
