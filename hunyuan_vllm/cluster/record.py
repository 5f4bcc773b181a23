"""The cluster that was last brought up from this machine, noted so that `status` and `down` need not be told again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.node_setup import NodeSetup
from hunyuan_vllm.ray_environment import NODE_FOLDER
from hunyuan_vllm.util.files import write_private

__all__ = ["ClusterRecord"]


@dataclass(frozen=True)
class ClusterRecord:
    """A cluster.

    Attributes:
        hosts: as the operator named them.
        setups: of the nodes, in the same order.
        python: the interpreter of the environment, on every host.
    """

    hosts: tuple[Host, ...]
    setups: tuple[NodeSetup, ...]
    python: str

    @staticmethod
    def file(home: Path) -> Path:
        return home / NODE_FOLDER / "cluster.json"

    @classmethod
    def read(cls, home: Path) -> ClusterRecord | None:
        """The one noted below `home`; None where none is, or it was written by another version."""
        try:
            values = json.loads(cls.file(home).read_text())
            hosts = tuple(Host(**host) for host in values["hosts"])
            return cls(hosts, tuple(NodeSetup.from_json(setup) for setup in values["setups"]), values["python"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, home: Path) -> None:
        values = {"hosts": [asdict(host) for host in self.hosts], "python": self.python}
        values["setups"] = [setup.to_json() for setup in self.setups]
        write_private(self.file(home), json.dumps(values, indent=1))
