"""Every vLLM symbol and keyword we use exists in the installed vLLM; and the check would notice if not."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hunyuan_vllm.cli import app
from hunyuan_vllm.compat import check_symbols
from hunyuan_vllm.vllm_surface import USED, Symbol

PACKAGE = Path(__file__).parents[1] / "hunyuan_vllm"


@pytest.fixture(scope="module")
def root() -> Path:
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]


def test_the_installed_vllm_has_all_we_use(root: Path) -> None:
    assert check_symbols(root) == []


@pytest.mark.parametrize(
    ("symbol", "problem"),
    [
        (Symbol("vllm.no_such_module", "Thing"), "vllm.no_such_module.Thing: not found"),
        (Symbol("vllm.config", "NoSuchConfig"), "vllm.config.NoSuchConfig: not found"),
        (
            Symbol("vllm.model_executor.layers.attention", "Attention", keywords=("prefix", "no_such_keyword")),
            "vllm.model_executor.layers.attention.Attention: takes no keyword 'no_such_keyword'",
        ),
        (
            Symbol("vllm.config", "VllmConfig", members=("model_config", "no_such_field")),
            "vllm.config.VllmConfig: has no member 'no_such_field'",
        ),
    ],
)
def test_what_is_not_there_is_named(symbol: Symbol, problem: str, root: Path) -> None:
    assert check_symbols(root, (symbol,)) == [problem]


def test_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["compat"])
    assert result.exit_code == 0 and ": 0 problems" in result.stdout
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    result = runner.invoke(app, ["compat", str(tmp_path)])
    assert result.exit_code == 1 and "vllm.ModelRegistry: not found" in result.stdout


def test_every_import_from_vllm_is_listed() -> None:
    listed = {(symbol.module, symbol.name) for symbol in USED}
    modules = {symbol.module for symbol in USED}
    imported = {
        (node.module, alias.name)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
        if f"{node.module}.{alias.name}" not in modules  # a module, whose members are listed
    }
    assert imported - listed == set()


@pytest.mark.parametrize(
    ("torch", "torchvision", "body", "says"),
    [
        ("2.13.0+cpu", "0.28.0", "raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms"),
        ("2.13.0+cpu", "0.28.0", "", ""),
        ("2.13.0+cpu", "0.28.0+cpu", "raise RuntimeError('it is not looked at')", ""),
        ("2.13.0", "0.28.0", "raise RuntimeError('it is not looked at')", ""),
    ],
)
def test_a_torchvision_that_keeps_vllm_from_being_imported(tmp_path, torch, torchvision, body, says):
    for name, version in (("torch", torch), ("torchvision", torchvision)):
        described = tmp_path / f"{name}-{version}.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(body)
    done = subprocess.run(
        [sys.executable, "-c", "from hunyuan_vllm.compat import check_engine; check_engine()"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode == 0) is not bool(says)
    assert says in done.stderr and ("pip uninstall -y torchvision" in done.stderr) is bool(says)
