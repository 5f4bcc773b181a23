"""How far a host's clock is from this one's, as precisely as a round trip over an open connection tells."""

from __future__ import annotations

import time

from hunyuan_vllm.cluster.problems import HostError
from hunyuan_vllm.cluster.shell import Shell

__all__ = ["measure_offset"]

ROUNDS = 3


def measure_offset(shell: Shell, timeout: float) -> float:
    """Seconds that the host's clock is ahead, from the shortest of some round trips, which errs by half of that.

    Raises:
        HostError: the host does not tell the time.
    """
    best: tuple[float, float] | None = None
    for _ in range(ROUNDS):
        sent = time.time()
        done = shell.run("date +%s.%N", timeout)
        received = time.time()
        try:
            offset = float(done.out) - (sent + received) / 2
        except ValueError:
            raise HostError("date tells no time", "install coreutils there") from None
        best = min(best or (received - sent, offset), (received - sent, offset))
    assert best is not None
    return best[1]
