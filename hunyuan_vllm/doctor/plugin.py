"""Whether vLLM's worker processes will know the model: the entry point, and what may hide the package behind it."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path

from hunyuan_vllm.doctor.probe import Probe
from hunyuan_vllm.doctor.system import System
from hunyuan_vllm.findings import Section

__all__ = ["check_entry_point", "check_shadows", "check_worker"]

GROUP, NAME = "vllm.general_plugins", "hunyuan"
PACKAGES = (
    "hunyuan_vllm", "hunyuan_vllm_plugin", "vllm", "torch", "transformers", "tokenizers", "tiktoken", "safetensors",
    "numpy", "ray", "pydantic", "fastapi", "triton",
)  # fmt: skip
REINSTALL = "pip install --force-reinstall --no-deps hunyuan-vllm"


def check_entry_point(section: Section, system: System) -> None:
    """The line in our package's metadata by which vLLM finds us, and the variable that may tell it not to."""
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
    """Packages and standard modules that the working directory or PYTHONPATH would put before the real ones."""
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
        text = "files here come before the packages of that name, which then are not found"
        section.problem(
            "shadowing", text, "start from another folder, rename them, or take it out of PYTHONPATH", found
        )
    else:
        section.ok("shadowing", f"nothing in {system.cwd} hides a package")


def check_worker(section: Section, probe: Probe) -> None:
    """What worker_probe's spawned process found."""
    values = probe.values
    if probe.failure and "model" not in values:  # with it, all has been said
        if probe.timed_out:
            section.skipped("worker", probe.failure, "run again (files are cached now), or give --timeout 120")
        else:
            remedy = f"mend what it names; where it names hunyuan_vllm: {REINSTALL}"
            section.problem("worker", f"a spawned worker process fails: {probe.failure}", remedy)
        return
    if not values.get("registered"):
        text = "a spawned worker process loads vLLM's plugins and still does not know the model"
        remedy = f"{REINSTALL}; a folder named hunyuan_vllm in the working directory has the same effect"
        section.problem("worker", text, remedy)
        return
    if not values.get("kernels"):
        text = f"vLLM's compiled operators for {values.get('platform') or 'this platform'} cannot be loaded"
        section.problem("kernels", text, "install the vLLM build that fits this torch, CPU and driver")
    section.ok("worker", f"a spawned process knows the model; vLLM runs on {values.get('platform') or 'no device'}")


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()
