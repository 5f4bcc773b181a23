"""vLLM's own parser of server options, without the seconds that importing vLLM takes

The options are read from vLLM once and cached: by the set-up in the Python environment, else by a separate process in
vLLM's cache directory. Parsing itself (abbreviations, --config, options with dots) is done by vLLM's parser class,
loaded from its file.
"""

import argparse
import difflib
import importlib.util
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from hunyuan_vllm import __version__, envs
from hunyuan_vllm.plugin import check_vllm_version, installed_vllm
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import replacing
from hunyuan_vllm.util.streams import say

ENVIRONMENT_CACHE = Path(sys.prefix, "share", "hunyuan-vllm")
PARSER_FILE = Path("utils", "argparse_utils.py")
OPTION_FILES = (Path("engine", "arg_utils.py"), PARSER_FILE)
ACTIONS: dict[str, Any] = {
    "BooleanOptionalAction": argparse.BooleanOptionalAction,
    "_StoreTrueAction": "store_true",
    "_AppendAction": "append",
}
TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "_optional_type": lambda text: None if text in ("", "None") else text,
}
UNKNOWN = "unrecognized arguments: "


def parse(argv: Sequence[str], own_options: Sequence[str] = ()) -> dict[str, Any]:
    """The options that are given, as vLLM's server would parse them: destination → value.

    Values that only vLLM itself can convert stay text.

    Args:
        argv: the server's arguments; a model, if there is one, first.
        own_options: names to suggest for a mistyped option, beside vLLM's.
    """
    parser = _parser(tuple(own_options))
    try:
        namespace = vars(parser.parse_args(list(argv)))
    except UserError:
        raise
    except IndexError:
        raise UserError(f"{argv[-1].split('=')[0]} needs a value") from None
    except OSError as error:
        raise UserError(f"--config {error.filename} cannot be read: {error.strerror}") from None
    except Exception as error:  # from parsing a --config file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--config cannot be used: {reason}") from None
    if "config" in namespace:  # a file that was read leaves only its options
        raise UserError("vLLM does not read --config=FILE: write --config FILE")
    return namespace


@cache
def _parser(own_options: tuple[str, ...]) -> argparse.ArgumentParser:
    flexible: type[argparse.ArgumentParser] = _parser_module().FlexibleArgumentParser

    class Parser(flexible):  # type: ignore[valid-type, misc]
        def error(self, message: str) -> NoReturn:
            raise UserError(_error_message(message, (*self._option_string_actions, *own_options)))

    parser: argparse.ArgumentParser = Parser(prog="serve", add_help=False)
    for option in _options():
        flags, choices = option["flags"], option.get("choices")
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS}
        if (action := ACTIONS.get(option["action"])) is not None:
            keywords["action"] = action
        else:
            keywords |= {"nargs": option["nargs"], "const": option["const"], "choices": choices}
            keywords["type"] = TYPES.get(option["type"]) or getattr(_parser_module(), option["type"])
        if flags[0].startswith("-"):
            keywords["dest"] = option["dest"]
        parser.add_argument(*flags, **keywords)
    return parser


def _error_message(message: str, known: Sequence[str]) -> str:
    """argparse's error as one line."""
    if not message.startswith(UNKNOWN):
        message = re.sub(r"^argument ([^:]+): ", lambda match: f"{match[1].split('/')[0]}: ", message)
        return f"{message[:300]} (vllm serve --help=all lists vLLM's options)"
    words = [word.split("=")[0].split(".")[0] for word in message.removeprefix(UNKNOWN).split()]
    option = next((word for word in words if word.startswith("-")), None)
    if option is None:
        return "too many arguments: give one model, then options (vllm serve --help=all lists vLLM's)"
    close = difflib.get_close_matches(option.replace("_", "-"), known, n=1, cutoff=0.6)
    meant = f": did you mean {close[0]}?" if close else " (vllm serve --help=all lists vLLM's)"
    return f"{option} is not an option of this command or of vLLM{meant}"


