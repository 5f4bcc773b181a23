"""Hosts in namespaces of their own (network, mounts, processes, host name), joined by a bridge.

Everything hangs on processes that the kernel kills when the one that made them dies, however it dies: no network
namespace has a name, no mount is visible outside, so nothing can be left behind and two test runs never meet.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

HOME = "/root"  # on every host
BOOT = Path(__file__).with_name("boot.sh")
CHECKOUT = BOOT.parents[2]
OWN = (HOME, "/run", "/tmp", "/dev/shm", "/media")  # directories of each host; see boot.sh
NOT_OF_A_HOST = {"SSH_AUTH_SOCK", "GLOO_SOCKET_IFNAME"}  # of this process's environment
BOUND_TO_US = ["setpriv", "--pdeathsig", "KILL"]


class Host:
    """One host of a network; `network.add` makes it.

    Attributes:
        name: its host name, which every host of the network resolves.
        address, address6: on eth0.
        pid: its PID 1, as this machine numbers it.
    """

    def __init__(self, name: str, number: int, shared: Sequence[Path]) -> None:
        self.name = name
        self.number = number
        self.address, self.address6 = f"10.77.0.{number}", f"fd77::{number:x}"
        # --kill-child: the host's PID 1 goes with unshare, and every process of the host with its PID 1.
        self._anchor = subprocess.Popen(
            [*BOUND_TO_US, "unshare", "-m", "-u", "-i", "-n", "-p", "-f", "--kill-child", BOOT, name, *shared],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._anchor.stdout is not None
        if self._anchor.stdout.readline() != "booted\n":
            raise RuntimeError(f"host {name} did not boot (status {self._anchor.wait()}): its reason is above")
        self.pid = int(Path(f"/proc/{self._anchor.pid}/task/{self._anchor.pid}/children").read_text().split()[0])

    @property
    def alive(self) -> bool:
        return self._anchor.poll() is None

    def command(self, *argv: str | Path) -> list[str]:
        """The command that runs `argv` inside the host, for whoever starts it.

        What runs is a child of that command: it dies when the command is killed, but gets no other signal sent to it.
        """
        return ["nsenter", "-t", str(self.pid), "-a", "-r", "-w", "--", *BOUND_TO_US, *map(str, argv)]

    def run(self, *argv: str | Path, check: bool = True, timeout: float = 60, **options: Any) -> Any:
        """Run inside the host to its end: a CompletedProcess with text output, raising where `check` and it failed."""
        options = {"capture_output": True, "text": True, "env": self.environment(), **options}
        done = subprocess.run(self.command(*argv), timeout=timeout, **options)
        if check and done.returncode != 0:
            raise AssertionError(f"{self.name}: {argv} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def sh(self, script: str, **options: Any) -> str:
        """Run a shell script inside the host; its standard output."""
        output: str = self.run("sh", "-euc", script, **options).stdout
        return output

    def start(self, *argv: str | Path, **options: Any) -> subprocess.Popen[Any]:
        """Start inside the host, and do not wait."""
        return subprocess.Popen(self.command(*argv), **{"env": self.environment(), **options})

    @staticmethod
    def environment(**more: str) -> dict[str, str]:
        """This process's environment, at home in the host."""
        own = {"HOME": HOME, "USER": "root", "LOGNAME": "root", "PATH": os.defpath + ":/usr/sbin:/sbin"}
        return {**{name: value for name, value in os.environ.items() if name not in NOT_OF_A_HOST}, **own, **more}

    def unplug(self) -> None:
        """A silent partition: packets go nowhere, no connection is reset."""
        self.run("ip", "link", "set", "eth0", "down")

    def plug(self) -> None:
        """End the partition (the IPv6 address, which the kernel dropped, is put back)."""
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "address", "replace", f"{self.address6}/64", "dev", "eth0", "nodad")

    def power_off(self) -> None:
        """As if the cable were pulled: every process of the host is gone at once, and so are its disks."""
        self._anchor.send_signal(signal.SIGKILL)
        self._anchor.wait()
        assert self._anchor.stdout is not None
        self._anchor.stdout.close()


class Network:
    """A bridge; leaving the `with` block powers every host off."""

    def __init__(self, shared: Sequence[Path] = ()) -> None:
        self.hosts: list[Host] = []
        interpreter = [directory for directory in map(Path, (sys.prefix, sys.base_prefix)) if _is_hidden(directory)]
        self._shared = _outermost([CHECKOUT, *interpreter, *shared])
        self._count = self._boots = 0

    def __enter__(self) -> "Network":
        bridge = "ip link add br0 type bridge; ip link set br0 up; echo up; cat"
        self._switch = subprocess.Popen(
            [*BOUND_TO_US, "unshare", "-n", "sh", "-euc", bridge],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._switch.stdout is not None
        if self._switch.stdout.readline() != "up\n":
            raise RuntimeError("the bridge between the hosts could not be made: its reason is above")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            if host.alive:
                host.power_off()
        self._switch.kill()
        self._switch.communicate()

    def add(self, name: str) -> Host:
        """Boot a host, plug it in, and make its name known to all.

        A name that was powered off may be given again: the same address, and new disks.
        """
        old = next((host for host in self.hosts if host.name == name), None)
        if old is None:
            self._count += 1
        host = Host(name, old.number if old else self._count, self._shared)
        self.hosts = [other for other in self.hosts if other is not old] + [host]
        self._boots += 1
        port = f"port{self._boots}"  # the kernel may take a moment to remove that of a host that is off
        mac = f"02:00:00:00:00:{host.number:02x}"  # the same after a power-off, as a machine's is
        plug = f"ip link add {port} type veth peer name eth0 address {mac} netns {host.pid}"
        plug += f"; ip link set {port} master br0 up"
        subprocess.run(["nsenter", "-t", str(self._switch.pid), "-n", "sh", "-euc", plug], check=True)
        host.sh(
            f"ip link set lo up; ip address add {host.address}/24 dev eth0; ip link set eth0 up;"
            f"ip address add {host.address6}/64 dev eth0 nodad"
        )
        names = "".join(f"{known.address} {known.name}\n{known.address6} {known.name}6\n" for known in self.hosts)
        for known in self.hosts:
            if known.alive:
                known.run("tee", "/etc/hosts", input="127.0.0.1 localhost\n::1 localhost\n" + names)
        return host


def _is_hidden(directory: Path) -> bool:
    """Whether a host does not see this directory of the machine's unless it is shared, and then written to as well."""
    real, root = directory.resolve(), Path("/")
    if real in (root, Path("/usr")):
        return False  # tests change a host's system
    return any(Path(own) in real.parents for own in OWN) or real.stat().st_dev != root.stat().st_dev


def _outermost(directories: Sequence[Path]) -> list[Path]:
    """Each directory once, without those inside another."""
    wanted = sorted(
        {directory.resolve() for directory in directories} | {directory.absolute() for directory in directories}
    )
    return [directory for directory in wanted if not any(other in directory.parents for other in wanted)]
