"""An engine forked from a front end: its threads, its sockets, its end, and when it is spawned instead"""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from forked_programs import Program
from waiting import eventually

SCRIPT = """
import os, signal, socket, sys
import torch
from hunyuan_vllm import forked_engine

def is_open(number):
    try:
        socket.socket(fileno=os.dup(number))
    except OSError:
        return os.readlink(f"/proc/self/fd/{number}")
    return True

def engine(*sockets):
    torch.ones(2**22).add_(1)  # on all threads; it would hang after a fork from threads of OpenMP
    tasks = len(os.listdir("/proc/self/task"))
    print("child", torch.get_num_threads(), tasks, *map(is_open, sockets), flush=True)

if __name__ == "__main__":
    forked_engine.fork_engines()
    from vllm.v1.engine import utils
    listener = socket.create_server(("127.0.0.1", 0))
    bound, path = socket.socket(), socket.socket(socket.AF_UNIX)  # as vLLM's, which listens once the engine is ready
    bound.bind(("127.0.0.1", 0))
    path.bind(sys.argv[1])
    client = socket.create_connection(listener.getsockname())
    sockets = (listener, bound, path, client, *socket.socketpair(), socket.socket())
    torch.ones(2**22).add_(1)
    context = utils.get_mp_context()
    process = context.Process(target=engine, args=[each.fileno() for each in sockets])
    process.start()
    process.join(60)
    print("parent", context.get_start_method(), torch.get_num_threads(), process.exitcode)
    socket.create_connection(listener.getsockname()).close()
    forked_engine._one_openmp = lambda: False
    print("otherwise", utils.get_mp_context().get_start_method())
"""


@pytest.mark.engine
def test_a_forked_engine_has_its_own_threads_and_does_not_listen(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "FORKED_ENGINES"}
    environ |= {"OMP_NUM_THREADS": "2", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "socket")]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert ["child", "2", "3", *[os.devnull] * 3, *["True"] * 4] in lines, ran.stdout + ran.stderr
    assert ["parent", "fork", "1", "0"] in lines
    assert ["otherwise", "spawn"] in lines


KILLED = """
import multiprocessing, os, signal, sys, time

def engine():
    if sys.argv[1] == "spawn":
        import hunyuan_vllm_plugin, vllm.v1.engine.core
        hunyuan_vllm_plugin.register()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    if sys.argv[1] == "fork":
        from hunyuan_vllm import forked_engine
        forked_engine.fork_engines()
        from vllm.v1.engine import utils
        context = utils.get_mp_context()
    context.Process(target=engine, name="EngineCore").start()
    time.sleep(600)
"""


@pytest.mark.engine
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_engine_ends_when_its_front_end_is_killed(method: str, tmp_path: Path) -> None:
    script = tmp_path / "front_end.py"
    script.write_text(KILLED)
    environ = {name: value for name, value in os.environ.items() if name != "FORKED_ENGINES"}
    environ |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "HUNYUAN_VLLM_LIMIT_RAY_VARIABLES": "1"}  # as serve sets it
    run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    front_end = Program([sys.executable, "-c", run, method], environ)
    engine = psutil.Process(next(int(line) for line in front_end.stdout if line.strip().isdigit()))
    front_end.kill()
    front_end.wait()
    eventually(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