@cache
def _parser_module() -> ModuleType:
    """vLLM's module with the parser class, loaded alone where vLLM itself has not been imported."""
    if "vllm" in sys.modules:
        return importlib.import_module("vllm.utils.argparse_utils")
    spec = importlib.util.spec_from_file_location("_vllm_argparse_utils", _vllm_directory() / PARSER_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _stand_in_logger():
        spec.loader.exec_module(module)
    return module


@contextmanager
def _stand_in_logger() -> Iterator[None]:
    """In the block, a silent `vllm.logger` stands in for vLLM; the server logs its own warnings."""

    class Silent(logging.Logger):
        warning_once = logging.Logger.warning

    silent = Silent(__name__, logging.CRITICAL + 1)
    package, logger = ModuleType("vllm"), ModuleType("vllm.logger")
    logger.init_logger = lambda name: silent  # type: ignore[attr-defined]
    sys.modules |= {"vllm": package, "vllm.logger": logger}
    try:
        yield
    finally:
        del sys.modules["vllm"], sys.modules["vllm.logger"]


def _vllm_directory() -> Path:
    try:
        check_vllm_version()
    except RuntimeError as error:
        raise UserError(str(error)) from None
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("vLLM is installed, but its package is missing: install it again")
    return Path(spec.submodule_search_locations[0])


def _options() -> list[dict[str, Any]]:
    """The options of vLLM's server: from vLLM if it is imported, else from the cache."""
    if "vllm.engine.arg_utils" in sys.modules:
        return _read_options()
    name = _cache_name()
    for directory in (ENVIRONMENT_CACHE, envs.cache_directory()):
        with suppress(OSError, ValueError):
            return list(json.loads((directory / name).read_text()))
    say("reading vLLM's options, once for this version")
    text = _query_vllm()
    with suppress(OSError, UserError):  # a cache that cannot be written costs seconds at the next start
        _write(envs.cache_directory() / name, text)
    return list(json.loads(text))


def keep_in_environment() -> None:
    """Cache the options for all users of this Python environment. Imports vLLM; called by the set-up."""
    _write(ENVIRONMENT_CACHE / _cache_name(), json.dumps(_read_options()))


def _cache_name() -> str:
    directory = _vllm_directory()
    _, version = installed_vllm() or ("", "")
    changed = max((directory / file).stat().st_mtime_ns for file in OPTION_FILES)
    return f"options-{__version__}-{version}-{changed:x}.json"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(text)


def _query_vllm() -> str:
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()  # vLLM's log goes there, too
    if done.returncode or not lines:
        last = (done.stderr.splitlines() or lines or ["no output"])[-1]
        raise UserError(f"vLLM cannot be imported to read its options: {last}")
    return lines[-1]


def _read_options() -> list[dict[str, Any]]:
    """Every option of vLLM's server, with what this module needs to build a parser."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = []
    for action in make_arg_parser(FlexibleArgumentParser(add_help=False))._actions:
        kind = action.type or str
        name = getattr(kind, "__name__", "")
        plain = kind in (int, float, str) or getattr(kind, "__module__", "") == FlexibleArgumentParser.__module__
        boolean = isinstance(action, argparse.BooleanOptionalAction)  # of a class of vLLM's own since 0.33
        flags = [flag for flag in action.option_strings if not (boolean and _is_negation(flag, action))]
        options.append(
            {
                "flags": flags or [action.dest],
                "dest": action.dest,
                "action": argparse.BooleanOptionalAction.__name__ if boolean else type(action).__name__,
                "nargs": action.nargs,
                "const": action.const,
                "type": name if plain or name in TYPES else "str",
                "choices": list(action.choices) if plain and action.choices is not None else None,
            }
        )
    return options


def _is_negation(flag: str, action: argparse.Action) -> bool:
    """Whether the parser adds this flag by itself."""
    return flag in getattr(action, "negative_option_strings", ()) or flag.startswith("--no-")


if __name__ == "__main__":
    print("\n" + json.dumps(_read_options()))
