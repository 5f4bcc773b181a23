"""Which processes of this user hold GPU memory, as the driver says."""

from __future__ import annotations

import os

import psutil

from hunyuan_vllm.cluster.processes import shown
from hunyuan_vllm.doctor.system import System

__all__ = ["processes_on_gpus"]


def processes_on_gpus(system: System) -> list[str]:
    """What they are and how much they hold; empty also where there is no GPU, or the driver does not say."""
    try:
        listing = system.output(
            "nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"
        )
    except OSError:
        return []
    held = []
    for line in listing.splitlines():
        number, _, mebibytes = line.partition(",")
        try:
            process = psutil.Process(int(number))
            if process.uids().real == os.getuid():
                held.append(f"{shown(process)}: {mebibytes.strip()} MiB")
        except (ValueError, psutil.Error):
            continue
    return held
