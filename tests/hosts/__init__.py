"""Real hosts on one machine: `with Network() as network: a, b = network.add("a"), network.add("b")`."""

from hosts.network import HOME, Host, Network
from hosts.requirements import missing, need_hosts
from hosts.sshd import Sshd

__all__ = ["HOME", "Host", "Network", "Sshd", "missing", "need_hosts"]
