"""One life of a server: from its start, over the moment it answers, to its end, and the cause of that."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hunyuan_vllm import envs
from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server import ready
from hunyuan_vllm.server.cause import cause_of_death, oom_kills
from hunyuan_vllm.server.child import Child
from hunyuan_vllm.server.keys import UNNAMED, read_key_file
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.patience import Patience
from hunyuan_vllm.server.stop import Stop
from hunyuan_vllm.server.systemd import SOCKET_VARIABLE, notify
from hunyuan_vllm.server.temporary_files import make_folders
from hunyuan_vllm.server.verdict import Verdict

__all__ = ["Life", "live", "say"]

STARTING = 0.5  # seconds between two looks at a server that starts
RUNNING = 5.0  # and at one that has been ready, whose answers nobody wants
OVERTIME = 30.0  # seconds that a server may take to end once its requests have had their time


@dataclass(frozen=True)
class Life:
    """How a server lived.

    Attributes:
        status: its exit status as a shell has it (128 + n if signal n ended it).
        ready_for: seconds from its first answer to its end; None if it never answered.
        cause: what ended it, in one line.
    """

    status: int
    ready_for: float | None
    cause: str


def live(
    launch: Launch,
    environ: Mapping[str, str],
    stop: Stop,
    patience: Patience | None = None,
    ask: Callable[[Launch], Verdict] = ready.ask,
) -> Life:
    """Start a server and stay with it until it has ended and nothing of it is left.

    Args:
        environ: what it inherits; `launch.env` is set on top.
        stop: ends it when the operator wishes.
        patience: ends it when it hangs; None leaves that to the operator.
    """
    inherited = {name: value for name, value in environ.items() if name != SOCKET_VARIABLE}
    started = time.monotonic()
    environment = {**inherited, **launch.env}
    for line in make_folders(environment):
        say(line)
    killed_before = oom_kills()
    child = Child(launch.argv, environment)
    stop.hand_on_to(child)
    ready_since = started if launch.headless else None  # which nobody can ask
    killed = None
    while child.running:
        notify("WATCHDOG=1")
        if stop.since is not None:
            if time.monotonic() >= stop.since + _grace(launch) + OVERTIME and killed is None:
                killed = "it did not end in time"
                say(f"{killed}, and is killed")
                child.kill()
            child.wait(STARTING)
            continue
        if not launch.headless and (ready_since is None or patience):
            verdict = ask(launch)
            now = time.monotonic()
            if verdict.ready and ready_since is None and child.running:
                ready_since = now
                child.note_shared_memory()
                _announce(launch, now - started)
            if patience and (killed := patience.worn_out(verdict, now)) and child.running:
                child.kill()
        child.wait(STARTING if ready_since is None else patience.period if patience else RUNNING)
    ended = time.monotonic()
    status = child.bury(in_order=stop.requested and killed is None)
    oom_killed = None if killed_before is None else oom_kills() != killed_before
    cause = killed or cause_of_death(child.tail, child.exit_code, oom_killed) or "no error was logged"
    return Life(status, None if ready_since is None else ended - ready_since, f"{cause} (exit status {status})")


def say(text: str) -> None:
    """A line from us on standard error."""
    print(f"\nhunyuan-vllm: {text}", file=sys.stderr, flush=True)


def _grace(launch: Launch) -> float:
    return float(launch.env.get(envs.DRAIN_GRACE) or envs.drain_grace())


def _announce(launch: Launch, seconds: float) -> None:
    notify("READY=1", f"STATUS=ready after {seconds:.0f} s")
    header = ""
    if launch.key_file is not None:
        try:
            alone = list(read_key_file(launch.key_file)) == [UNNAMED]
        except UserError as error:  # it may change at any time, and the server goes on with the keys it has read
            say(str(error))
            alone = False
        key = f"$(cat {launch.key_file})" if alone else f"A-KEY-OF-{launch.key_file}"
        header = f' -H "Authorization: Bearer {key}"'
    elif launch.needs_key:
        header = ' -H "Authorization: Bearer $VLLM_API_KEY"'
    question = '{"messages": [{"role": "user", "content": "Why is sea water salty?"}]}'
    server = ready.address(launch, launch.host)
    page = "" if launch.uds else f"or open {server}/ in a browser, or chat in a terminal: vllm chat --url {server}/v1\n"
    curl = f"curl --unix-socket {launch.uds} http://localhost" if launch.uds else f"curl {server}"
    print(
        f"\nhunyuan-vllm: ready after {seconds:.0f} s on {launch.uds or server} (model: {launch.model_name}). Ask it:\n"
        f"  {curl}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{question}'\n{page}",
        flush=True,
    )
