"""What a set-up would do, said without doing it: for its own --dry-run, and for that and --help of the scripts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from bootstrap.checks import gigabytes
from bootstrap.consent import needs_consent
from bootstrap.environment import Environment
from bootstrap.plan import ENGINE_SIZE, KINDS, Plan

__all__ = ["is_dry_run", "look"]


def is_dry_run(script: Sequence[str]) -> bool:
    """Whether the words that a script was called with, after its name, ask it to do nothing."""
    return not {"--dry-run", "--help", "-h"}.isdisjoint(script[1:])


def look(plan: Plan, environment: Environment, script: Sequence[str]) -> int:
    """Say what a set-up would do, if anything. Returns 1 where `script` cannot go on without it."""
    missing = environment.missing(plan.wanted())
    if missing:
        _say(f"the set-up, which is left out, would {_work(plan, environment, missing)}")
    if not script or os.access(environment.path / "bin" / "hunyuan-vllm", os.X_OK):
        return 0
    _say(f"{script[0]} goes on inside that environment: make it first, with sh deploy/setup_env.sh")
    return 1


def _work(plan: Plan, environment: Environment, missing: Sequence[str]) -> str:
    if "engine" not in missing:
        return f"install into {environment.path}: {', '.join(missing)}"
    download, installed = (gigabytes(size) for size in ENGINE_SIZE[plan.device])
    torch = "; torch comes on top" if plan.device == "cpu" else ""
    work = f"make {environment.path} for {KINDS[plan.device]} ({download} to download, {installed} on disk{torch})"
    there = environment.device()
    if there is not None:
        work += f", in place of one for {KINDS[there]}"
    return work + (", once you agree" if needs_consent(plan, environment) else "")


def _say(line: str) -> None:
    print(f"dry run: {line}", file=sys.stderr, flush=True)
