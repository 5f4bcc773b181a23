"""The chat page's modules as one script, so that a page load is a few requests; made when the server starts."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path, PurePosixPath

__all__ = ["bundle"]

IMPORT = re.compile(r'^import (?:(\w+)|(\{[^}]+\})) from "(\./[\w./-]+)";$', re.M)
NAMED_EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const) (\w+))", re.M)
DEFAULT_EXPORT = re.compile(r"^export\s*\{\s*(\w+) as default\s*\};?(?:\s*//# sourceMappingURL=\S+)?\s*\Z", re.M)


def bundle(folder: Path, entry: str) -> str:
    """`entry` and all that it imports, each in a scope of its own, after what it imports itself.

    Understands as much of JavaScript's modules as ours and their libraries use: imports from relative paths, one a
    line; exports of declarations; and a default export at the end.
    """
    scopes: dict[str, str] = {}

    def add(name: str) -> None:
        text = (folder / name).read_text()
        here = PurePosixPath(name).parent
        for _, _, path in IMPORT.findall(text):
            if str(here / path) not in scopes:
                add(str(here / path))
        exports = NAMED_EXPORT.findall(text)
        if default := DEFAULT_EXPORT.search(text):
            exports.append(f"default: {default[1]}")
        text = IMPORT.sub(partial(_constant, here), NAMED_EXPORT.sub("", DEFAULT_EXPORT.sub("", text)))
        scopes[name] = f'modules["{name}"] = (() => {{\n{text}\nreturn {{ {", ".join(exports)} }};\n}})();\n'

    add(entry)
    return "const modules = {};\n" + "".join(scopes.values())


def _constant(folder: PurePosixPath, statement: re.Match[str]) -> str:
    default, names, path = statement.groups()
    return f'const {f"{{ default: {default} }}" if default else names} = modules["{folder / path}"];'
