"""Whether a server really answers: its health, then one generated token. And whether its port is free before."""

from __future__ import annotations

import errno
import os
import socket

import httpx
import psutil

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.auth import read_key
from hunyuan_vllm.server.launch import Launch

__all__ = ["answers", "check_port", "client_host"]

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def client_host(host: str) -> str:
    """The address at which this machine reaches a server that listens on `host`."""
    return ANY_ADDRESS.get(host, host)


def answers(launch: Launch) -> bool:
    """Ask once. A server that is alive may still be unable to generate, so only a generated token counts."""
    host = client_host(launch.host)
    base = f"http://[{host}]:{launch.port}" if ":" in host else f"http://{host}:{launch.port}"
    headers = {"Authorization": f"Bearer {read_key({**os.environ, **launch.env})}"} if launch.needs_key else {}
    request = {"model": launch.model_name, "prompt": "1", "max_tokens": 1, "temperature": 0}
    try:
        with httpx.Client(base_url=base, headers=headers, timeout=60, trust_env=False) as client:
            if client.get("/health", timeout=5).status_code != httpx.codes.OK:
                return False
            return client.post("/v1/completions", json=request).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def check_port(host: str, port: int) -> None:
    """Raise UserError if a server could not listen there; names the process that does, where that can be seen."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"HOST={host} is not an address: {error.strerror}") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(_port_problem(host, port, error)) from None


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
