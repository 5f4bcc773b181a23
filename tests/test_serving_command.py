"""The commands that tools end with serve what they have written, from any directory."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hunyuan_vllm import demo, serving_command
from hunyuan_vllm.serving_command import adapter_command, checkpoint_command

ROOT = Path(__file__).parents[1]


def test_paths_are_absolute_and_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(checkpoint_command(Path("my out/final")))
    assert words == [f"MODEL_PATH={tmp_path}/my out/final", "sh", str(ROOT / "deploy" / "run_server.sh")]
    words = shlex.split(adapter_command(Path("out/final"), Path("base"), 24, ["q_proj"], gpu=False))
    assert words[0] == f"MODEL_PATH={tmp_path}/base"
    assert words[3:] == ["--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"mine={tmp_path}/out/final"]


def test_without_the_scripts_the_command_of_this_environment_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_command, "__file__", str(tmp_path / "hunyuan_vllm" / "serving_command.py"))
    variable, command, serve = shlex.split(checkpoint_command(demo.path()))
    assert variable == "MODEL_PATH=demo" and serve == "serve"
    assert Path(command).parent == Path(sys.executable).parent


@pytest.mark.parametrize(("rank", "targets", "gpu"), [(16, ["q_proj", "up_proj"], False), (600, ["q_proj"], True)])
def test_an_adapter_that_cannot_be_served_beside_its_model_is_merged(
    tmp_path: Path, rank: int, targets: list[str], gpu: bool
) -> None:
    merge, serve = adapter_command(tmp_path / "final", tmp_path / "base", rank, targets, gpu).split(" && ")
    assert shlex.split(merge)[1:3] == ["merge-lora", "--base_model_path"]
    assert serve == checkpoint_command(tmp_path / "final-merged") and f"--output_path {tmp_path}/final-merged" in merge
    assert "merge" not in adapter_command(tmp_path, tmp_path, 16, targets[:1], gpu)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_the_command_is_one_that_serve_takes(tmp_path: Path, scheme: str | None) -> None:
    """In the shell, from another directory; nothing is started."""
    script, command = f"sh {ROOT}/deploy/run_server.sh", checkpoint_command(demo.path(), scheme)
    assert script in command  # which would set up an environment first
    command = command.replace(script, f"{Path(sys.executable).with_name('hunyuan-vllm')} serve")
    done = subprocess.run(
        ["sh", "-c", f"{command} --dry-run"], cwd=tmp_path, env=os.environ | {"MODEL_PATH": "/x"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(demo.path()) in done.stdout
