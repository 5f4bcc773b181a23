"""Running a server: one run from its start to its exit, and with `serve --supervise` restarts with back-off"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hunyuan_vllm import envs
from hunyuan_vllm.server.exit_cause import exit_cause, oom_kills
from hunyuan_vllm.server.keys import UNNAMED, read_key_file
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.process import NOTIFY_SOCKET, Child, Stop, make_directories, notify_systemd
from hunyuan_vllm.server.ray_cluster import kill_stale_workers, wait_for_gpus
from hunyuan_vllm.server.readiness import HealthMonitor, HealthStatus, read_health
from hunyuan_vllm.server.terminal import Terminal
from hunyuan_vllm.util.errors import UserError

START_PERIOD = 0.5  # seconds between two health checks of a server that starts
IDLE_PERIOD = 5.0  # seconds between two looks at an unsupervised server that has been ready
STOP_MARGIN = 30.0  # seconds that a server may take to exit once its requests have had their time
START_MARGIN = 10.0  # the same for one that is not ready: it has no requests, and vLLM's engine starts to the end first
GAVE_UP = os.EX_UNAVAILABLE
REFUSED = 2  # vLLM's exit status for wrong options, which a restart would not change

ReadHealth = Callable[[Launch], HealthStatus]


@dataclass(frozen=True)
class Run:
    """A server's run, after its exit.

    Attributes:
        status: its exit status as a shell reports it (128 + n if signal n ended it).
        ready_for: seconds from its first readiness to its exit; None if it never was ready.
        cause: what ended it, in one line.
    """

    status: int
    ready_for: float | None
    cause: str


@dataclass(frozen=True)
class RestartPolicy:
    """When a supervised server is killed, and when it is started again.

    Attributes:
        start_timeout: seconds until a server must be ready.
        hang_timeout: seconds a ready server may make no progress.
        max_restarts: restarts in a row, without a minute of readiness between, before giving up; None: no limit.
        max_wait: the longest wait before a restart, in seconds.
        first_wait: seconds before the first restart; each failure in a row doubles them.
        reset_after: seconds of readiness after which a failure counts as the first again.
    """

    start_timeout: float = 3600.0
    hang_timeout: float = 60.0
    max_restarts: int | None = None
    max_wait: float = 60.0
    first_wait: float = 1.0
    reset_after: float = 60.0

    def wait(self, failures: int) -> float:
        """Seconds before the restart after so many failures in a row."""
        return min(self.max_wait, self.first_wait * 2 ** min(failures - 1, 30))


def run_once(
    launch: Launch,
    environ: Mapping[str, str],
    stop: Stop,
    health: ReadHealth = read_health,
    terminal: Terminal | None = None,
) -> int:
    """Run a server without supervision.

    Returns:
        Its exit status (128 + n if signal n ended it); 0 if it was told to stop before it was ready.
    """
    run = run_server(launch, environ, stop, health=health, terminal=terminal)
    if stop.requested:
        return _status_after_stop(run, stop)
    report(f"the server {'stopped before it was ready' if run.ready_for is None else 'died'}: {run.cause}")
    return run.status or 1


def supervise(
    launch: Launch,
    environ: Mapping[str, str],
    stop: Stop,
    policy: RestartPolicy,
    terminal: Terminal | None = None,
) -> int:
    """Run a server again and again until the operator stops it.

    Returns:
        The exit status of the server that was told to stop; REFUSED if vLLM does not accept its options; GAVE_UP.
    """
    restarts = failures = 0
    while True:
        monitor = HealthMonitor(policy.start_timeout, policy.hang_timeout, time.monotonic())
        variables = {**environ, envs.SUPERVISOR_RESTARTS: str(restarts)}
        run = run_server(launch, variables, stop, monitor, terminal=terminal)
        if stop.requested:
            return _status_after_stop(run, stop)
        if run.ready_for is None and run.status == REFUSED:
            report(f"vLLM does not accept these options: {run.cause}")
            return REFUSED
        failures = 1 if run.ready_for is not None and run.ready_for >= policy.reset_after else failures + 1
        when = "before it was ready" if run.ready_for is None else f"after {run.ready_for:.0f} s of service"
        died = f"the server died {when}: {run.cause}"
        if policy.max_restarts is not None and failures > policy.max_restarts:
            report(f"{died}; giving up after {failures} failures in a row")
            return GAVE_UP
        restarts += 1
        wait = policy.wait(failures)
        restarting = f"{died}; restart {restarts} in {wait:.0f} s"
        report(restarting)
        notify_systemd(f"STATUS={restarting}")
        stop.sleep(wait)
        if launch.ray_gpus:
            # `hunyuan-vllm cluster up` or Ray's own service brings a failed node back.
            wait_for_gpus(launch.ray_gpus, {**environ, **launch.env}, expected=launch.nodes, stop=stop)
        if stop.requested:
            return 0
        if launch.ray_gpus:
            for worker in kill_stale_workers({**environ, **launch.env}):
                report(f"killed a stale worker, whose raylet had exited: {worker}")
        notify_systemd(f"STATUS=starting (restart {restarts})")


def run_server(
    launch: Launch,
    environ: Mapping[str, str],
    stop: Stop,
    monitor: HealthMonitor | None = None,
    health: ReadHealth = read_health,
    terminal: Terminal | None = None,
) -> Run:
    """Start a server and return once it has exited and its processes and files are gone.

    Args:
        environ: what it inherits, under `launch.env`.
        stop: stops it when the operator asks for that.
        monitor: detects that it hangs, so that it is killed; None leaves that to the operator.
        terminal: takes its output; None leaves that on standard output.
    """
    inherited = {name: value for name, value in environ.items() if name != NOTIFY_SOCKET}
    started = time.monotonic()
    environment = {**inherited, **launch.env}
    for line in make_directories(environment):
        report(line)
    oom_kills_before = oom_kills()
    if terminal:
        terminal.start()
    child = Child(launch.argv, environment, terminal.write if terminal else None)
    stop.forward_to(child)
    ready_since = started if launch.headless else None  # a headless server answers no health check
    kill_reason = None
    while child.running:
        notify_systemd("WATCHDOG=1")
        if stop.since is not None:
            limit = START_MARGIN
            if ready_since is not None:
                limit = STOP_MARGIN + float(launch.env.get(envs.DRAIN_GRACE) or envs.drain_grace())
            if time.monotonic() >= stop.since + limit and kill_reason is None:
                kill_reason = "it did not exit in time"
                report(f"{kill_reason}, and is killed")
                child.kill()
            child.wait(START_PERIOD)
            continue
        if terminal and ready_since is None:
            terminal.show()
        if not launch.headless and (ready_since is None or monitor):
            status = health(launch)
            now = time.monotonic()
            if status.ready and ready_since is None and child.running:
                ready_since = now
                child.note_shared_memory()
                if terminal:
                    terminal.finish()
                _announce(launch, now - started)
            if monitor and (kill_reason := monitor.reason_to_kill(status, now)) and child.running:
                child.kill()
        child.wait(START_PERIOD if ready_since is None else monitor.period if monitor else IDLE_PERIOD)
    ended = time.monotonic()
    exit_status = child.reap(graceful=stop.requested and kill_reason is None)
    oom_killed = None if oom_kills_before is None else oom_kills() != oom_kills_before
    if terminal and not stop.requested:
        terminal.finish()
        terminal.show_errors(child.tail)
    cause = kill_reason or exit_cause(child.tail, child.exit_code, oom_killed) or "no error was logged"
    return Run(
        exit_status, None if ready_since is None else ended - ready_since, f"{cause} (exit status {exit_status})"
    )


def report(text: str) -> None:
    """Print a line of our own to standard error."""
    print(f"\nhunyuan-vllm: {text}", file=sys.stderr, flush=True)


def _status_after_stop(run: Run, stop: Stop) -> int:
    """0 for an interrupted start, unless the operator killed the server; else the server's own status."""
    return 0 if run.ready_for is None and not stop.killed else run.status


def _announce(launch: Launch, seconds: float) -> None:
    notify_systemd("READY=1", f"STATUS=ready after {seconds:.0f} s")
    header = ""
    if launch.key_file is not None:
        try:
            one_key = list(read_key_file(launch.key_file)) == [UNNAMED]
        except UserError as error:  # the file may change at any time; the server keeps the keys it has read
            report(str(error))
            one_key = False
        key = f"$(cat {launch.key_file})" if one_key else f"A-KEY-OF-{launch.key_file}"
        header = f' -H "Authorization: Bearer {key}"'
    elif launch.needs_key:
        header = ' -H "Authorization: Bearer $VLLM_API_KEY"'
    question = '{"messages": [{"role": "user", "content": "Why is sea water salty?"}]}'
    url = launch.url
    page = "" if launch.uds else f"or open {url}/ in a browser, or chat in a terminal: vllm chat --url {url}/v1\n"
    curl = f"curl --unix-socket {launch.uds} http://localhost" if launch.uds else f"curl {url}"
    print(
        f"\nhunyuan-vllm: ready after {seconds:.0f} s on {launch.uds or url} (model: {launch.model_name}). Ask it:\n"
        f"  {curl}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{question}'\n{page}",
        flush=True,
    )
