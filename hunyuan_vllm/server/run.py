"""One run of a server: start, readiness, hang detection, exit"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from hunyuan_vllm import envs
from hunyuan_vllm.server.health_status import Verdict, cause_of_death, oom_kills
from hunyuan_vllm.server.keys import UNNAMED, read_key_file
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.process import SOCKET_VARIABLE, Child, Stop, make_folders, notify
from hunyuan_vllm.util.errors import UserError

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
MARGIN = 5.0  # seconds an answer may take beyond what the server itself waits for a token


def client_host(host: str) -> str:
    """The address at which this machine reaches a server that listens on `host`."""
    return ANY_ADDRESS.get(host, host)


def address(launch: Launch, host: str) -> str:
    """The server's URL under a host name or address."""
    return f"{'https' if launch.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{launch.port}"


def ask(launch: Launch) -> Verdict:
    """Its answer to /readyz. A server that is alive may still be unable to generate, so only a generated token counts.

    The status is "silent" where no answer comes: it has not started to listen, or hangs.
    """
    # Its certificate is for the name that clients use; here it is asked at an address, without the key.
    transport = httpx.HTTPTransport(uds=launch.uds, verify=False)
    base = address(launch, client_host(launch.host))
    try:
        with httpx.Client(base_url=base, transport=transport, timeout=envs.ready_timeout() + MARGIN) as client:
            content = client.get("/readyz").json()
        return Verdict(str(content["status"]), str(content["reason"]))
    except httpx.TransportError as error:
        return Verdict("silent", f"it does not answer ({type(error).__name__})")
    except (ValueError, KeyError, TypeError):
        return Verdict("silent", "something else answers in its place")


LAST_WORDS = 5.0  # seconds in which a server whose engine has died tells its clients, and ends by itself
PERIOD = 5.0  # seconds between two questions, at most
SLOW = 10  # times the limit for one that still works, but gives nobody a token: long prompts are being read


class Patience:
    """Follows the answers to /readyz, one server's life long.

    Attributes:
        period: seconds between two questions to a server that has been ready.
    """

    def __init__(self, start_timeout: float, hang_timeout: float, now: float) -> None:
        """Args:
        start_timeout: seconds until it must be ready for the first time.
        hang_timeout: seconds that it may stand still after that.
        now: when it was started; times are time.monotonic().
        """
        self.period = min(PERIOD, hang_timeout / 4)
        self._start_timeout, self._hang_timeout = start_timeout, hang_timeout
        self._started = now
        self._was_ready = False
        self._silent_since = self._moved = now
        self._died: float | None = None

    def worn_out(self, verdict: Verdict, now: float) -> str | None:
        """Why the server is to be killed after this answer; None to let it live."""
        if verdict.ready or verdict.status == "draining":
            self._was_ready = True
            self._silent_since = self._moved = now
            return None
        if not self._was_ready:
            if now - self._started >= self._start_timeout:
                return f"it was not ready after {now - self._started:.0f} s"
            return None
        if verdict.status == "dead":
            self._died = now if self._died is None else self._died
            return f"{verdict.reason}, but it goes on" if now - self._died >= LAST_WORDS else None
        if verdict.status == "slow":
            self._moved = now
        for since, limit in ((self._moved, self._hang_timeout), (self._silent_since, SLOW * self._hang_timeout)):
            if now - since >= limit:
                return f"it hangs: {verdict.reason}, for {now - since:.0f} s by now"
        return None


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
    ask: Callable[[Launch], Verdict] = ask,
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
    server = address(launch, launch.host)
    page = "" if launch.uds else f"or open {server}/ in a browser, or chat in a terminal: vllm chat --url {server}/v1\n"
    curl = f"curl --unix-socket {launch.uds} http://localhost" if launch.uds else f"curl {server}"
    print(
        f"\nhunyuan-vllm: ready after {seconds:.0f} s on {launch.uds or server} (model: {launch.model_name}). Ask it:\n"
        f"  {curl}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{question}'\n{page}",
        flush=True,
    )
