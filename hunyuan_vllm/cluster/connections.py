"""Connections to all hosts of one run: logins, and steps that run on several hosts at once"""

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from hunyuan_vllm.cluster.host_keys import keys_of, verify_host_key
from hunyuan_vllm.cluster.hosts import Host, HostError
from hunyuan_vllm.cluster.ssh import (
    Credentials,
    PasswordNeeded,
    RemoteShell,
    fetch_host_key,
    last_line,
    load_script,
    log_in,
)
from hunyuan_vllm.util.net import is_loopback
from hunyuan_vllm.util.progress import Progress

SET_UP = "run python3 deploy/login_ssh.py first"


class Steps:
    """Runs steps with up to `jobs` threads: a bar on a terminal while a step runs, elsewhere a line when it is done."""

    def __init__(self, jobs: int, console: Console) -> None:
        self._jobs = jobs
        self._console = console

    def each(self, title: str, hosts: Sequence[Host], action: Callable[[Host], object]) -> None:
        """One step on some hosts; `action` raises HostError where it fails."""
        if not hosts:
            return
        started = time.monotonic()
        pool = ThreadPoolExecutor(min(self._jobs, len(hosts)), thread_name_prefix=title)
        progress = Progress(self._console)
        try:
            with progress.stage(title, len(hosts), unit="hosts"):
                for future in as_completed([pool.submit(host.attempt, action) for host in hosts]):
                    future.result()
                    progress.advance(1)
        finally:
            # All are done, or this was interrupted: do not wait for threads that wait for a silent host.
            pool.shutdown(wait=False, cancel_futures=True)
        if not self._console.is_terminal:
            line = f"{title}: {len(hosts)} done in {time.monotonic() - started:.1f} s"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def read_host_key(host: Host, known_hosts: str, fingerprints: Mapping[str, frozenset[str]], timeout: float) -> None:
    """Fetch the host's key, and find out whether it is trusted without asking."""
    host.host_key = fetch_host_key(host, keys_of(known_hosts, host.known_hosts_name), timeout)
    host.trust = verify_host_key(host, host.host_key, known_hosts, fingerprints)


def connect(host: Host, credentials: Credentials, timeout: float) -> None:
    """Log in to a host whose key is trusted, or record that a password is needed."""
    assert host.host_key is not None and host.trust is not None
    host.password_needed = None
    try:
        shell = RemoteShell(log_in(host, host.host_key, credentials, timeout))
    except PasswordNeeded as error:
        host.password_needed = error
    else:
        host.shell, host.address = shell, shell.address


def disconnect(hosts: Sequence[Host]) -> None:
    for host in hosts:
        if isinstance(host.shell, RemoteShell):
            host.shell.close()


@dataclass
class Connections:
    """The hosts of one run, logged in to by key. A host that fails keeps its problem and is left out of later steps.

    Attributes:
        hosts: in the operator's order.
        timeout: seconds for a connection or a quick command.
        python: of the environment, on every host.
    """

    hosts: Sequence[Host]
    credentials: Credentials
    known_hosts: str
    steps: Steps
    timeout: float
    python: str

    def __post_init__(self) -> None:
        self.each = self.steps.each

    @property
    def usable(self) -> list[Host]:
        """Those that have no problem so far."""
        return [host for host in self.hosts if not host.problems]

    def open(self) -> None:
        self.each("logins", self.hosts, self._log_in)

    def close(self) -> None:
        disconnect(self.hosts)

    def run(self, host: Host, script: str) -> str:
        """What a shell script prints on a host."""
        assert host.shell is not None
        return host.shell.run(script, self.timeout).out.decode(errors="replace")

    def run_module(self, host: Host, module: str, *words: str, given: str = "", timeout: float = 60.0) -> str:
        """What a module of this package prints on a host. `given` is its standard input, which may hold a secret."""
        assert host.shell is not None
        variables = {"python": self.python, "local_ip": host.address, "given": given}
        arguments = shlex.join([module, *words])
        limit = max(timeout, self.timeout)
        done = host.shell.run(load_script("python"), limit, arguments=arguments, **variables)
        if done.status == 0:
            return done.out.decode(errors="replace")
        raise HostError(
            f"{self.python} cannot run {module}: {last_line(done.errors) or f'status {done.status}'}",
            "put the same checkout at the same path and run sh deploy/setup_env.sh there, or name its --python",
        )

    def ask_ray(self, host: Host, request: Mapping[str, Any], timeout: float = 60.0) -> dict[str, Any]:
        """The answer of `cluster.ray_start` on a host; its problem becomes the host's."""
        text = self.run_module(host, "hunyuan_vllm.cluster.ray_start", given=json.dumps(request), timeout=timeout)
        answer: dict[str, Any] = json.loads(text)
        if "problem" in answer:
            raise HostError(answer["problem"], answer["remedy"])
        return answer

    def _log_in(self, host: Host) -> None:
        read_host_key(host, self.known_hosts, {}, self.timeout)
        if host.trust is None:
            raise HostError("its host key is not known here", SET_UP)
        connect(host, self.credentials, self.timeout)
        if host.password_needed:
            raise HostError("it accepts none of this user's keys", SET_UP)
        if is_loopback(host.address) and len(self.hosts) > 1:
            text = f"the name leads to {host.address} here, which is a different machine on every host"
            raise HostError(text, "give its IP address")
