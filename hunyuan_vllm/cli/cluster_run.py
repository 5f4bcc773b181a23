"""One run of a `hunyuan-vllm cluster` command: its hosts logged in to, and let go whatever ends it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from hunyuan_vllm.cluster.hosts import Host
    from hunyuan_vllm.cluster.logins import Logins

__all__ = ["Run", "cluster_run"]


@dataclass(frozen=True)
class Run:
    """The hosts, as they were named; the connections to them; and the home of who runs this."""

    hosts: Sequence[Host]
    logins: Logins
    home: Path


@contextmanager
def cluster_run(
    hosts: str | Sequence[Host],
    ssh_port: int,
    user: str | None,
    python: str,
    jobs: int,
    timeout: float,
    quiet: bool = False,
) -> Iterator[Run]:
    """Log in to the hosts, which are an operator's list or known already.

    Raises:
        UserError: the list cannot be meant.
    """
    from hunyuan_vllm.cluster.connection import Credentials
    from hunyuan_vllm.cluster.credentials import default_keys, this_user
    from hunyuan_vllm.cluster.hosts import parse_hosts
    from hunyuan_vllm.cluster.known_hosts import read_known_hosts
    from hunyuan_vllm.cluster.logins import Logins
    from hunyuan_vllm.cluster.steps import Steps

    me = this_user()
    home = Path(me.pw_dir)
    if isinstance(hosts, str):
        hosts = parse_hosts(hosts, ssh_port, user if user is not None else me.pw_name, option="--hosts")
    steps = Steps(jobs, Console(stderr=True, quiet=quiet))
    logins = Logins(hosts, Credentials(default_keys(home)), read_known_hosts(home), steps, timeout, python)
    try:
        logins.open()
        yield Run(hosts, logins, home)
    except KeyboardInterrupt:
        print(
            "hunyuan-vllm: interrupted; what was begun on a host may end there within a minute or two", file=sys.stderr
        )
        sys.stderr.flush()
        os._exit(130)  # an ordinary exit would wait for threads that wait for hosts
    finally:
        logins.close()
