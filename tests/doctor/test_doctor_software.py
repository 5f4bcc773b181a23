"""Versions, imports and registration: in processes that are really spawned, with packages that are really broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import look, machine, statuses

from hunyuan_vllm import plugin
from hunyuan_vllm.doctor import software
from hunyuan_vllm.doctor.probes import Probe, System, run_probe

pytestmark = pytest.mark.slow

ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-c", "from hunyuan_vllm.cli import main; main()", "doctor"]


def probe(cwd: Path, timeout: float = 90) -> Probe:
    return run_probe(System(ENVIRON, cwd, timeout=timeout))


def package(directory: Path, name: str, text: str) -> None:
    (directory / name).mkdir(parents=True)
    (directory / name / "__init__.py").write_text(text)


@pytest.mark.parametrize(("version", "status"), [((3, 10, 9), "problem"), ((3, 12, 1), "ok"), ((3, 14, 0), "problem")])
def test_python(version: tuple[int, int, int], status: str) -> None:
    assert statuses(look(software.check_python, version)) == {"Python": status}


def test_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(look(software.check_vllm)) == {"vLLM": "ok"}
    monkeypatch.setattr(software, "_is_alias", lambda name: False)
    both = look(software.check_vllm, lambda name: "0.32.0")
    assert statuses(both) == {"vLLM": "problem"} and "overwrites the other's" in both["vLLM"].text
    monkeypatch.setattr(plugin, "installed_vllm", lambda: ("vllm", "0.29.0"))
    old = look(software.check_vllm)["vLLM"]
    assert old.status == "problem" and "0.29.0" in old.text and "pip install" in old.remedy


def test_a_package_that_breaks_the_import_is_named(tmp_path: Path) -> None:
    package(tmp_path, "torch", "raise ImportError('libcudart.so.12: cannot open shared object')")
    found = look(software.check_worker, probe(tmp_path))["worker"]
    assert found.status == "problem" and "at import torch: ImportError: libcudart.so.12: cannot open" in found.text
    (tmp_path / "torch" / "__init__.py").write_text("import time\ntime.sleep(60)")
    found = look(software.check_worker, probe(tmp_path, timeout=1))["worker"]
    assert found.status == "skipped" and "no answer in 1 s, at import torch" in found.text


def test_a_spawned_worker_knows_the_model(tmp_path: Path) -> None:
    seen = probe(tmp_path)
    assert seen.failure == ""
    assert seen.values["model"] == "HunYuanForCausalLM" and seen.values["kernels"] is True
    assert Path(seen.values["plugin"]) == Path(sys.modules["hunyuan_vllm"].__file__ or "")
    assert statuses(look(software.check_worker, seen)) == {"torch": "ok", "worker": "ok"}


def test_a_plugin_that_vllm_is_told_not_to_load(tmp_path: Path) -> None:
    found = look(software.check_entry_point, machine(tmp_path, VLLM_PLUGINS="other,more"))
    assert statuses(found) == {"entry point": "problem"} and "VLLM_PLUGINS=other,more" in found["entry point"].text
    assert statuses(look(software.check_entry_point, machine(tmp_path, VLLM_PLUGINS="other, hunyuan"))) == {
        "entry point": "ok"
    }
    found = look(software.check_worker, Probe({"vllm": "/there", "registered": False}))
    assert statuses(found) == {"worker": "problem"} and "does not know the model" in found["worker"].text


def test_the_command_where_a_directory_hides_the_package(tmp_path: Path) -> None:
    """The real command on this machine: everything is looked at, and the worker fails as a server's would."""
    package(tmp_path, "hunyuan_vllm", "")
    code = f"import sys; sys.path.insert(0, {str(Path(plugin.__file__).parents[1])!r}); {COMMAND[2]}"
    result = subprocess.run(
        [*COMMAND[:2], code, "doctor", "--json", "--timeout", "90"],
        capture_output=True, text=True, cwd=tmp_path, env=ENVIRON | {"PORT": "1"}, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    assert [section["title"] for section in report["sections"]] == [
        "Software", "Plugin", "Hardware", "Limits", "Network", "Environment",
    ]  # fmt: skip
    found = {finding["subject"]: finding for section in report["sections"] for finding in section["findings"]}
    assert found["worker"]["status"] == "problem" and "hunyuan_vllm" in found["worker"]["text"]
    assert not any("the check itself failed" in finding["text"] for finding in found.values())
    assert {"vLLM", "CPU", "memory", "/dev/shm", "disk", "port", "Ray"} <= set(found)
