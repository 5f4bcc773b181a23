"""GPUs, by an nvidia-smi that is a fake: none are at hand."""

from pathlib import Path

import pytest
from fakes import GPU, look, machine, nvidia_smi, statuses

from hunyuan_vllm.doctor.hardware import Gpu, check_gpus, check_torch_cuda, read_gpus
from hunyuan_vllm.doctor.probes import Probe

TORCH = {"torch": "2.13.0", "cuda": "12.8", "available": True, "devices": 2, "nccl": "2.27.5"}


def test_what_nvidia_smi_says_is_read(tmp_path: Path) -> None:
    system = machine(tmp_path)
    nvidia_smi(
        system, "3, NVIDIA A100-SXM4-80GB, 550.1, 8.0, 81920, 5120, Enabled, 2", "4, Old, 1, 7.0, 1, 1, [N/A], [N/A]"
    )
    assert read_gpus(system) == [
        Gpu(3, "NVIDIA A100-SXM4-80GB", "550.1", 8.0, 81920, 5120, True, 2),
        Gpu(4, "Old", "1", 7.0, 1, 1, False, 0),
    ]


def test_a_sound_pair(tmp_path: Path) -> None:
    system = machine(tmp_path)
    nvidia_smi(system)
    found = look(check_gpus, system, True)
    assert statuses(found) == {"GPUs": "ok"}
    assert "2 × NVIDIA H20 (96 GiB), driver 570.86.15" in found["GPUs"].text


@pytest.mark.parametrize(
    ("gpu", "subject", "status"),
    [
        ("1, NVIDIA H20, 1, 9.0, 97871, 90000, Disabled, 0", "memory", "warning"),
        ("1, NVIDIA H20, 1, 9.0, 97871, 4, Enabled, 0", "MIG", "problem"),
        ("1, NVIDIA H20, 1, 9.0, 97871, 4, Disabled, 7", "ECC", "problem"),
        ("1, Tesla V100, 1, 7.0, 32768, 4, Disabled, 0", "GPUs", "problem"),
        ("1, NVIDIA A100, 1, 8.0, 81920, 4, Disabled, 0", "FP8", "ok"),
    ],
)
def test_what_is_wrong_with_one_of_them(tmp_path: Path, gpu: str, subject: str, status: str) -> None:
    system = machine(tmp_path)
    nvidia_smi(system, GPU.format(index=0), gpu)
    found = look(check_gpus, system, True)
    assert found[subject].status == status
    assert "1" in found[subject].text


@pytest.mark.parametrize(("cuda_build", "status"), [(True, "problem"), (False, "skipped")])
def test_no_gpu_at_all(tmp_path: Path, cuda_build: bool, status: str) -> None:
    found = look(check_gpus, machine(tmp_path), cuda_build)
    assert statuses(found) == {"GPUs": status}
    assert "nvidia-smi is not installed" in found["GPUs"].text


def test_a_driver_that_fails_says_how(tmp_path: Path) -> None:
    system = machine(tmp_path)
    nvidia_smi(system, fails="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    found = look(check_gpus, system, True)
    assert statuses(found) == {"GPUs": "problem"}
    assert "couldn't communicate with the NVIDIA driver" in found["GPUs"].text


def test_gpus_and_the_engine_for_cpus(tmp_path: Path) -> None:
    system = machine(tmp_path)
    nvidia_smi(system)
    section = look(check_gpus, system, False)
    assert section["GPUs"].status == "ok"  # the later line of that name; the first is the warning below
    nvidia_smi(system, fails="no driver")
    assert look(check_gpus, system, False)["GPUs"].status == "warning"


@pytest.mark.parametrize(
    ("devices", "statuses_"),
    [
        ("0,1", {"GPUs": "ok"}),
        ("1", {"GPUs": "ok"}),
        ("", {"CUDA_VISIBLE_DEVICES": "problem"}),
        ("-1", {"CUDA_VISIBLE_DEVICES": "problem"}),
        ("0,5", {"CUDA_VISIBLE_DEVICES": "problem", "GPUs": "ok"}),
        ("GPU-8f2a", {"GPUs": "ok"}),
    ],
)
def test_chosen_devices(tmp_path: Path, devices: str, statuses_: dict[str, str]) -> None:
    system = machine(tmp_path, CUDA_VISIBLE_DEVICES=devices)
    nvidia_smi(system)
    assert statuses(look(check_gpus, system, True)) == statuses_


@pytest.mark.parametrize(
    ("driver", "torch", "expected"),
    [
        ("12.8", {}, {"driver": "ok", "NCCL": "ok"}),
        ("12.4", {}, {"driver": "ok", "NCCL": "ok"}),  # a minor version may be behind
        ("12.8", {"cuda": "13.0"}, {"driver": "problem", "NCCL": "ok"}),
        ("13.0", {}, {"driver": "ok", "NCCL": "ok"}),
        ("12.8", {"available": False}, {"driver": "ok", "torch.cuda": "problem", "NCCL": "ok"}),
        ("12.8", {"devices": 1}, {"driver": "ok", "torch.cuda": "warning", "NCCL": "ok"}),
        ("12.8", {"nccl_error": "libnccl.so.2: cannot open"}, {"driver": "ok", "NCCL": "problem"}),
        ("12.8", {"cuda": None}, {}),
    ],
)
def test_driver_and_torch(tmp_path: Path, driver: str, torch: dict, expected: dict[str, str]) -> None:
    system = machine(tmp_path)
    nvidia_smi(system, cuda=driver)
    probe = Probe(TORCH | torch)
    assert statuses(look(check_torch_cuda, system, probe, read_gpus(system))) == expected
