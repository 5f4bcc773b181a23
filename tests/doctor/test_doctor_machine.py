"""The machine's checks on machines made of files."""

import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import look, machine, statuses

from hunyuan_vllm.doctor import hardware, host
from hunyuan_vllm.envs import Settings

CPUINFO = "processor\t: 0\nmodel name\t: Imaginary 9000\nflags\t\t: fpu {flags}\n"


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        (
            "avx2 avx512f avx512_bf16 avx512_vnni avx512vbmi amx_bf16",
            "vLLM's AMX kernels, int8 on our AVX-512 ones",
        ),
        ("avx2 avx512f avx512_bf16 avx512_vnni", "packed kernels, int8 weights on our AVX2"),
        ("avx2 avx512f avx512_bf16 avx512_vnni avx512vbmi", "packed kernels, int8 weights on our AVX-512"),
        ("avx2 avx512f", "without BF16: bfloat16 through float32, slowly; int8 weights on our AVX2"),
        ("avx2", "AVX2: bfloat16 and int8 weights on our kernels"),
    ],
)
def test_the_processor_says_which_kernels(tmp_path: Path, flags: str, kernels: str) -> None:
    system = machine(tmp_path, {"proc/cpuinfo": CPUINFO.format(flags=flags)})
    found = look(hardware.check_cpu, system, False)
    assert statuses(found) == {"CPU": "ok"}
    assert kernels in found["CPU"].text and "Imaginary 9000" in found["CPU"].text


def test_a_processor_that_is_too_old_and_a_containers_quota(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": CPUINFO.format(flags="sse2"), "sys/fs/cgroup/cpu.max": "50000 100000\n"}
    found = look(hardware.check_cpu, machine(tmp_path, files), False)
    assert statuses(found) == {"CPU": "problem", "CPU quota": "warning"}
    assert "0.5 cores" in found["CPU quota"].text
    assert statuses(look(hardware.check_cpu, machine(tmp_path / "none"), False)) == {"CPU": "skipped"}


def test_numa(tmp_path: Path) -> None:
    for nodes in (1, 2):
        files = {f"sys/devices/system/node/node{node}/x": "" for node in range(nodes)}
        found = look(hardware.check_numa, machine(tmp_path / str(nodes), files), True)
        assert statuses(found) == {"NUMA": "ok"} and ("TP_SIZE=2" in found["NUMA"].text) == (nodes == 2)


def test_no_compiler(tmp_path: Path) -> None:
    assert statuses(look(hardware.check_compiler, machine(tmp_path), False)) == {"compiler": "warning"}
    assert statuses(look(hardware.check_compiler, machine(tmp_path), True)) == {"compiler": "problem"}


@pytest.mark.parametrize(
    ("total", "free", "cuda", "status"),
    [
        (64, 63, False, "problem"),
        (2048, 100, False, "problem"),
        (2048, 2000, False, "ok"),
        (2048, 2000, True, "warning"),
    ],
)
def test_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, cuda: bool, status: str
) -> None:
    system = machine(tmp_path, {"dev/shm/.keep": ""})
    fake = type("Usage", (), {"total": total << 20, "used": 0, "free": free << 20})
    monkeypatch.setattr(host.shutil, "disk_usage", lambda directory: fake)
    found = look(host.check_shared_memory, system, cuda)
    assert statuses(found) == {"/dev/shm": status}
    assert status == "ok" or "--ipc=host" in found["/dev/shm"].remedy
    assert statuses(look(host.check_shared_memory, machine(tmp_path / "none"), cuda)) == {"/dev/shm": "problem"}


