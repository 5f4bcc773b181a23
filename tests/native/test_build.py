"""How the C++ kernels get into a process: compiled once, safely, with one OpenMP runtime; or done without."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hunyuan_vllm.cpu import key_compiled_code
from hunyuan_vllm.cpu_kernels import LINEAR
from hunyuan_vllm.native import build, operators
from hunyuan_vllm.quant.cpu import w8a16

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
QUICK = "sh -c 'exec g++ \"$@\" -O0' g++"  # $CXX of tests in which it does not matter how fast the kernels are


@pytest.fixture(scope="module", autouse=True)
def needs_the_kernels() -> None:
    try:
        build.require_features()
    except build.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def first_call() -> Iterator[None]:
    """`operators.available()` as in a process that has not called it."""
    operators.available.cache_clear()
    yield
    operators.available.cache_clear()


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for kernels, which the first test compiles in."""
    return tmp_path_factory.mktemp("cache") / "hunyuan-vllm" / "kernels"


def test_processes_that_compile_at_once(libraries: Path) -> None:
    """As the set-up does, into a directory that only its user can write to, with one file in it in the end."""
    code = runpy.run_path(str(ROOT / "deploy" / "bootstrap" / "warm_imports.py"))["KERNELS"]
    environ = {**os.environ, "VLLM_CACHE_ROOT": str(libraries.parents[1]), "CXX": QUICK}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environ) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert libraries.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in libraries.iterdir()] == [".so"]


def test_one_openmp_runtime() -> None:
    """In a process of its own: other packages of an environment bring others, which no kernel uses."""
    code = (
        "import torch; from hunyuan_vllm.native import operators; assert operators.available(); "
        "print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(set(re.findall(r"\S*/lib(?:g|i?)omp\S*", maps))) == 1


def product() -> float:
    kernel = w8a16.choose(LINEAR, torch.bfloat16, 64, 64)
    packed = w8a16.pack(torch.ones(64, 64, dtype=torch.int8), kernel)
    return w8a16.linear(torch.ones(1, 64, dtype=torch.bfloat16), packed, torch.ones(64)).sum().item()


def test_without_a_compiler(
    first_call: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Products are right; the log says once what to install."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(operators.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(operators.logger, "propagate", False)
    assert product() == product() == 4096
    assert len(caplog.messages) == 1 and "apt-get install g++" in caplog.messages[0]


def test_switched_off(first_call: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("HUNYUAN_VLLM_NATIVE_KERNELS", "0")
    assert product() == 4096 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "does not run"),
        ("sh -c 'test $0 = --version || { echo error: no >&2; exit 1; }'", "error: no"),
    ],
)
def test_a_compiler_that_fails(compiler: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(build.Unavailable, match=message):
        build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(build.Unavailable, match=f"others can write to {tmp_path}"):
        build.build(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(build.Unavailable, match="set VLLM_CACHE_ROOT"):
        build.build(tmp_path / "file" / "kernels")


def test_another_source_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is there is not compiled again."""
    directory = tmp_path / "kernels"
    for number in (1, 2):
        (tmp_path / "empty.cpp").write_text(f"// {number}\n")
        monkeypatch.setattr(build, "DIRECTORY", tmp_path)
        target = build.build(directory)
        target.write_bytes(b"as it was")
        assert build.build(directory) == target and target.read_bytes() == b"as it was"
    assert len(list(directory.iterdir())) == 2


def test_a_cpu_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx": True})
    with pytest.raises(build.Unavailable, match="this CPU lacks fma3"):
        build.require_features()


@pytest.mark.parametrize("lacking", [None, "avx512_bf16", "avx512_vnni"])
def test_the_instructions_that_are_used(lacking: str | None, libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 only where the CPU has all that the kernels need of it; both compile on any machine."""
    has = {name: name != lacking for name in (*build.AVX512, "avx2", "fma3")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setenv("CXX", QUICK)
    library = build.build(libraries)
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert ("%zmm" in code) == (lacking is None)


def test_compiled_code_of_other_kernels_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a first start without a compiler: the weights' layouts differ."""

    def key() -> object:
        config = SimpleNamespace(additional_config={}, parallel_config=SimpleNamespace(worker_extension_cls=""))
        key_compiled_code(config)
        return config.additional_config

    with_kernels = key()
    monkeypatch.setattr(operators, "available", lambda: False)
    assert key() != with_kernels


@pytest.mark.skipif(not build.has_avx512(), reason="this CPU's other tests are of the kernels for AVX2")
def test_kernels_for_avx2_on_a_cpu_with_more() -> None:
    """Without torch.compile, which is the same for all kernels."""
    files = [f"native/test_{name}.py" for name in ("attention", "bf16", "rotary", "routing")] + ["quant/test_cpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not engine", "-k", "not compiled"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environ |= {"TEST_CPU": "avx2"}
    command += [str(ROOT / "tests" / file) for file in files]
    run = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and " skipped" not in run.stdout, run.stdout
