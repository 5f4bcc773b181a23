"""Whether a server can generate: what it answers to /readyz, and what its supervisor acts upon."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Verdict"]

READY = ("ready", "busy")


@dataclass(frozen=True)
class Verdict:
    """Whether the server can generate.

    Attributes:
        status: "warming", before the first token; "ready"; "busy", no token in time but others got theirs; "slow",
            nobody got a token but the engine goes on stepping (long prompts); "stalled", it does not even step;
            "failed", the completion was refused; "dead", the engine has ended; "draining", it is about to stop.
        reason: why not, for people. Says nothing of the model, its users or the machine.
    """

    status: str
    reason: str = ""

    @property
    def ready(self) -> bool:
        return self.status in READY
