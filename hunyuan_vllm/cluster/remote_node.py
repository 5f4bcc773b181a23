"""What `cluster up`, `status` and `down` have done on hosts: `ray_node` run there, with JSON as input and output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hunyuan_vllm.cluster.logins import Login, Logins
from hunyuan_vllm.cluster.node_setup import NodeSetup
from hunyuan_vllm.cluster.problems import HostError
from hunyuan_vllm.cluster.ray_node import Looked
from hunyuan_vllm.cluster.ray_start import START_TIMEOUT

__all__ = ["RemoteNodes"]

MODULE = "hunyuan_vllm.cluster.ray_node"


class RemoteNodes:
    """Each method does one thing on one host, and raises HostError where it fails."""

    def __init__(self, logins: Logins) -> None:
        self._logins = logins

    def look(self, login: Login) -> Looked:
        """What there is of Ray."""
        values = self._ask(login, {"do": "look", "address": login.address})
        setup = NodeSetup.from_json(values["setup"]) if values["setup"] else None
        return Looked(**{**values, "setup": setup})

    def request_certificate(self, login: Login, setup: NodeSetup) -> str | None:
        """A signing request; None where the certificate there is good."""
        request: str | None = self._ask(login, {"do": "request", "setup": setup.to_json()})["request"]
        return request

    def start(self, login: Login, setup: NodeSetup, token: str, signed: tuple[str, str] | None) -> float:
        """Start Ray, with a certificate and the authority's if `signed` has them; seconds it took."""
        asked = {"do": "start", "setup": setup.to_json(), "token": token}
        if signed:
            asked |= {"certificate": signed[0], "authority": signed[1]}
        seconds: float = self._ask(login, asked, START_TIMEOUT + 30)["seconds"]
        return seconds

    def stop(self, login: Login) -> tuple[list[str], list[str]]:
        """End all of Ray; what was ended, and this user's other processes that hold GPU memory."""
        done = self._ask(login, {"do": "stop"})
        if done["stuck"]:
            raise HostError(f"these do not end: {', '.join(done['stuck'])}", "a driver holds them: reboot the host")
        return done["ended"], done["on_gpus"]

    def _ask(self, login: Login, asked: Mapping[str, Any], timeout: float = 60.0) -> dict[str, Any]:
        text = self._logins.python(login, MODULE, given=json.dumps(asked), timeout=timeout)
        answer: dict[str, Any] = json.loads(text)
        if "problem" in answer:
            raise HostError(answer["problem"], answer["remedy"])
        return answer
