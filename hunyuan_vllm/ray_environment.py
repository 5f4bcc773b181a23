"""The environment of an engine over Ray: what it needs to join the cluster, and what vLLM may copy to its workers"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SECRET = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)


def names_a_secret(variable: str) -> bool:
    """Whether the variable of that name is to be kept from other processes and nodes."""
    return SECRET.search(variable) is not None


STEERING = re.compile(
    r"(VLLM|HUNYUAN_VLLM|NCCL|GLOO|TP|UCX|OMP|MKL|KMP|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|CUBLAS|TRITON|FLASHINFER"
    r"|FLASH_ATTENTION|LMCACHE|HF|HUGGING_FACE|TRANSFORMERS|SAFETENSORS|TOKENIZERS|TIKTOKEN|XDG)_\w+"
    r"|DO_NOT_TRACK|LD_LIBRARY_PATH|LD_PRELOAD|PATH|PYTHONHASHSEED|PYTHONPATH|TMPDIR|TZ|LANG|LC_ALL"
)


def kept_from_workers(environ: Mapping[str, str]) -> set[str]:
    """The variables that are not to be copied."""
    asked = {name.strip() for name in environ.get("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "").split(",")}
    return {name for name in environ if name not in asked and not _may_be_copied(name)}


def _may_be_copied(name: str) -> bool:
    return STEERING.fullmatch(name) is not None and not names_a_secret(name)


def limit_copied_variables() -> None:
    """Tell vLLM, in this process: its own list of such names is what $VLLM_CONFIG_ROOT has in a file for it."""
    from vllm.ray import ray_env

    ray_env.RAY_NON_CARRY_OVER_ENV_VARS.update(kept_from_workers(os.environ))


def join_own_cluster() -> None:
    """Let this process join the Ray cluster that `cluster up` or `ray_head.sh` made this machine a node of.

    Sets what it takes (token, TLS, address, interfaces) and is not set yet; nothing where this is no such node.
    """
    from hunyuan_vllm.cluster.joined import cluster_variables  # of no use to engines on one machine

    if missing := cluster_variables():
        # Ray reads its settings as it is imported, which vLLM has done here by now: a forked engine would keep them.
        os.environ.update(missing, VLLM_WORKER_MULTIPROC_METHOD="spawn")
