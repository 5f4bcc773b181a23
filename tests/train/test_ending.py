"""The end of a process: what was registered for it happens, Python's teardown does not."""

import subprocess
import sys

SCRIPT = """
import atexit, sys
from hunyuan_vllm.train.nodes import end_process

class Held:
    def __del__(self):
        print("teardown")

held = Held()
atexit.register(print, "registered")
print("done")
{end}
"""


def end_with(end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], capture_output=True, text=True, timeout=60)


def test_nothing_is_taken_apart():
    ended = end_with("end_process(3)")
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (3, ["done", "registered"], "")
    ordinary = end_with("sys.exit(3)")
    assert (ordinary.returncode, ordinary.stdout.split()) == (3, ["done", "registered", "teardown"])
