"""What the package imports of vLLM, wherever in a module, is there in this version too."""

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "hunyuan_vllm"
IMPORTS = sorted(
    {
        (node.module, name.name)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "vllm"
        for name in node.names
    }
)


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_it_is_there(module: str, name: str) -> None:
    if not hasattr(importlib.import_module(module), name):
        importlib.import_module(f"{module}.{name}")
