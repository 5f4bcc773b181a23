"""What a server says of itself when it is asked from outside; and whether its port is free before."""

from __future__ import annotations

import errno
import socket

import httpx
import psutil

from hunyuan_vllm import envs
from hunyuan_vllm.errors import NotYetError, UserError
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.verdict import Verdict

__all__ = ["address", "ask", "check_port", "client_host"]

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


def check_port(host: str, port: int) -> None:
    """Raise UserError if a server could not listen there, NotYetError where another process does."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"HOST={host} is not an address: {error.strerror}") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise (NotYetError if taken else UserError)(_port_problem(host, port, error)) from None


def _port_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken{_listener(port)}: stop that server, or choose another port with PORT="
    if error.errno == errno.EACCES:
        return f"port {port} is reserved for root: choose one above 1023 with PORT="
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine: set HOST or LOCAL_IP to one that is"
    return f"cannot listen on {host} port {port}: {error.strerror}"


def _listener(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):
        pass
    return ""
