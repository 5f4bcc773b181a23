"""The systemd units: systemd takes them, they start Ray as `cluster up` does, and leave a drain its time."""

import re
import shlex
import shutil
import stat
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from typer.main import get_command

from hunyuan_vllm.cli import app
from hunyuan_vllm.cluster.ray_node import HOOK, RAY_SETTINGS, NodeSetup
from hunyuan_vllm.server.supervisor import GAVE_UP, STOP_MARGIN
from hunyuan_vllm.util.errors import NotYetError, UserError

DIRECTORY = Path(__file__).parents[2] / "deploy" / "systemd"
ROOT = "/opt/hunyuan-vllm"
UNITS = sorted(DIRECTORY.glob("*.service"))
RAY = [unit for unit in UNITS if "-ray-" in unit.name]
SERVER = DIRECTORY / "hunyuan-server.service"
HARDENED = {
    "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
    "CapabilityBoundingSet": "", "RestrictSUIDSGID": "yes", "UMask": "0077", "User": "hunyuan",
}  # fmt: skip
MOST_EXPOSED = 4.0  # of 10, by systemd's own reckoning; an unguarded service has 9.6


def settings(unit: Path) -> dict[str, list[str]]:
    found = defaultdict(list)
    for line in unit.read_text().replace("\\\n", " ").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


def environment(unit: Path) -> dict[str, str]:
    return dict(word.split("=", 1) for line in settings(unit)["Environment"] for word in line.split())


def command(unit: Path) -> list[str]:
    (line,) = settings(unit)["ExecStart"]
    example = dict(
        line.split("=", 1)
        for line in (DIRECTORY / "node.env.example").read_text().splitlines()
        if not line.startswith("#")
    )
    return shlex.split(re.sub(r"\$\{(\w+)\}", lambda match: example[match[1]], line))


def test_all_three_are_there():
    assert [unit.name for unit in UNITS] == [
        "hunyuan-ray-head.service",
        "hunyuan-ray-worker.service",
        "hunyuan-server.service",
    ]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_they_are_hardened(unit):
    found = settings(unit)
    assert {name: found[name][0] for name in HARDENED} == HARDENED
    assert not any(re.search("KEY=|TOKEN=|PASSW", line) for line in found["Environment"])


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_them(unit, tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("ray", "hunyuan-vllm"):
        program = tmp_path / ".venv/bin" / name
        program.touch()
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    installed = tmp_path / unit.name
    installed.write_text(unit.read_text().replace(ROOT, str(tmp_path)))
    verified = subprocess.run([analyze, "verify", installed], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")
    limit = f"--threshold={MOST_EXPOSED * 10:.0f}"
    judged = subprocess.run(
        [analyze, "security", "--offline=yes", limit, installed], capture_output=True, text=True, timeout=60
    )
    assert judged.returncode == 0, judged.stdout[-300:]


@pytest.mark.parametrize("unit", RAY, ids=lambda unit: unit.name)
def test_ray_is_started_as_by_cluster_up(unit):
    head = "head" in unit.name
    setup = NodeSetup("10.0.0.1", "10.0.0.1" if head else "10.0.0.9", "bond1", 8, "/token")
    program, *arguments = command(unit)
    assert program == f"{ROOT}/.venv/bin/ray"
    arguments = [argument.replace("--address=10.0.0.1:", "--address=10.0.0.9:") for argument in arguments]
    assert sorted(arguments) == sorted([*setup.ray_arguments(), "--block"])
    assert RAY_SETTINGS.items() <= environment(unit).items()
    assert environment(unit)["RAY_START_HOOK"] == HOOK


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_variables_are_those_of_cluster_up(unit):
    """Beside what belongs to one node, which node.env names."""
    example = {line.split("=")[0] for line in (DIRECTORY / "node.env.example").read_text().splitlines() if "=" in line}
    needed = NodeSetup("10.0.0.1", "10.0.0.1", "bond1", 8, "/token").environment()
    assert needed.keys() <= environment(unit).keys() | example


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_mistake_is_final_and_what_is_not_there_yet_is_tried_again(unit):
    final = {int(status) for status in settings(unit)["RestartPreventExitStatus"][0].split()}
    assert UserError.status in final and NotYetError.status not in final
    assert unit in RAY or GAVE_UP in final


def test_the_key_file_can_be_replaced_while_the_server_runs():
    """A credential, like everything below %d, is a copy from the start of the service."""
    file = Path(environment(SERVER)["HUNYUAN_VLLM_API_KEY_FILE"])
    assert file.is_absolute()
    assert not any(line.startswith("api-key") for line in settings(SERVER)["LoadCredential"])


def test_the_server_knows_its_options():
    program, name, *options = command(SERVER)
    assert (program, name) == (f"{ROOT}/.venv/bin/hunyuan-vllm", "serve")
    known = {word for parameter in get_command(app).commands["serve"].params for word in parameter.opts}
    assert {option for option in options if option.startswith("--")} <= known
    assert "--supervise" in options


def test_a_drain_has_its_time_and_only_the_supervisor_is_told():
    found = settings(SERVER)
    options = command(SERVER)
    grace = float(options[options.index("--grace") + 1])
    assert float(found["TimeoutStopSec"][0]) > grace + STOP_MARGIN
    assert found["KillMode"] == ["mixed"]
    assert found["Type"] == ["notify"]
    assert found["Restart"] == ["on-failure"]
