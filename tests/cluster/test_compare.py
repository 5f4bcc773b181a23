"""What must agree between nodes, compared."""

import pytest

from hunyuan_vllm.cluster.check import compare_clocks, compare_files, compare_gpus, compare_versions
from hunyuan_vllm.cluster.probe import NodeFacts
from hunyuan_vllm.util.findings import Section, Status

VERSIONS = {"Python": "3.11.7", "vllm": "0.32.0", "ray": "2.60.0"}


def compare(function, *arguments) -> dict[str, list[tuple[Status, str]]]:
    """Subject → status and text of each finding."""
    section = Section("")
    function(section, *arguments)
    found: dict[str, list[tuple[Status, str]]] = {}
    for finding in section.findings:
        found.setdefault(finding.subject, []).append((finding.status, finding.text))
        assert finding.remedy or finding.status is Status.OK
    return found


def test_versions():
    found = compare(
        compare_versions, {"a": NodeFacts(VERSIONS), "b": NodeFacts(VERSIONS | {"Python": "3.12.1", "ray": "2.61.0"})}
    )
    assert found["Python"] == [(Status.PROBLEM, "3.11.7 on a; 3.12.1 on b")]
    assert found["vllm"] == [(Status.OK, "0.32.0 everywhere")]
    assert found["ray"] == [(Status.PROBLEM, "2.60.0 on a; 2.61.0 on b")]
    assert "torch" not in found  # installed nowhere: not this check's to say


def test_ray_is_needed_by_several_nodes_only():
    without = NodeFacts({"Python": "3.11.7"})
    assert compare(compare_versions, {"a": without, "b": without})["ray"][0][0] is Status.PROBLEM
    assert "ray" not in compare(compare_versions, {"a": without})


def test_gpus():
    two, one = NodeFacts({}, ("H20", "H20")), NodeFacts({}, ("H20",))
    assert compare(compare_gpus, {"a": two, "b": two}, 2) == {"GPUs": [(Status.OK, "2 × H20 on each host")]}
    assert compare(compare_gpus, {"a": two, "b": one}, None) == {
        "GPUs": [(Status.PROBLEM, "2 × H20 on a; 1 × H20 on b")]
    }
    assert (Status.PROBLEM, "b has 1 GPU of 2") in compare(compare_gpus, {"a": two, "b": one}, 2)["GPUs"]
    assert compare(compare_gpus, {"a": NodeFacts({})}, None) == {"GPUs": [(Status.OK, "none on each host")]}


def test_a_directory_that_is_nowhere_or_somewhere():
    have, lack = NodeFacts({}, files={"config.json": "2 ab"}), NodeFacts({})
    assert compare(compare_files, {"a": lack, "b": have}, "/m") == {
        "checkpoint": [(Status.PROBLEM, "/m is not a directory on a")]
    }
    assert compare(compare_files, {"a": have, "b": have}, "/m") == {
        "checkpoint": [(Status.OK, "the same 1 file on each host")]
    }


@pytest.mark.parametrize(
    ("offset", "status"), [(0.1, Status.OK), (-0.1, Status.OK), (2.0, Status.WARNING), (-7200.0, Status.PROBLEM)]
)
def test_clocks(offset, status):
    found = compare(compare_clocks, {"a": 0.0, "b": offset})["clocks"]
    assert [one[0] for one in found] == [status]
    if status is not Status.OK:
        ahead, behind = ("b", "a") if offset > 0 else ("a", "b")
        assert f"{ahead} is {abs(offset):,.1f} s ahead of {behind}" in found[0][1]


def test_a_single_clock_is_not_compared():
    assert compare(compare_clocks, {"a": 3.0}) == {}
