"""What must agree between the nodes of a cluster, compared: versions, GPUs, checkpoint files, clocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from hunyuan_vllm.cluster.node import PACKAGES, Node
from hunyuan_vllm.findings import Section, some

__all__ = ["compare_clocks", "compare_files", "compare_gpus", "compare_versions"]

SKEW_WARNING, SKEW_PROBLEM = 0.5, 5.0  # seconds: logs no longer line up; leases and tokens fail


def compare_versions(section: Section, nodes: Mapping[str, Node]) -> None:
    """Python and the packages that talk to each other."""
    for name in ("Python", *PACKAGES):
        found = _groups({host: node.versions.get(name, "absent") for host, node in nodes.items()})
        if len(found) > 1:
            remedy = "make the environments alike: the same checkout, then sh deploy/setup_env.sh, on each"
            section.problem(name, _words(found), remedy)
        elif "absent" not in found:
            section.ok(name, f"{next(iter(found))} everywhere")
        elif name == "ray" and len(nodes) > 1:
            section.problem("ray", "it is installed nowhere, and ranks on several nodes need it", "pip install ray")


def compare_gpus(section: Section, nodes: Mapping[str, Node], wanted: int | None) -> None:
    """Model, memory, driver and number; `wanted` is the number each node must have, None for any that is the same."""
    found = _groups({host: _count(node.gpus) for host, node in nodes.items()})
    if len(found) > 1:
        section.problem("GPUs", _words(found), "use nodes with the same GPUs and the same driver")
    else:
        section.ok("GPUs", f"{next(iter(found))} on each node")
    for host, node in nodes.items():
        if wanted is not None and len(node.gpus) < wanted:
            text = f"{host} has {len(node.gpus)}, {wanted} are wanted"
            section.problem("GPUs", text, "take that node out, or lower --gpus-per-node")


def compare_files(section: Section, nodes: Mapping[str, Node], model: str) -> None:
    """Files of the checkpoint folder, against those of the first node that has it."""
    absent = [host for host, node in nodes.items() if node.files is None]
    if absent:
        section.problem("checkpoint", f"{model} is no folder on {some(absent)}", "copy it there, to the same path")
    have = {host: node.files for host, node in nodes.items() if node.files is not None}
    if not have:
        return
    first, files = next(iter(have.items()))
    wrong = []
    for host, other in have.items():
        wrong += [f"{name}: missing on {host}" for name in files.keys() - other.keys()]
        wrong += [f"{name}: on {host}, missing on {first}" for name in other.keys() - files.keys()]
        for name in files.keys() & other.keys():
            if files[name] != other[name]:
                size, there = files[name].split()[0], other[name].split()[0]
                how = f"{there} bytes on {host}, {size} on {first}" if size != there else f"other content on {host}"
                wrong.append(f"{name}: {how}")
    if wrong:
        text = f"{len(wrong)} files are not the same"
        section.problem(
            "checkpoint", text, f"copy {model} from a node where `hunyuan-vllm check` finds it sound", wrong
        )
    elif not absent:
        section.ok("checkpoint", f"the same {len(files)} files on each node")


def compare_clocks(section: Section, offsets: Mapping[str, float]) -> None:
    """Offsets from this machine's clock, in seconds."""
    if len(offsets) < 2:
        return
    skew = max(offsets.values()) - min(offsets.values())
    late, early = min(offsets, key=lambda host: offsets[host]), max(offsets, key=lambda host: offsets[host])
    remedy = "timedatectl set-ntp true on each, or run chrony; in containers, on their hosts"
    if skew < SKEW_WARNING:
        section.ok("clocks", f"within {skew:.2f} s")
    elif skew < SKEW_PROBLEM:
        section.warning("clocks", f"{early} is {skew:.1f} s ahead of {late}: their logs do not line up", remedy)
    else:
        section.problem("clocks", f"{early} is {skew:,.1f} s ahead of {late}", remedy)


def _groups(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Value → hosts that have it."""
    groups = defaultdict(list)
    for host, value in values.items():
        groups[value].append(host)
    return dict(groups)


def _words(groups: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{value} on {some(hosts)}" for value, hosts in groups.items())


def _count(names: Iterable[str]) -> str:
    counts = {name: len(same) for name, same in _groups({str(i): name for i, name in enumerate(names)}).items()}
    return ", ".join(f"{count} × {name}" for name, count in counts.items()) or "none"
