"""Imports go down only, and the plugin imports none of the tools (docs/architecture.md)."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hunyuan_vllm"
# From the top. A package imports from its own row's other packages only where it is listed below, and from all rows
# under it.
ROWS = [
    ("cli",),
    ("batch", "bench", "evaluation", "train"),
    ("server",),
    ("cluster", "doctor"),
    ("check", "plan", "quantize"),
    ("", "demo", "native", "quant"),  # the modules of the package itself
    ("util",),
]
BESIDE = {
    ("evaluation", "batch"),  # scores by batches
    ("cluster", "doctor"),  # probes each host
    ("quantize", "check"), ("quant", "native"), ("evaluation", "bench"), ("evaluation", "train"),
    ("", "demo"), ("", "native"), ("", "quant"), ("quant", ""), ("native", ""),
}  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ROWS) for name in names}


def area(module: str) -> str:
    """The package directly under hunyuan_vllm that holds a module; "" for its own modules."""
    first = (module.split(".")[1:] or [""])[0]
    return first if (PACKAGE / first).is_dir() else ""


def imports(directory: Path = PACKAGE) -> list[tuple[Path, str]]:
    """What the files of a directory import from the package."""
    found = []
    for path in directory.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
                found += [(path, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@cache
def names(module: str) -> set[str]:
    """What a module of the package defines or imports at its top."""
    file = PACKAGE.parent.joinpath(*module.split("."))
    parsed = ast.parse((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text())
    found = {path.stem for path in file.glob("*")}
    for node in parsed.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        else:
            found |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return found


@pytest.mark.parametrize("directory", ["tests/cuda", "benchmarks", "examples", "train", "deploy"])
def test_what_no_other_test_runs_imports_what_is_there(directory: str) -> None:
    wrong = []
    for path, imported in imports(PACKAGE.parent / directory):
        module, _, name = imported.rpartition(".")
        if name not in names(module):
            wrong.append(f"{path.relative_to(PACKAGE.parent)} imports {imported}")
    assert sorted(wrong) == []


def test_every_package_has_a_layer() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= LEVEL.keys()


def test_imports_go_down() -> None:
    wrong = []
    for path, imported in imports():
        here = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""
        there = area(imported)
        beside = LEVEL[here] == LEVEL[there] and here != there and (here, there) not in BESIDE
        if LEVEL[there] < LEVEL[here] or beside:
            wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert sorted(wrong) == []


TOOLS = {name for names in ROWS[:5] for name in names}


def test_the_plugin_imports_no_tool() -> None:
    program = "import sys, hunyuan_vllm_plugin as plugin; plugin.register(); print(*sys.modules)"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HUNYUAN_VLLM_")}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "hunyuan_vllm.plugin" in loaded
    assert {area(name) for name in loaded if name.startswith("hunyuan_vllm.")} & TOOLS == set()
    assert {"typer", "paramiko", "ray"} & set(loaded) == set()
