"""Which network interface the nodes talk over, and the variables that tell vLLM, NCCL and Gloo."""

from __future__ import annotations

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.machine import Machine
from hunyuan_vllm.server.settings import Settings

__all__ = ["interface_env"]

USUAL_INTERFACE = "bond1"
READERS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def interface_env(settings: Settings, machine: Machine) -> dict[str, str]:
    """The variables; empty where neither LOCAL_IP nor SOCKET_IFNAME is set, as on a single machine.

    Raises:
        UserError: the address or the interface is not this machine's.
    """
    env: dict[str, str] = {}
    if settings.local_ip:
        if not _carrying(settings.local_ip, machine):
            own = sorted(address for addresses in machine.interfaces.values() for address in addresses)
            raise UserError(f"LOCAL_IP={settings.local_ip} is not this machine's address: it has {', '.join(own)}")
        env["VLLM_HOST_IP"] = settings.local_ip
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
