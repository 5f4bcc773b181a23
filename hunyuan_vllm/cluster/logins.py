"""Logins to all hosts, in parallel, with progress"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hunyuan_vllm.cluster.host_keys import Fingerprints
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.login_report import HostReport
from hunyuan_vllm.cluster.machine import Machine
from hunyuan_vllm.cluster.problems import HostError, Problem, last_line
from hunyuan_vllm.cluster.ssh import Credentials, RemoteShell, Shell, load_script

Item = TypeVar("Item")


class Steps:
    """Runs steps with up to `jobs` threads, and says on `console` what is being done.

    A terminal shows a bar while a step runs; elsewhere there is a line when it is done.
    """

    def __init__(self, jobs: int, console: Console) -> None:
        self._jobs = jobs
        self._console = console

    def run(self, title: str, items: Sequence[Item], action: Callable[[Item], None]) -> None:
        """Call `action` with each item. It is expected to keep what goes wrong with its item to itself."""
        if not items:
            return
        started = time.monotonic()
        pool = ThreadPoolExecutor(min(self._jobs, len(items)), thread_name_prefix=title)
        try:
            with self._bar() as bar:
                task = bar.add_task(title, total=len(items))
                for future in as_completed([pool.submit(action, item) for item in items]):
                    future.result()
                    bar.advance(task)
        finally:
            # All are done, or this was interrupted: who waits for a host that says nothing is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)
        if not self._console.is_terminal:
            self.say(f"{title}: {len(items)} done in {time.monotonic() - started:.1f} s")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self._console, disable=not self._console.is_terminal)


SET_UP = "run python3 deploy/login_ssh.py first"


@dataclass
class Login:
    """One host. `address` is the one it was reached at, "" where it was not."""

    machine: Machine
    address: str = ""

    @property
    def name(self) -> str:
        """As the operator gave it."""
        return self.machine.report.name

    @property
    def problems(self) -> list[Problem]:
        return self.machine.report.problems

    @property
    def shell(self) -> Shell:
        assert self.machine.shell is not None
        return self.machine.shell


class Logins:
    """The hosts of one run. A host that fails keeps its problem, and is left out of what follows.

    Attributes:
        all: every host, in the operator's order.
        timeout: seconds for a connection, and for a command that is quick.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        credentials: Credentials,
        known_hosts: str,
        steps: Steps,
        timeout: float,
        python: str,
    ) -> None:
        self.all = [Login(Machine(host, HostReport(host.address), timeout)) for host in hosts]
        self.timeout = timeout
        self._credentials = credentials
        self._known_hosts = known_hosts
        self._steps = steps
        self._python = python

    @property
    def usable(self) -> list[Login]:
        """Those that have no problem so far."""
        return [login for login in self.all if not login.problems]

    def open(self) -> None:
        """Log in to each."""
        self.each("logins", self.all, self._log_in)

    def close(self) -> None:
        for login in self.all:
            login.machine.close()

    def each(self, title: str, logins: Sequence[Login], action: Callable[[Login], None]) -> None:
        """One step for some of the hosts; `action` raises HostError where it fails."""
        self._steps.run(title, logins, lambda login: login.machine.attempt(lambda machine: action(login)))

    def python(self, login: Login, module: str, *words: str, given: str = "", timeout: float = 60.0) -> str:
        """What a module of ours prints on a host. `given` is its standard input, which may hold a secret.

        Raises:
            HostError: it does not run; what was said last is the reason.
        """
        names = {"python": self._python, "local_ip": login.address, "given": given}
        arguments = shlex.join([module, *words])
        limit = max(timeout, self.timeout)
        done = login.shell.run(load_script("python"), limit, arguments=arguments, **names)
        if done.status == 0:
            return done.out.decode(errors="replace")
        raise HostError(
            f"{self._python} runs no {module}: {last_line(done.errors) or f'status {done.status}'}",
            "put the same checkout at the same path and run sh deploy/setup_env.sh there, or name its --python",
        )

    def _log_in(self, login: Login) -> None:
        machine = login.machine
        machine.fetch_host_key(self._known_hosts, Fingerprints({}))
        if machine.report.trust is None:
            raise HostError("its host key is not known here", SET_UP)
        machine.log_in(self._credentials)
        if machine.password_needed:
            raise HostError("it takes none of this user's keys", SET_UP)
        assert isinstance(machine.shell, RemoteShell)
        login.address = machine.shell.address
        if ip_address(login.address).is_loopback and len(self.all) > 1:
            text = f"the name leads to {login.address} here, which is another machine on every host"
            raise HostError(text, "give its IP address")
