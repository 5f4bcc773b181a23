"""A user's own script: vLLM finds the plugin by its entry point in the script, the engine core and the workers."""

import os
import re
import sys
from pathlib import Path

import forked_programs
import pytest
from forked_engines import EAGER
from forked_programs import ENGINE_TOO

from hunyuan_vllm import demo

pytestmark = [pytest.mark.engine, pytest.mark.slow]
EXAMPLE = Path(__file__).parents[1] / "examples" / "offline_batch.py"
# The script, the engine core and its workers are forked from processes that have imported vLLM, but no plugin.
ENVIRON = ENGINE_TOO | {"FORKED_ENGINES": "forkserver", EAGER: "1", "MODEL_PATH": str(demo.path())}


def run_example(directory: Path, *options: str) -> tuple[str, str]:
    """Its answers, and what vLLM logged."""
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    script = f"import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    command = [sys.executable, "-c", script, "--enforce-eager", *options]
    ran = forked_programs.run(command, inherited | ENVIRON, directory, timeout=400)
    assert ran.returncode == 0, ran.stderr[-4000:]
    answers = "\n".join(line for line in ran.stdout.splitlines() if not re.match(r"\(\w+ pid=|INFO|WARNING", line))
    return answers, ran.stdout + ran.stderr


def test_the_example_answers(tmp_path: Path) -> None:
    ranks = 2
    answers, log = run_example(
        tmp_path, "--tensor-parallel-size", str(ranks), "--kv-cache-memory-bytes", str(64 * 2**20)
    )
    assert "(EngineCore pid=" in log
    assert len(set(re.findall(r"Worker\w* pid=(\d+)", log))) >= ranks
    english, chinese, oceans, capital, water = re.split(r"\n(?=> |.*\[…\])", answers)[-5:]
    assert "salt" in english and "sea" in english
    assert "盐" in chinese and "�" not in chinese
    assert re.search("Pacific.*Atlantic.*Indian.*Arctic", oceans)
    assert capital.split("[…]")[1].strip()
    assert water.split("[…]")[1].strip()
    assert list(tmp_path.iterdir()) == []
