"""The command as a whole: versions, a mistyped name, completion."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from hunyuan_vllm import __version__, cli
from hunyuan_vllm.util.errors import NotYetError, UserError

SCRIPT = Path(sys.executable).with_name("hunyuan-vllm")


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "120"} | environ
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=60)


def test_the_versions_that_matter() -> None:
    assert run("--version").stdout.startswith(f"hunyuan-vllm {__version__} (vllm")
    assert f"torch {metadata.version('torch')}, Python 3." in run("--version").stdout


def test_a_mistyped_command_gets_a_suggestion() -> None:
    result = run("servee")
    assert result.returncode == 2
    assert "Did you mean 'serve'?" in result.stderr


@pytest.mark.parametrize(("error", "status"), [(UserError("typed wrongly"), 2), (NotYetError("no Ray yet"), 75)])
def test_what_may_succeed_later_has_a_status_of_its_own(monkeypatch, capsys, error, status) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    assert capsys.readouterr().err == f"hunyuan-vllm: {error}\n"


@pytest.mark.parametrize(("typed", "completed"), [("doct", "doctor"), ("check --de", "--deep")])
def test_completion(typed: str, completed: str) -> None:
    words = f"hunyuan-vllm {typed}"
    count = str(len(words.split()) - 1)
    result = run(COMP_WORDS=words, COMP_CWORD=count, _HUNYUAN_VLLM_COMPLETE="complete_bash")
    assert result.stdout.split() == [completed], result.stderr


@pytest.mark.parametrize("module", ["cluster.probe", "cluster.ray_node", "doctor.run", "server.launch", "preflight"])
def test_what_starts_often_does_not_wait_for_torch(module: str) -> None:
    code = f"import sys, hunyuan_vllm.{module}; print({{'torch', 'transformers', 'vllm'}} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "set()", result.stderr
