"""What is refused in the user's own process, before any of the engine's exists."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from vllm.platforms import current_platform

from hunyuan_vllm.errors import UserError

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM spawns its processes on CPUs only")

CALL = "from hunyuan_vllm.preflight import check_main_guard\n"
BARE = CALL + "x = 1\ncheck_main_guard()\n"
IN_A_FUNCTION = CALL + "def main():\n    check_main_guard()\nmain()\n"
GUARDED = CALL + "if __name__ == '__main__':\n    check_main_guard()\n"


def run(tmp_path: Path, source: str) -> None:
    script = tmp_path / "ask.py"
    script.write_text(source)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(("source", "line"), [(BARE, 3), (IN_A_FUNCTION, 4)])
def test_a_script_that_would_start_itself_again_is_refused(
    source: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UserError, match=rf'^ask.py .* `if __name__ == "__main__":` before line {line}'):
        run(tmp_path, source)


@pytest.mark.parametrize(("source", "multiprocessing"), [(GUARDED, "1"), (BARE, "0")])
def test_other_scripts_pass(source: str, multiprocessing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
    run(tmp_path, source)
