"""Environment variables that commonly hurt: each with what it does to a server, and those that vLLM does not know."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hunyuan_vllm.doctor.system import System
from hunyuan_vllm.findings import Section

__all__ = ["check_variables", "known_to_vllm"]

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Rule:
    """A value of a variable that hurts.

    Attributes:
        hurts: whether this value does, on the build for GPUs if the second argument says so.
        text: what it does.
        remedy: if not to unset it.
    """

    name: str
    hurts: Callable[[str, bool], bool]
    text: str
    remedy: str = ""


def _on(value: str, cuda: bool) -> bool:
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def _off(value: str, cuda: bool) -> bool:
    return bool(value.strip()) and not _on(value, cuda)


def _any(value: str, cuda: bool) -> bool:
    return True


def _one_thread_of_many(value: str, cuda: bool) -> bool:
    cores = len(os.sched_getaffinity(0))
    return not cuda and value.isdigit() and int(value) < cores


RULES = (
    Rule(
        "PYTHONDONTWRITEBYTECODE",
        lambda value, cuda: value != "",  # Python reads "0" as set, too
        "every process compiles every module again: a server takes about twice as long to start",
    ),
    Rule("HF_HUB_OFFLINE", _on, "a model named by its hub name is not downloaded; a folder is not affected"),
    Rule("TRANSFORMERS_OFFLINE", _on, "a model named by its hub name is not downloaded; a folder is not affected"),
    Rule("OMP_NUM_THREADS", _one_thread_of_many, "a rank uses fewer threads than there are cores"),
    Rule("CUDA_LAUNCH_BLOCKING", _on, "the CPU waits for every kernel, which slows decoding"),
    Rule("TORCHDYNAMO_DISABLE", _on, "nothing is compiled: slower on every device"),
    Rule("TORCH_COMPILE_DISABLE", _on, "nothing is compiled: slower on every device"),
    Rule("VLLM_DISABLE_COMPILE_CACHE", _on, "the model is compiled again at every start"),
    Rule("VLLM_TRACE_FUNCTION", _on, "every Python call is logged: unusably slow"),
    Rule("VLLM_LOGGING_LEVEL", lambda value, cuda: value.upper() == "DEBUG", "logs grow fast"),
    Rule("VLLM_CPU_KVCACHE_SPACE", lambda value, cuda: not cuda, "it replaces the cache size that `serve` chooses"),
    Rule("VLLM_WORKER_MULTIPROC_METHOD", lambda value, cuda: cuda and value == "fork",
         "forked workers cannot use CUDA once the parent has", "set it to spawn, or unset it"),
    Rule("NCCL_DEBUG", lambda value, cuda: value.upper() in ("INFO", "TRACE"), "NCCL logs from every rank"),
    Rule("NCCL_P2P_DISABLE", _on, "GPUs of one machine talk through host memory: NVLink is not used"),
    Rule("NCCL_SHM_DISABLE", _on, "GPUs of one machine may talk through the network"),
    Rule("NCCL_IB_DISABLE", _on, "nodes talk over TCP: RDMA is not used"),
    Rule("HUNYUAN_VLLM_CLA_SHARING", _off, "each cross layer has a KV cache of its own: half as many tokens fit"),
    Rule("HUNYUAN_VLLM_NATIVE_KERNELS", _off, "int8 weights on CPUs are multiplied by plain torch, slowly"),
    Rule("VLLM_ALLOW_RUNTIME_LORA_UPDATING", _on, "whoever can send requests can load adapters from this disk"),
    Rule("VLLM_SERVER_DEV_MODE", _on, "vLLM's administrative routes are open to whoever can connect"),
    Rule("VLLM_ALLOW_INSECURE_SERIALIZATION", _on, "data between processes is unpickled, which can run code"),
    Rule("LD_PRELOAD", lambda value, cuda: "cuda" in value or "nccl" in value or "torch" in value,
         "a library is put before those that torch brings"),
)  # fmt: skip


def check_variables(section: Section, system: System, cuda_build: bool, known: frozenset[str] | None) -> None:
    """Report them; `known` are the names that vLLM reads, None if they could not be found out."""
    environ = system.environ
    for rule in RULES:
        value = environ.get(rule.name)
        if value is not None and rule.hurts(value, cuda_build):
            section.warning(rule.name, f"{value!r}: {rule.text}", rule.remedy or "unset it unless that is meant")
    _check_proxies(section, system)
    ours = [name for name in environ if name.startswith("VLLM_")]
    if known is None:
        section.skipped("VLLM_*", "the installed vLLM's list of variables could not be read")
    elif unknown := sorted(name for name in ours if name not in known):
        hints = [f"{name}{_hint(name, known)}" for name in unknown]
        section.warning("VLLM_*", "vLLM knows no such variables", "correct or unset them", hints)
    if not section.findings:
        section.ok("variables", f"none of the {len(RULES)} that commonly hurt is set, and vLLM knows all of VLLM_*")


def known_to_vllm() -> frozenset[str] | None:
    """The variables that vllm/envs.py names, read from its source: importing it would take seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).with_name("envs.py")
    if not source.is_file():
        return None
    return frozenset(re.findall(r"\bVLLM_[A-Z0-9_]+\b", source.read_text(encoding="utf-8")))


def _check_proxies(section: Section, system: System) -> None:
    named = [name for name in PROXIES if system.environ.get(name)]
    exempt = system.environ.get("no_proxy", system.environ.get("NO_PROXY", ""))
    if named and not {"127.0.0.1", "localhost", "*"} & {part.strip() for part in exempt.split(",")}:
        text = f"{', '.join(named)} is set without no_proxy: clients here send even requests to 127.0.0.1 there"
        section.warning("proxy", text, "export no_proxy=127.0.0.1,localhost")


def _hint(name: str, known: frozenset[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f" (is {close[0]} meant?)" if close else ""
