"""The C++ kernels' way into a process: compiled once, safely, with one OpenMP runtime; done without if that fails."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hunyuan_vllm.quant.cpu import native, w8a16


@pytest.fixture(scope="module", autouse=True)
def needs_the_kernels() -> None:
    try:
        native._require_features()
    except native.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def first_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`native.kernels()` as in a process that has not called it."""
    native.kernels.cache_clear()
    yield
    native.kernels.cache_clear()


def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    """And a folder that only its user can write to, with one file in it in the end."""
    folder = tmp_path / "kernels"
    code = f"import pathlib; from hunyuan_vllm.quant.cpu import native; native.build(pathlib.Path({str(folder)!r}))"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_one_openmp_runtime() -> None:
    assert native.kernels() is not None
    maps = Path("/proc/self/maps").read_text()
    assert len(set(re.findall(r"\S*/lib(?:g|i?)omp\S*", maps))) == 1


def product() -> float:
    weight = w8a16.pack_linear(torch.ones(64, 64, dtype=torch.int8))
    return w8a16.linear(torch.ones(1, 64, dtype=torch.bfloat16), weight, torch.ones(64)).sum().item()


def test_without_a_compiler(
    first_call: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Products are right, of weights packed before too; the log says once what to install."""
    before = product()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    packed = w8a16.pack_linear(torch.ones(64, 64, dtype=torch.int8))
    native.kernels.cache_clear()
    with caplog_vllm(caplog):
        assert product() == before == 4096
        assert w8a16.linear(torch.ones(1, 64, dtype=torch.bfloat16), packed, torch.ones(64)).sum() == before
    assert [record.message for record in caplog.records if "apt-get install g++" in record.message] == caplog.messages


@contextmanager
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """vLLM's loggers do not hand on to the root logger."""
    native.logger.addHandler(caplog.handler)
    yield
    native.logger.removeHandler(caplog.handler)


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
    with pytest.raises(native.Unavailable, match=message):
        native.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(native.Unavailable, match=f"others can write to {tmp_path}"):
        native.build(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(native.Unavailable, match="set VLLM_CACHE_ROOT"):
        native.build(tmp_path / "file" / "kernels")


def test_another_source_or_flag_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    first = native.build(tmp_path)
    assert native.build(tmp_path) == first
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-DOTHER"))
    assert native.build(tmp_path) != first


def test_a_cpu_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    with pytest.raises(native.Unavailable, match="this CPU lacks avx512_bw, avx512_vl, avx512_bf16, avx512_vbmi"):
        native._require_features()
