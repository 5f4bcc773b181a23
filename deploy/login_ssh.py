#!/usr/bin/env python3
"""Mutual SSH logins between hosts: python3 deploy/login_ssh.py --ips IP1,IP2 --port 36000 (--help says all).

Where this Python lacks what it needs, the environment of this checkout takes over (deploy/setup_env.sh makes it).
"""

import ast
import importlib.util
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> int:
    """Hide the password, find a Python that has the libraries, and run the command."""
    if sys.version_info < (3, 8):  # noqa: UP036 - whichever Python a host has may be asked
        say("this needs Python 3.11 or newer: name it, as in python3.11 deploy/login_ssh.py")
        return 2
    sys.path[0] = ROOT
    from hunyuan_vllm.cluster.process_title import take_option

    password = take_option("--password")
    if password is not None:
        pass_on(password)
    if sys.version_info >= (3, 11) and all(map(importlib.util.find_spec, ("paramiko", "rich", "typer"))):
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
    say(f"this Python lacks paramiko or its like: using the environment of {ROOT}")
    set_up = ["sh", os.path.join(ROOT, "deploy", "setup_env.sh"), "--for", "login_ssh.py"]
    status = subprocess.call(set_up + [word for word in sys.argv[1:] if word == "--help"])
    if status != 0:
        return status
    os.execv(python, [python] + sys.argv)


def show_help() -> None:
    """What the command's own help says without its list of options, which takes the libraries."""
    with open(os.path.join(ROOT, "hunyuan_vllm", "cli", "login_ssh.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    (command,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "login_ssh"]
    print((ast.get_docstring(command) or "").replace("\b\n", ""))
    print("\nAll options: the same again, after sh deploy/setup_env.sh")


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
