"""All checks, with the slow ones, which import in other processes, under way while the others look."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hunyuan_vllm.doctor import hardware as host_hardware
from hunyuan_vllm.doctor import host, import_probe, network, software, worker_probe
from hunyuan_vllm.doctor.probes import Probe, System, run_probe
from hunyuan_vllm.util.findings import Section

__all__ = ["examine"]


def examine(system: System) -> list[Section]:
    """Look at everything; a check that cannot be made is a line that says why."""
    with ThreadPoolExecutor(2) as pool:
        imports = pool.submit(_probe, system, import_probe.__file__, Path("/"))
        worker = pool.submit(_probe, system, worker_probe.__file__, system.cwd)
        return _sections(system, imports, worker)


def _sections(system: System, imports: Future[Probe], worker: Future[Probe]) -> list[Section]:
    cuda = software.is_cuda_build()
    hardware, limited = Section("Hardware"), Section("Limits")
    usable: list[host_hardware.Gpu] = []
    _look(hardware, "GPUs", lambda section: usable.extend(host_hardware.check_gpus(section, system, cuda)))
    _look(hardware, "CPU", lambda section: host_hardware.check_cpu(section, system, cuda))
    _look(hardware, "NUMA", lambda section: host_hardware.check_numa(section, system, cuda))
    _look(hardware, "memory", lambda section: host_hardware.check_memory(section, system))
    _look(hardware, "compiler", lambda section: host_hardware.check_compiler(section, system, cuda))

    _look(limited, "/dev/shm", lambda section: host.check_shared_memory(section, system, cuda))
    _look(limited, "limits", lambda section: host.check_limits(section, system))
    _look(limited, "disk", lambda section: host.check_disk(section, system))
    _look(limited, "clock", lambda section: host.check_clock(section, system))

    connected = Section("Network")
    settings = network.check_settings(connected, system)
    _look(connected, "port", lambda section: network.check_ports(section, settings.host, settings.port))
    _look(connected, "Ray", lambda section: network.check_ray(section, system))
    _look(connected, "host name", lambda section: network.check_name(section, system))
    _look(connected, "interfaces", lambda section: network.check_interfaces(section, system, settings))

    environment = Section("Environment")
    known = host.known_to_vllm()
    _look(environment, "variables", lambda section: host.check_variables(section, system, cuda, known))

    programs, found = Section("Software"), Section("Plugin")
    _look(programs, "Python", software.check_python)
    _look(programs, "vLLM", software.check_vllm)
    _look(programs, "packages", software.check_packages)
    _look(programs, "imports", lambda section: software.check_imports(section, imports.result()))
    _look(found, "entry point", lambda section: software.check_entry_point(section, system))
    _look(found, "shadowing", lambda section: software.check_shadows(section, system))
    _look(found, "worker", lambda section: software.check_worker(section, worker.result()))
    _look(hardware, "driver", lambda section: host_hardware.check_torch_cuda(section, system, imports.result(), usable))
    return [programs, found, hardware, limited, connected, environment]


def _probe(system: System, script: str | None, cwd: Path) -> Probe:
    assert script is not None
    return run_probe(system, Path(script), cwd)


def _look(section: Section, subject: str, check: Callable[[Section], object]) -> None:
    """Each check has findings of its own, so that it can tell whether it was content."""
    own = Section(section.title)
    try:
        check(own)
    except Exception as error:  # one check that fails must not cost the others; its line says what happened
        own.skipped(subject, f"the check itself failed: {type(error).__name__}: {error}", "please report this")
    section.findings += own.findings
