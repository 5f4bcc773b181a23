"""What a server holds: requests, cache blocks, memory, files and threads of all its processes."""

import time
from contextlib import suppress
from dataclasses import dataclass

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass(frozen=True)
class Footprint:
    """Of a process and all its children. `memory` is bytes that are its own (USS)."""

    processes: int
    memory: int
    files: int
    threads: int


def footprint(pid: int) -> Footprint:
    root = psutil.Process(pid)
    everyone = [root, *root.children(recursive=True)]
    memory = files = threads = count = 0
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            memory += process.memory_full_info().uss
            files += process.num_fds()
            threads += process.num_threads()
            count += 1
    return Footprint(count, memory, files, threads)


def held(client: httpx.Client) -> dict[str, float]:
    """Requests running and waiting, and the share of the cache in use, by vLLM's own metrics."""
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    return {sample.name: sample.value for family in families for sample in family.samples if sample.name in IDLE}


def wait_until_idle(client: httpx.Client, seconds: float = 60) -> None:
    """Raises:
    AssertionError: the engine still has requests or blocks after that time.
    """
    deadline = time.monotonic() + seconds
    while any(found := held(client).values()) or len(held(client)) < len(IDLE):
        assert time.monotonic() < deadline, f"not idle: {held(client)} {found}"
        time.sleep(0.2)
