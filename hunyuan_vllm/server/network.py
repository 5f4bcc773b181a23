"""The interface the ranks talk over, and the certificate of the server"""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

from hunyuan_vllm.server.hardware import Machine
from hunyuan_vllm.server.options import Flags
from hunyuan_vllm.settings import Settings
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import INTERFACE_VARIABLES, LOOPBACK, interface_of

LOOPBACK_INTERFACE = "lo"
USUAL_INTERFACE = "bond1"


def interface_env(settings: Settings, machine: Machine, several_nodes: bool) -> dict[str, str]:
    """The variables.

    Raises:
        UserError: LOCAL_IP or SOCKET_IFNAME is not this machine's.
    """
    if settings.local_ip and not interface_of(settings.local_ip, machine.interfaces):
        own = sorted(address for addresses in machine.interfaces.values() for address in addresses)
        raise UserError(f"LOCAL_IP={settings.local_ip} is not this machine's address: it has {', '.join(own)}")
    if not several_nodes and not settings.socket_ifname:
        return {"VLLM_HOST_IP": LOOPBACK} | dict.fromkeys(INTERFACE_VARIABLES, LOOPBACK_INTERFACE)
    env = {"VLLM_HOST_IP": settings.local_ip} if settings.local_ip else {}
    if interface := _interface(settings, machine):
        env |= dict.fromkeys(INTERFACE_VARIABLES, interface)
    return env


def _interface(settings: Settings, machine: Machine) -> str | None:
    wanted = settings.socket_ifname
    if wanted:
        if wanted not in machine.interfaces:
            raise UserError(f"SOCKET_IFNAME={wanted} is not here; there are {', '.join(sorted(machine.interfaces))}")
        return wanted
    if settings.local_ip is None:
        return None
    return (
        USUAL_INTERFACE
        if USUAL_INTERFACE in machine.interfaces
        else interface_of(settings.local_ip, machine.interfaces)
    )


def check_certificate(flags: Flags) -> None:
    """Look at what vLLM's --ssl-certfile and --ssl-keyfile name; without them there is nothing to look at.

    Raises:
        UserError: a file is missing, they do not belong together, or others can read the private key.
    """
    certificate, key = flags.get("ssl-certfile") or None, flags.get("ssl-keyfile") or None
    if certificate is None:
        if key is not None:
            raise UserError("--ssl-keyfile says nothing without --ssl-certfile: give both")
        return
    for option, name in (("ssl-certfile", certificate), ("ssl-keyfile", key)):
        if name is not None and not Path(name).is_file():
            raise UserError(f"--{option} {name} is not a file")
    private = Path(key or certificate)
    status = private.stat()
    if status.st_uid == os.geteuid() and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"the private key {private} is open to other users: chmod 600 {private}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a passphrase would be asked for on the terminal, by vLLM as well.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"--ssl-certfile {certificate} and its key {private} cannot be used ({reason}): they must be PEM files "
            "that belong together, the key without a passphrase"
        ) from None
