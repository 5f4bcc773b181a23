"""`cluster down`: no process of Ray, and none that it started, stays on any host; nor does what they held on GPUs."""

from __future__ import annotations

from hunyuan_vllm.cluster.logins import Login, Logins
from hunyuan_vllm.cluster.remote_node import RemoteNodes
from hunyuan_vllm.findings import Section, some

__all__ = ["bring_down"]


def bring_down(logins: Logins) -> Section:
    """End what runs, on every host that can be reached."""
    nodes = RemoteNodes(logins)
    ended: dict[str, list[str]] = {}
    holding: dict[str, list[str]] = {}

    def end(login: Login) -> None:
        ended[login.name], holding[login.name] = nodes.stop(login)

    logins.each("ending Ray", logins.usable, end)
    section = Section("Down")
    for login in logins.all:
        for problem in login.problems:
            section.problem(login.name, problem.what, problem.remedy)
        if login.problems:
            continue
        done = ended[login.name]
        section.ok(login.name, f"{len(done)} processes were ended: {some(done)}" if done else "no Ray ran")
        if left := holding[login.name]:
            text = f"GPU memory is still held by {some(left)}, which Ray did not start"
            section.warning(login.name, text, "end them, if they are not meant to be")
    return section
