"""Which network interface the ranks talk over, and the variables that tell vLLM, NCCL and Gloo.

Their ports ask nobody for a key, so on one machine they stay on its loopback interface.
"""

from __future__ import annotations

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.machine import Machine
from hunyuan_vllm.server.settings import LOOPBACK, Settings

__all__ = ["interface_env"]

LOOPBACK_INTERFACE = "lo"
USUAL_INTERFACE = "bond1"
READERS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def interface_env(settings: Settings, machine: Machine, several_nodes: bool) -> dict[str, str]:
    """The variables.

    Raises:
        UserError: LOCAL_IP or SOCKET_IFNAME is not this machine's.
    """
    if settings.local_ip and not _carrying(settings.local_ip, machine):
        own = sorted(address for addresses in machine.interfaces.values() for address in addresses)
        raise UserError(f"LOCAL_IP={settings.local_ip} is not this machine's address: it has {', '.join(own)}")
    if not several_nodes and not settings.socket_ifname:
        return {"VLLM_HOST_IP": LOOPBACK} | dict.fromkeys(READERS, LOOPBACK_INTERFACE)
    env = {"VLLM_HOST_IP": settings.local_ip} if settings.local_ip else {}
    if interface := _interface(settings, machine):
        env |= dict.fromkeys(READERS, interface)
    return env


def _interface(settings: Settings, machine: Machine) -> str | None:
    wanted = settings.socket_ifname
    if wanted:
        if wanted not in machine.interfaces:
            raise UserError(f"SOCKET_IFNAME={wanted} is not here; there are {', '.join(sorted(machine.interfaces))}")
        return wanted
    if settings.local_ip is None:
        return None
    return USUAL_INTERFACE if USUAL_INTERFACE in machine.interfaces else _carrying(settings.local_ip, machine)


def _carrying(address: str, machine: Machine) -> str | None:
    for name, addresses in machine.interfaces.items():
        if address in addresses:
            return name
    return None
