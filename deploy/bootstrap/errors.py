"""The one exception of the set-up, and the plain words for what an installer's output means."""

from __future__ import annotations

__all__ = ["SetupError", "explain"]

NETWORK_SIGNS = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "Max retries exceeded",
    "ReadTimeoutError",
    "ProxyError",
    "SSLError",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "error sending request",
    "dns error",
    "Request failed after",
)
DISK_SIGNS = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")


class SetupError(Exception):
    """What stopped the set-up and how to get on, in one line for the user."""


def explain(output: str, doing: str) -> str:
    """One line for a failed installer run.

    Args:
        output: everything the command wrote.
        doing: what it was for, as in "installing 136 packages".
    """
    if any(sign in output for sign in DISK_SIGNS):
        return f"the disk filled up while {doing}: make room and start again"
    if any(sign in output for sign in NETWORK_SIGNS):
        return (
            f"no connection to the package index while {doing}: check the network, the proxy (HTTPS_PROXY) "
            "or the index that pip is set to (pip config list, PIP_INDEX_URL)"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return f"{doing} failed: {(telling or lines or ['no output'])[-1]}"
