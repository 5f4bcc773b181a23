"""What a server runs on and how it is set up, as labels of one metric: what a measurement must say to be compared."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

from prometheus_client import Info
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from hunyuan_vllm import __version__
from hunyuan_vllm.compat import installed_version

__all__ = ["describe"]

CPUINFO = Path("/proc/cpuinfo")
_info = Info("hunyuan_server", "What the server runs on, and how it is set up")


def describe(config: VllmConfig) -> Info:
    """Set `hunyuan_server_info`: `device`, `devices` and `cores` are the machine, the rest versions and options."""
    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    labels = {
        **_machine(parallel.world_size * parallel.data_parallel_size),
        "version": __version__,
        "vllm": (installed_version() or ("", "unknown"))[1],
        "torch": metadata.version("torch"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization or "none",
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "data_parallel": parallel.data_parallel_size,
        "max_model_len": model.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "enforce_eager": model.enforce_eager,
    }
    _info.info({name: str(value) for name, value in labels.items()})
    return _info


def _machine(ranks: int) -> dict[str, object]:
    """`device` is the kind of GPU or CPU; `devices` the GPUs, or ranks on CPUs; `cores` this host's that it may use."""
    device = _cpu() if current_platform.is_cpu() else current_platform.get_device_name()
    return {"device": device, "devices": ranks, "cores": len(os.sched_getaffinity(0))}


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else os.uname().machine