def test_limits(tmp_path: Path) -> None:
    def limit(files: int, locked: int) -> Callable[[int], tuple[int, int]]:
        values = {resource.RLIMIT_NOFILE: files, resource.RLIMIT_MEMLOCK: locked}
        return lambda which: (values[which], values[which])

    plain = machine(tmp_path / "plain")
    rdma = machine(tmp_path / "rdma", {"sys/class/infiniband/mlx5_0/x": ""})
    infinite = resource.RLIM_INFINITY
    good = {"open files": "ok", "locked memory": "ok"}
    assert statuses(look(host.check_limits, plain, limit(1 << 20, 8 << 20))) == good
    assert statuses(look(host.check_limits, plain, limit(1024, 8 << 20)))["open files"] == "problem"
    assert statuses(look(host.check_limits, plain, limit(20000, 8 << 20)))["open files"] == "warning"
    found = look(host.check_limits, rdma, limit(infinite, 8 << 20))
    assert statuses(found) == {"open files": "ok", "locked memory": "problem"}
    assert "mlx5_0" in found["locked memory"].text
    assert look(host.check_limits, rdma, limit(infinite, infinite))["locked memory"].status == "ok"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = machine(tmp_path, TMPDIR=str(tmp_path), HF_HOME=str(tmp_path / "not" / "yet" / "there"))
    fake = type("Usage", (), {"free": 50 * 10**9})
    monkeypatch.setattr(host.shutil, "disk_usage", lambda directory: fake)
    assert statuses(look(host.check_disk, system)) == {"disk": "ok"}
    fake.free = 5 * 10**9
    assert statuses(look(host.check_disk, system)) == {"disk": "warning"}
    fake.free = 10**9
    found = look(host.check_disk, system)
    assert statuses(found) == {"disk": "problem"}
    monkeypatch.setattr(host.os, "access", lambda directory, mode: False)
    assert "is not writable" in look(host.check_disk, system)["disk"].text


def test_a_taken_port_names_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = look(host.check_server_port, "127.0.0.1", port)
        assert statuses(found) == {"port": "problem"}
        assert f"port {port} on 127.0.0.1 is taken by process {os.getpid()}" in found["port"].text
    assert statuses(look(host.check_server_port, "127.0.0.1", port)) == {"port": "ok"}


def test_settings_that_mean_nothing(tmp_path: Path) -> None:
    found = look(host.check_settings, machine(tmp_path, PORT="eighty"))
    assert statuses(found) == {"settings": "problem"} and "PORT=eighty" in found["settings"].text


def test_ray(tmp_path: Path) -> None:
    def absent(name: str) -> None:
        return None

    def present(name: str) -> str:
        return "2.60.0"

    alone = machine(tmp_path, RAY_TMPDIR=str(tmp_path))
    assert statuses(look(host.check_ray, alone, absent)) == {"Ray": "skipped"}
    assert statuses(look(host.check_ray, alone, present)) == {"Ray": "ok"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        cluster = machine(tmp_path, RAY_ADDRESS=address, RAY_TMPDIR=str(tmp_path))
        assert statuses(look(host.check_ray, cluster, absent)) == {"Ray": "problem"}
        assert f"a cluster answers at {address}" in look(host.check_ray, cluster, present)["Ray"].text
    found = look(host.check_ray, cluster, present)
    assert statuses(found) == {"Ray": "problem"} and "no cluster answers" in found["Ray"].text
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    assert "no cluster answers" in look(host.check_ray, alone, present)["Ray"].text


@pytest.mark.parametrize(
    ("address", "environ", "status"),
    [
        ("10.0.0.5", {}, "ok"),
        ("127.0.1.1", {}, "ok"),
        ("127.0.1.1", {"RAY_ADDRESS": "10.0.0.1:6379"}, "warning"),
        ("127.0.1.1", {"RAY_ADDRESS": "10.0.0.1:6379", "LOCAL_IP": "10.0.0.5"}, "ok"),
    ],
)
def test_the_machines_own_name(tmp_path: Path, address: str, environ: dict[str, str], status: str) -> None:
    found = look(host.check_name, machine(tmp_path, **environ), lambda name: address)
    assert statuses(found) == {"host name": status}


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "lo"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, "ok"),
        ({"NCCL_SOCKET_IFNAME": "=lo,nothing0"}, "ok"),
        ({"GLOO_SOCKET_IFNAME": "nothing0"}, "problem"),
        ({"LOCAL_IP": "192.0.2.77"}, "problem"),
    ],
)
def test_interfaces(tmp_path: Path, environ: dict[str, str], status: str) -> None:
    system = machine(tmp_path, **environ)
    found = look(host.check_interfaces, system, Settings.read(system.environ))
    assert statuses(found) == {"interfaces": status}


@pytest.mark.parametrize(
    ("name", "harmful", "harmless"),
    [
        ("PYTHONDONTWRITEBYTECODE", "1", ""),
        ("VLLM_SERVER_DEV_MODE", "true", "0"),
        ("HUNYUAN_VLLM_CLA_SHARING", "0", "1"),
    ],
)
def test_variables(tmp_path: Path, name: str, harmful: str, harmless: str) -> None:
    assert statuses(look(host.check_variables, machine(tmp_path, **{name: harmful}))) == {name: "warning"}
    assert statuses(look(host.check_variables, machine(tmp_path, **{name: harmless}))) == {"variables": "ok"}
