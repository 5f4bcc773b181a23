"""A torchvision of another torch keeps vLLM from being imported; the error names the remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("torch", "torchvision", "body", "says"),
    [
        ("2.13.0+cpu", "0.28.0", "raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms"),
        ("2.13.0+cpu", "0.28.0", "", ""),
        ("2.13.0+cpu", "0.28.0+cpu", "raise RuntimeError('it is not looked at')", ""),
        ("2.13.0", "0.28.0", "raise RuntimeError('it is not looked at')", ""),
    ],
)
def test_a_torchvision_that_keeps_vllm_from_being_imported(tmp_path, torch, torchvision, body, says):
    for name, version in (("torch", torch), ("torchvision", torchvision)):
        described = tmp_path / f"{name}-{version}.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(body)
    done = subprocess.run(
        [sys.executable, "-c", "from hunyuan_vllm.vllm_version import check_engine; check_engine()"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode == 0) is not bool(says)
    assert says in done.stderr and ("pip uninstall -y torchvision" in done.stderr) is bool(says)
