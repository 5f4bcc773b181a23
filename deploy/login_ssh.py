#!/usr/bin/env python3
"""Mutual SSH logins between hosts: python3 deploy/login_ssh.py --ips IP1,IP2 --port 36000 (--help says all).

Where this Python lacks what it needs, the environment of this checkout takes over (deploy/setup_env.sh makes it).
"""

import ast
import ctypes
import importlib.util
import os
import subprocess
import sys
from typing import Optional

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> int:
    """Hide the password, find a Python that has the libraries, and run the command."""
    if sys.version_info < (3, 8):  # noqa: UP036 - whichever Python a host has may be asked
        say("this needs Python 3.11 or newer: name it, as in python3.11 deploy/login_ssh.py")
        return 2
    sys.path[0] = ROOT
    password = take_option("--password")
    if password is not None:
        pass_on(password)
    if sys.version_info >= (3, 11) and all(map(importlib.util.find_spec, ("paramiko", "psutil", "rich", "typer"))):
        from hunyuan_vllm.cli.login_ssh import main as command

        command()
        return 0
    venv = os.environ.get("HUNYUAN_VENV") or os.path.join(ROOT, ".venv")
    python = os.path.join(venv, "bin", "python")
    if not {"-h", "--help"}.isdisjoint(sys.argv) and not os.path.exists(python):
        show_help()
        return 0
    if os.path.realpath(sys.prefix) == os.path.realpath(venv):
        say(f"the environment {venv} lacks paramiko: remove it and run sh deploy/setup_env.sh")
        return 1
    say(f"this Python lacks paramiko or another library: using the environment of {ROOT}")
    set_up = ["sh", os.path.join(ROOT, "deploy", "setup_env.sh"), "--for", "login_ssh.py"]
    status = subprocess.call(set_up + [word for word in sys.argv[1:] if word == "--help"])
    if status != 0:
        return status
    os.execv(python, [python] + sys.argv)


def take_option(name: str) -> Optional[str]:  # noqa: UP045 - Python 3.8 may read this
    """Remove the option `name` (with its value) from sys.argv and hide the value in the process's arguments."""
    value = None
    arguments = []
    rest = iter(sys.argv)
    for argument in rest:
        if argument.startswith(name + "="):
            value = argument[len(name) + 1 :]
        elif argument == name:
            value = next(rest, None)
            if value is None:
                arguments.append(argument)
        else:
            arguments.append(argument)
    if value is not None:
        sys.argv[:] = arguments
        hide_in_memory(os.fsencode(name))
    return value


def hide_in_memory(name: bytes) -> None:
    """Overwrite the option's values in the memory that the kernel shows as /proc/PID/cmdline."""
    with open("/proc/self/stat", encoding="utf-8") as stat:
        fields = stat.read().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end in proc(5), which counts from 1 and two more
    arguments = ctypes.string_at(start, end - start).split(b"\0")
    shown = []
    for index, argument in enumerate(arguments):
        if argument.startswith(name + b"="):
            shown.append(name + b"=*")
        elif index and arguments[index - 1] == name:
            shown.append(b"*")
        else:
            shown.append(argument)
    # Shorter than before, and padded to the same size, so that not even the length is told.
    text = b"\0".join(shown)
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def show_help() -> None:
    """What the command's own help says without its list of options, which takes the libraries."""
    with open(os.path.join(ROOT, "hunyuan_vllm", "cli", "login_ssh.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    (command,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "login_ssh"]
    print((ast.get_docstring(command) or "").replace("\b\n", ""))
    print("\nFor all options, run this again after sh deploy/setup_env.sh")


def pass_on(password: str) -> None:
    """Put the password where --password-file finds it: in memory that this process and its successor share."""
    if any(argument.split("=")[0] == "--password-file" for argument in sys.argv):
        say("give either --password or --password-file")
        sys.exit(2)
    if not password:
        say("--password is empty")
        sys.exit(2)
    say("warning: --password is in your shell's history, and was visible to others until now: use --password-file")
    descriptor = os.memfd_create("password", 0)
    os.fchmod(descriptor, 0o600)
    os.write(descriptor, os.fsencode(password))
    sys.argv.append(f"--password-file=/proc/self/fd/{descriptor}")


def say(text: str) -> None:
    sys.stderr.write(f"login_ssh: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
