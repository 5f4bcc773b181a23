"""The variables by which a program on this machine joins the cluster that the machine is a node of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from hunyuan_vllm.cluster.node_setup import FOLDER, NodeSetup

__all__ = ["cluster_variables"]


def cluster_variables(environ: Mapping[str, str] = os.environ, home: Path | None = None) -> dict[str, str]:
    """Those of the node that `cluster up` or `ray_head.sh` started here; without those that the user has set.

    Empty where none was, where another Ray has taken its place, and where RAY_ADDRESS names another cluster.
    """
    noted = Path(environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        current = noted.read_text().strip()
    except OSError:
        return {}
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    for file in sorted(((home or Path.home()) / FOLDER).glob("node-*.json")):
        try:
            setup = NodeSetup.from_json(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if setup.address in own and setup.gcs == current:
            if environ.get("RAY_ADDRESS", "").strip() not in ("", "auto", setup.gcs):
                return {}
            # Without the address: programs find that where `ray start` noted it.
            found = {name: value for name, value in setup.environment().items() if name != "RAY_ADDRESS"}
            return {name: value for name, value in found.items() if name not in environ}
    return {}
